"""Splits of one set of files by hash: each record is in one, equal texts are in the same one."""

import collections
import copy
import json

import pytest

from common.config import apply_overrides
from common.data.sources import divided
from common.data.sources.by_name import open_source
from common.data.sources.config import SourceConfig, Template
from common.data.sources.records import Problem
from common.errors import UserError

SPLITS = ("train", "validation", "test")


def write(folder, rows, name="a.tsv") -> str:
    (folder / name).write_text("".join(f"{left}\t{right}\n" for left, right in rows))
    return f"tsv:{folder}/{name}"


def config(name, **fields) -> SourceConfig:
    base = SourceConfig(name=name, inputs="en", targets="de")
    edits = [f"{field}={value}" for field, value in {"inputs": 1, "targets": 2, "held_out": 0.1, **fields}.items()]
    return apply_overrides(base, edits)  # as the command line makes it


def splits(source_config, cache) -> dict[str, list]:
    opened = {split: open_source(source_config, split, cache) for split in SPLITS}
    return {split: source.read(range(len(source))) for split, source in opened.items()}


def test_every_record_is_in_one_split_and_equal_inputs_are_in_the_same(tmp_path):
    rows = [(f"text {i % 1500}", f"answer {i}") for i in range(3000)]
    found = splits(config(write(tmp_path, rows)), tmp_path / "cache")
    numbers = [int(record["targets"].split()[1]) for records in found.values() for record in records]
    assert sorted(numbers) == list(range(3000))
    assert all([*records] == sorted(records, key=lambda r: int(r["targets"].split()[1])) for records in found.values())
    homes = collections.defaultdict(set)
    for split, records in found.items():
        for record in records:
            homes[record["inputs"]].add(split)
    assert all(len(home) == 1 for home in homes.values())
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(len(found[split]) / 3000 - share) < 5 * (share * (1 - share) / 1500) ** 0.5


def test_a_record_stays_in_its_split_when_records_are_added_or_files_are_cut_differently(tmp_path):
    rows = [(f"text {i}", "x") for i in range(400)]
    before = splits(config(write(tmp_path, rows)), tmp_path / "cache")
    (tmp_path / "b").mkdir()
    for number in range(2):
        write(tmp_path / "b", [*rows[number::2], (f"new {number}", "y")], f"{number}.tsv")
    after = splits(config(f"tsv:{tmp_path}/b/*.tsv"), tmp_path / "cache")
    for split in SPLITS:
        old = {record["inputs"] for record in before[split]}
        assert old == {record["inputs"] for record in after[split] if record["targets"] == "x"} and old


def test_slices_ids_and_copies(tmp_path, monkeypatch):
    name = write(tmp_path, [(f"text {i}", "x") for i in range(500)])
    whole = open_source(config(name), "train", tmp_path / "cache")
    monkeypatch.setattr(divided, "_write_splits", lambda *_: pytest.fail("divided twice"))
    halves = [open_source(config(name), f"train[{part}]", tmp_path / "cache") for part in (":50%", "50%:")]
    assert [half[i] for half in halves for i in range(len(half))] == whole.read(range(len(whole)))
    assert copy.deepcopy(halves[1]).read([3, 0]) == halves[1].read([3, 0])
    monkeypatch.undo()
    other = open_source(config(name, held_out=0.2), "train", tmp_path / "cache")
    assert len({source.content_id for source in (whole, *halves, other)}) == 4
    for index in (-1, len(whole)):
        with pytest.raises(IndexError):
            whole[index]


def test_splits_depend_on_the_text_that_a_model_reads(tmp_path):
    rows = [{"premise": f"p {i % 300}", "label": i % 2} for i in range(600)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "nonsense\n")
    made = (Template(inputs="{premise}?", targets="{label}", words={"0": "no", "1": "yes"}),)
    templated = SourceConfig(name=f"jsonl:{tmp_path}/a.jsonl", inputs=None, targets=None, templates=made, held_out=0.1)
    text = SourceConfig(name=templated.name, inputs=None, targets=None, text="premise", held_out=0.1)
    by_template, by_text = splits(templated, tmp_path / "cache"), splits(text, tmp_path / "cache")
    for split in ("validation", "test"):
        assert by_template[split]
        assert [r["inputs"] for r in by_template[split]] == [f"{r['text']}?" for r in by_text[split]]
    (problem,) = [record for record in by_text["train"] if isinstance(record, Problem)]
    assert problem.where.endswith("a.jsonl line 601")  # train alone reports it


def test_errors_name_the_nearest_choice(tmp_path):
    name = write(tmp_path, [("a", "b")])
    with pytest.raises(UserError, match="held_out makes no split 'valid'; did you mean 'validation'"):
        open_source(config(name), "valid", tmp_path / "cache")
    with pytest.raises(UserError, match="held_out=1e-05 of 1 records leaves split 'test' empty"):
        open_source(config(name, held_out=1e-5), "test", tmp_path / "cache")
    for wrong in (0, -0.1, 0.5, 2):
        with pytest.raises(UserError, match="held_out"):
            config(name, held_out=wrong)
    for wrong in ("tsv:a/{split}.tsv", "tfds:pydocs", "corpus:sst2"):
        with pytest.raises(UserError, match="held_out divides files without {split} in their path"):
            SourceConfig(name=wrong, inputs=None, targets=None, text="text", held_out=0.1)
