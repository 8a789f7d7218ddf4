"""The table of corpora: their files, the parser of each, and where they come from.

A file is named by its path in the corpora's folder; `archive!member` is a file inside a tar archive. `divide` makes the
splits of corpora that have none.
"""

import dataclasses
from collections.abc import Callable, Sequence

from common.data.corpora import parsers
from common.data.sources.records import Record

Parser = Callable[[Sequence[bytes], Sequence[str]], list[Record]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """One corpus: its files, and how to read them."""

    splits: dict[str, tuple[str, ...]]
    """Split -> its files, in order."""
    parse: Parser
    fields: tuple[str, ...]
    """The names of the parser's fields, in its order; a split may lack some."""
    origin: str
    licence: str
    divide: Callable[[Sequence[Record]], list[str]] | None = None
    """Returns the split of every record; for corpora whose splits are all in the same files."""


def divide_in_order(records: Sequence[Record]) -> list[str]:
    """Returns 90 % "train", then 5 % "validation" and 5 % "test", so that one long text is cut only twice.

    >>> [divide_in_order([{}] * 40).count(split) for split in ("train", "validation", "test")]
    [36, 2, 2]
    """
    held_out = round(0.05 * len(records))
    return ["train"] * (len(records) - 2 * held_out) + ["validation"] * held_out + ["test"] * held_out


def _by_source(records: Sequence[Record]) -> list[str]:
    from common.data.corpora.recurring import split_by_source  # imports SciPy, which no other corpus needs

    return split_by_source(records)


def _all_splits_in(file: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(("train", "validation", "test"), (file,))


def _one_file_each(**files: str) -> dict[str, tuple[str, ...]]:
    return {split: (file,) for split, file in files.items()}


SCAN_SPLITS = {
    "simple": "simple_split/tasks_{}_simple.txt",
    "length": "length_split/tasks_{}_length.txt",
    "addprim_jump": "add_prim_split/tasks_{}_addprim_jump.txt",
    "addprim_turn_left": "add_prim_split/tasks_{}_addprim_turn_left.txt",
    "template_around_right": "template_split/tasks_{}_template_around_right.txt",
    "template_jump_around_right": "template_split/tasks_{}_template_jump_around_right.txt",
    "template_opposite_right": "template_split/tasks_{}_template_opposite_right.txt",
    "template_right": "template_split/tasks_{}_template_right.txt",
}
COGS = "synthetic/cogs.tar.xz!cogs/"
LANGUAGES = ("en", "de", "fr")
MULTI30K = {"train": "train", "validation": "val"} | {
    name: name for name in ("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco", "test_2018_flickr")
}
HELPFUL = ("base", "online", "rejection-sampled")

CORPORA: dict[str, Corpus] = {
    "books": Corpus(
        splits={"train": tuple(f"lm_books/train-{shard:02}.jsonl.bz2" for shard in range(5))}
        | _one_file_each(validation="lm_books/valid.jsonl.bz2", test="lm_books/test.jsonl.bz2"),
        parse=parsers.json_lines,
        fields=("text", "author", "title", "year"),
        origin="mlschmitt/classic-books-markdown",
        licence="all titles from the public domain",
    ),
    "c4_sample": Corpus(
        splits=_one_file_each(train="lm_small/c4_train_min.jsonl.xz", validation="lm_small/c4_validation_min.jsonl.xz"),
        parse=parsers.json_lines,
        fields=("text",),
        origin="MaxText's test assets",
        licence="unstated",
    ),
    "wikitext2": Corpus(
        splits=_one_file_each(validation="lm_small/wikitext2_valid.raw.xz", test="lm_small/wikitext2_test.raw.xz"),
        parse=parsers.articles,
        fields=("text",),
        origin="WikiText-2 raw, from OpenNMT-py",
        licence="unstated",
    ),
    "tinyshakespeare": Corpus(
        splits=_all_splits_in("lm_small/tinyshakespeare.txt.xz"),
        parse=parsers.speeches,
        fields=("text",),
        origin="char-rnn",
        licence="unstated",
        divide=divide_in_order,
    ),
    "lambada": Corpus(
        splits=_one_file_each(test="lm_small/lambada_test.jsonl.xz"),
        parse=parsers.last_words,
        fields=("text", "context", "last_word"),
        origin="the inverse-scaling pipeline",
        licence="unstated",
    ),
    "multi30k": Corpus(
        splits={
            split: tuple(f"mt_multi30k/{file}.{language}.gz" for language in LANGUAGES)
            for split, file in MULTI30K.items()
        },
        parse=parsers.parallel,
        fields=LANGUAGES,
        origin="multi30k/dataset",
        licence="unstated",
    ),
    "cogs": Corpus(
        splits=_one_file_each(train=f"{COGS}train.tsv", validation=f"{COGS}dev.tsv", test=f"{COGS}test.tsv"),
        parse=parsers.columns,
        fields=("inputs", "targets", "kind"),
        origin="COGS, from COGS/ReCOGS; the files lack its generalization split",
        licence="MIT",
    ),
    "cogs/variable_free": Corpus(
        splits=_one_file_each(
            train=f"{COGS}variable_free/train.tsv",
            validation=f"{COGS}variable_free/dev.tsv",
            test=f"{COGS}variable_free/test.tsv",
            generalization=f"{COGS}variable_free/gen.tsv",
        ),
        parse=parsers.columns,
        fields=("inputs", "targets", "kind"),
        origin="COGS with variable-free forms, from COGS/ReCOGS",
        licence="MIT",
    ),
    "gsm8k": Corpus(
        splits=_one_file_each(train="tasks/gsm8k.train.jsonl.xz", test="tasks/gsm8k.test.jsonl.xz"),
        parse=parsers.json_lines,
        fields=("question", "answer"),
        origin="GSM8K",
        licence="MIT",
    ),
    "rte": Corpus(
        splits=_one_file_each(
            train="tasks/rte.train.jsonl.xz", validation="tasks/rte.val.jsonl.xz", test="tasks/rte.test.jsonl.xz"
        ),
        parse=parsers.json_lines,
        fields=("premise", "hypothesis", "label", "idx"),
        origin="SuperGLUE's RTE; its test split has no labels",
        licence="unstated",
    ),
    "sst2": Corpus(
        splits=_one_file_each(
            train="tasks/sst2.train.tsv.xz", validation="tasks/sst2.dev.tsv.xz", test="tasks/sst2.test.tsv.xz"
        ),
        parse=parsers.columns,
        fields=("sentence", "label"),
        origin="SST-2, whole sentences only",
        licence="unstated",
    ),
    "cola": Corpus(
        splits=_one_file_each(
            train="tasks/cola.in_domain_train.tsv.xz",
            validation="tasks/cola.in_domain_dev.tsv.xz",
            validation_out_of_domain="tasks/cola.out_of_domain_dev.tsv.xz",
        ),
        parse=parsers.columns,
        fields=("source", "label", "mark", "sentence"),
        origin="CoLA",
        licence="unstated",
    ),
    "boolq": Corpus(
        splits=_one_file_each(validation="tasks/boolq.dev.jsonl.xz"),
        parse=parsers.json_lines,
        fields=("passage", "question", "answer", "title"),
        origin="BoolQ",
        licence="unstated",
    ),
    "t0": Corpus(
        splits=_all_splits_in("tasks/t0_p3_50k.jsonl.xz"),
        parse=parsers.json_lines,
        fields=("inputs", "targets", "template"),
        origin="T0's training mixture, from P3",
        licence="unstated",
        divide=_by_source,
    ),
}
CORPORA |= {
    f"scan/{name}": Corpus(
        splits={split: (f"synthetic/scan.tar.xz!scan/{file.format(split)}",) for split in ("train", "test")},
        parse=parsers.commands,
        fields=("inputs", "targets"),
        origin="SCAN",
        licence="BSD",
    )
    for name, file in SCAN_SPLITS.items()
}
CORPORA |= {
    f"listops/{name}": Corpus(
        splits=_one_file_each(test=f"synthetic/listops_test_{name}.tsv.xz"),
        parse=parsers.columns,
        fields=("targets", "inputs"),
        origin="ListOps, from spinn",
        licence="unstated",
    )
    for name in ("d8", "d20s")
}
CORPORA |= {
    f"xquad/{language}": Corpus(
        splits=_one_file_each(validation=f"tasks/xquad.{language}.json.xz"),
        parse=parsers.questions,
        fields=("context", "question", "answer", "id"),
        origin="XQuAD",
        licence="CC BY-SA 4.0",
    )
    for language in ("en", "de", "ro")
}
CORPORA |= {
    f"hh/helpful_{kind.replace('-', '_')}": Corpus(
        splits=_one_file_each(test=f"preference/hh-rlhf.helpful-{kind}.test.jsonl.xz"),
        parse=parsers.json_lines,
        fields=("chosen", "rejected"),
        origin="HH-RLHF",
        licence="MIT",
    )
    for kind in HELPFUL
}
