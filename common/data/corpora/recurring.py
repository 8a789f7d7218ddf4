"""Splits rows that several templates made from the same source texts, so that no source text is in two splits.

A multitask mixture renders every source example of a data set once with each of its templates, and does not record
which rows come from the same example. This module recovers that: it matches the rows of two templates of one data set
one to one, such that matched rows share as many rare words and word pairs as possible. Rows that share a long sentence
(a passage with several questions) are in one group too, across data sets.

"Rows" are records {"template", "inputs", "targets"} throughout; a row's number is its index.
"""

import collections
import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from common.data.built_in.shares import split_by_hash
from common.data.sources.records import Record

DATA_SETS = """
adversarial_qa_dbert adversarial_qa_dbidaf adversarial_qa_droberta ag_news amazon_polarity app_reviews cnn_dailymail
common_gen commonsense_qa cosmos_qa dbpedia_14 dream duorc_ParaphraseRC duorc_SelfRC gigaword glue_mrpc glue_qqp imdb
kilt_tasks multi_news paws qasc quarel quartz quoref ropes rotten_tomatoes samsum sciq social_i_qa trec wiki_bio
wiki_hop wiki_qa wiqa xsum yelp_review_full
""".split()
"""Data sets of the mixture; a template's name begins with its data set's."""
LONG_SENTENCE = 50
"""In characters; two texts may share shorter sentences by chance."""
BOILERPLATE = 0.5
"""A sentence in a larger share of a template's rows belongs to the template..."""
FEW = 10
"""...if more than this many rows have it."""
RARENESS = ((0.02, 4), (0.05, 2), (0.1, 1))
"""(share, weight): a word in at most this share of every template's rows has this weight in a match."""
LARGEST_HELD_OUT = 0.01
"""Share of all rows above which a group stays in train: facts that recur through a whole data set make large groups,
one of which would fill validation or test."""


def split_by_source(rows: Sequence[Record]) -> list[str]:
    """Returns the split of every row: by a hash of its group's first text, or "train" for a very large group."""
    groups = source_groups(rows)
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    splits = [
        "train" if size > max(LARGEST_HELD_OUT * len(rows), 1) else split_by_hash(_all_text(rows[row]))
        for row, size in zip(first, sizes, strict=True)
    ]
    return [splits[group] for group in groups]


def source_groups(rows: Sequence[Record]) -> np.ndarray:
    """Returns int [rows]: the number of each row's group, from 0 without gaps."""
    links = _shared_sentences(rows)
    texts = [_all_text(row) for row in rows]
    for members in _by_data_set(rows).values():
        # The template with the most rows has every source example; among equals, take the one with the longest texts.
        reference = max(members.values(), key=lambda rows: (len(rows), sum(len(texts[row]) for row in rows)))
        links += _matches(list(members.values()), reference, texts)
    ends = np.array(links, np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(rows), len(rows)))
    return connected_components(graph, directed=False)[1]


def _all_text(row: Record) -> str:
    return row["inputs"] + "\n" + row["targets"]


def _by_data_set(rows: Sequence[Record]) -> Mapping[str, dict[str, list[int]]]:
    """Returns data set -> template -> numbers of its rows. A template of no known data set is a data set by itself."""
    found: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for number, row in enumerate(rows):
        template = row["template"]
        name = max((name for name in DATA_SETS if template.startswith(f"{name}_")), key=len, default=template)
        found[name][template].append(number)
    return found


def _matches(members: list[list[int]], reference: list[int], texts: Sequence[str]) -> list[tuple[int, int]]:
    """Returns pairs (row, matching row of the reference), for the rows of each template in `members`.

    Args:
      members: row numbers of each template of one data set.
      reference: the entry of `members` that the others are matched with.
      texts: the texts of all rows.
    """
    places = {row: place for place, row in enumerate(row for rows in members for row in rows)}
    table = _word_table([texts[row] for row in places])
    tables = [table[[places[row] for row in rows]] for rows in members]
    shares = np.max([np.asarray(part.sum(axis=0)).ravel() / max(part.shape[0], 50) for part in tables], axis=0)
    weights = np.select([shares <= bound for bound, _ in RARENESS], [weight for _, weight in RARENESS], 0)
    shown = table[[places[row] for row in reference]].multiply(weights.astype(np.int32)).T.tocsr()
    pairs = []
    for rows, part in zip(members, tables, strict=True):
        # Scores are integers, so the matching is the same on every machine.
        for mine, theirs in zip(*linear_sum_assignment((part @ shown).toarray(), maximize=True), strict=True):
            pairs.append((rows[mine], reference[theirs]))
    return pairs


def _word_table(texts: Sequence[str]) -> csr_matrix:
    """Returns int32 [texts, words + word pairs]: 1 if the text has the word, or the two words in a row."""
    ids: dict[str, int] = collections.defaultdict(lambda: len(ids))
    found = [np.array([ids[word] for word in re.findall(r"\w+", text.lower())], np.int64) for text in texts]
    words, text_of = np.concatenate(found), np.repeat(np.arange(len(texts)), [len(row) for row in found])
    inside = text_of[1:] == text_of[:-1]
    distinct, pairs = np.unique((words[:-1] * len(ids) + words[1:])[inside], return_inverse=True)
    columns = np.concatenate([words, len(ids) + pairs])
    rows = np.concatenate([text_of, text_of[1:][inside]])
    shape = (len(texts), len(ids) + len(distinct))
    table = csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=shape)
    table.data[:] = 1
    return table


def _shared_sentences(rows: Sequence[Record]) -> list[tuple[int, int]]:
    """Returns pairs of rows with equal inputs or a common long sentence, unless the sentence belongs to a template."""
    pieces = [{row["inputs"].strip().lower(), *_long_sentences(_all_text(row))} for row in rows]
    sizes = collections.Counter(row["template"] for row in rows)
    uses = collections.Counter(
        (row["template"], piece) for row, found in zip(rows, pieces, strict=True) for piece in found
    )
    boilerplate = {
        piece for (template, piece), count in uses.items() if count > max(BOILERPLATE * sizes[template], FEW)
    }
    first: dict[str, int] = {}
    return [(first.setdefault(piece, row), row) for row, found in enumerate(pieces) for piece in found - boilerplate]


def _long_sentences(text: str) -> set[str]:
    """Returns the lower-cased sentences and lines of at least `LONG_SENTENCE` characters."""
    return {piece.strip() for piece in re.split(r"[.!?]\s|\n", text.lower()) if len(piece) >= LONG_SENTENCE}
