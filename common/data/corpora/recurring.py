"""Splits records that several templates made from the same source texts, so that no source text is in two splits.

A multitask mixture renders every source example of a data set once with each of its templates, but does not store
which records come from the same example. This module recovers that: it matches the records of two templates of one
data set one to one, such that matched records share as many rare words and word pairs as possible. Records that share
a long sentence (a passage with several questions) are in one group too, across data sets.

Records are {"template", "inputs", "targets"}. Groups and matches refer to them by index.
"""

import collections
import itertools
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
"""A sentence is the template's own wording if more than this share of its records, and more than `FEW`, have it."""
FEW = 10
"""See `BOILERPLATE`."""
RARENESS = ((0.02, 4), (0.05, 2), (0.1, 1))
"""(share, weight): a word found in at most this share of each template's records has this weight in a match; more
frequent words have none. The first line that applies counts."""
LARGEST_HELD_OUT = 0.01
"""Share of all records above which a group stays in train: facts that recur through a whole data set make large groups,
one of which would fill validation or test."""


def split_by_source(records: Sequence[Record]) -> list[str]:
    """Returns the split of every record: by a hash of its group's first text, or "train" for a very large group."""
    groups = source_groups(records)
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    splits = [
        "train" if size > max(LARGEST_HELD_OUT * len(records), 1) else split_by_hash(_all_text(records[index]))
        for index, size in zip(first, sizes, strict=True)
    ]
    return [splits[group] for group in groups]


def source_groups(records: Sequence[Record]) -> np.ndarray:
    """Returns int [records]: the number of each record's group, from 0 without gaps."""
    links = _shared_sentences(records)
    texts = [_all_text(record) for record in records]
    for members in _by_data_set(records).values():
        # The template with the most records has every source example; of several, take the one with the longest texts.
        reference = max(members.values(), key=lambda indices: (len(indices), sum(len(texts[i]) for i in indices)))
        links += _match_templates(list(members.values()), reference, texts)
    ends = np.array(links, np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(records), len(records)))
    return connected_components(graph, directed=False)[1]


def _all_text(record: Record) -> str:
    return record["inputs"] + "\n" + record["targets"]


def _by_data_set(records: Sequence[Record]) -> Mapping[str, dict[str, list[int]]]:
    """Returns data set -> template -> indices of its records. A template of no known data set counts as one itself."""
    found: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for index, record in enumerate(records):
        template = record["template"]
        name = max((name for name in DATA_SETS if template.startswith(f"{name}_")), key=len, default=template)
        found[name][template].append(index)
    return found


def _match_templates(members: list[list[int]], reference: list[int], texts: Sequence[str]) -> list[tuple[int, int]]:
    """Returns pairs (index of a record, index of its match in the reference), for all templates of one data set.

    Args:
      members: for each template, the indices of its records.
      reference: the entry of `members` that all are matched with.
      texts: the texts of all records.
    """
    table_row = {index: row for row, index in enumerate(itertools.chain.from_iterable(members))}
    table = _word_table([texts[index] for index in table_row])
    tables = [table[[table_row[index] for index in indices]] for indices in members]
    # A word's weight follows from its largest share of a template's records. Templates with few records count as having
    # 50, since a share of few records means little.
    shares = np.max([np.asarray(part.sum(axis=0)).ravel() / max(part.shape[0], 50) for part in tables], axis=0)
    weights = np.select([shares <= bound for bound, _ in RARENESS], [weight for _, weight in RARENESS], 0)
    weighted = table[[table_row[index] for index in reference]].multiply(weights.astype(np.int32)).T.tocsr()
    pairs = []
    for indices, part in zip(members, tables, strict=True):
        # Two records score the summed weights of the words that they share. Scores are integers, so the matching is the
        # same on every machine.
        for mine, theirs in zip(*linear_sum_assignment((part @ weighted).toarray(), maximize=True), strict=True):
            pairs.append((indices[mine], reference[theirs]))
    return pairs


def _word_table(texts: Sequence[str]) -> csr_matrix:
    """Returns int32 [texts, words + word pairs]: 1 if the text has the word, or the two words in succession."""
    ids: dict[str, int] = collections.defaultdict(lambda: len(ids))
    found = [np.array([ids[word] for word in re.findall(r"\w+", text.lower())], np.int64) for text in texts]
    words, text_of = np.concatenate(found), np.repeat(np.arange(len(texts)), [len(text_ids) for text_ids in found])
    inside = text_of[1:] == text_of[:-1]
    distinct, pairs = np.unique((words[:-1] * len(ids) + words[1:])[inside], return_inverse=True)
    columns = np.concatenate([words, len(ids) + pairs])
    rows = np.concatenate([text_of, text_of[1:][inside]])
    shape = (len(texts), len(ids) + len(distinct))
    table = csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=shape)
    table.data[:] = 1
    return table


def _shared_sentences(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Returns pairs of records with equal inputs, or with a common long sentence that does not belong to a template."""
    pieces = [{record["inputs"].strip().lower(), *_long_sentences(_all_text(record))} for record in records]
    sizes = collections.Counter(record["template"] for record in records)
    uses = collections.Counter(
        (record["template"], piece) for record, found in zip(records, pieces, strict=True) for piece in found
    )
    boilerplate = {
        piece for (template, piece), count in uses.items() if count > max(BOILERPLATE * sizes[template], FEW)
    }
    first: dict[str, int] = {}
    return [
        (first.setdefault(piece, index), index) for index, found in enumerate(pieces) for piece in found - boilerplate
    ]


def _long_sentences(text: str) -> set[str]:
    """Returns the lower-cased sentences and lines of at least `LONG_SENTENCE` characters."""
    return {piece.strip() for piece in re.split(r"[.!?]\s|\n", text.lower()) if len(piece) >= LONG_SENTENCE}
