"""Rows made from the same source texts by several templates: found again, and never in two splits."""

import re

import pytest

from common.data.corpora.by_name import open_corpus
from common.data.corpora.recurring import source_groups, split_by_source
from common.data.corpora.table import CORPORA
from tests.common.data.corpora.shared_corpora import real


def rendered(data_set: str, passages: list[str], shuffle: int = 0) -> list[dict[str, str]]:
    """Rows of two templates, the second with its passages in another order."""
    rows = [
        {"template": f"{data_set}_a", "inputs": f"Read this text and say what it is: {p}", "targets": p[:3]}
        for p in passages
    ]
    turned = passages[shuffle:] + passages[:shuffle]
    return rows + [
        {"template": f"{data_set}_b", "inputs": f"Which text begins so? {p[:3]}", "targets": p} for p in turned
    ]


def test_rows_of_one_source_text_are_in_one_group():
    passages = [f"{i:03} word{i} thing{i} and what all have" for i in range(60)]
    rows = rendered("imdb", passages, shuffle=17)
    groups = source_groups(rows)
    assert len(set(groups.tolist())) == 60
    number = [re.search(r"\d{3} word", row["inputs"] + row["targets"])[0] for row in rows]  # type: ignore[index]
    assert len(set(zip(groups.tolist(), number, strict=True))) == 60


def test_a_shared_passage_joins_groups_across_data_sets_but_a_templates_words_do_not():
    long = "this passage is long enough that nobody would write it twice by chance"
    rows = rendered("imdb", [f"{i:03} word{i} here" for i in range(20)]) + rendered("xsum", ["q1 x", "q2 y"])
    rows[3]["inputs"] += f"\n{long}"
    rows[-1]["inputs"] += f"\n{long.upper()}"
    for row in rows[:20]:
        row["inputs"] += "\nThe template itself says this long sentence in every single row of it"
    groups = source_groups(rows)
    assert groups[3] == groups[-1] and len(set(groups.tolist())) == 21
    assert len(set(split_by_source([row for row, group in zip(rows, groups, strict=True) if group == groups[3]]))) == 1


@pytest.fixture(scope="module")
def t0() -> dict[str, list[dict[str, str]]]:
    fields = {name: name for name in CORPORA["t0"].fields}
    found = {}
    for split in CORPORA["t0"].splits:
        source = open_corpus("t0", split, fields)
        found[split] = [source[i] for i in range(len(source))]
    return found


@real
@pytest.mark.slow  # reads and divides 50,000 records
def test_no_source_text_of_the_multitask_mixture_is_in_two_splits(t0):
    assert sum(len(rows) for rows in t0.values()) == 54032
    assert all(0.01 < len(t0[split]) / 54032 < 0.05 for split in ("validation", "test"))
    inputs = [{row["inputs"] for row in rows} for rows in t0.values()]
    assert len(set.union(*inputs)) == sum(len(members) for members in inputs)


@real
@pytest.mark.slow  # reads and divides 50,000 records
def test_a_question_is_in_one_split_for_all_templates(t0):
    """Two of the templates put the question between fixed words, so a pattern can extract it."""
    patterns = {
        "trec_pick_the_best_descriptor": r"Question: (.*?)\n\nDescriptors",
        "trec_trec1": r"(?:.*\n)*(.+?)\n\nIs this asking",
    }
    splits = {
        template: {
            re.match(pattern, row["inputs"])[1].strip(): split  # type: ignore[index]
            for split, rows in t0.items()
            for row in rows
            if row["template"] == template
        }
        for template, pattern in patterns.items()
    }
    one, two = splits.values()
    assert one == two and len(one) == 200 and set(one.values()) == {"train", "validation", "test"}
