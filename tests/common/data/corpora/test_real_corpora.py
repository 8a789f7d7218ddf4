"""The real corpora, where their files are present: counts, and records that other tools read the same."""

import collections
import hashlib
import lzma

import pytest

from common.data.corpora.by_name import open_corpus
from common.data.corpora.table import CORPORA
from tests.common.data.corpora.shared_corpora import SHARED, real

COUNTS = {
    "books": {"train": 113, "validation": 3, "test": 5},
    "c4_sample": {"train": 1000, "validation": 200},
    "wikitext2": {"validation": 60, "test": 60},
    "lambada": {"test": 5153},
    "multi30k": {
        "train": 29000,
        "validation": 1014,
        "test_2016_flickr": 1000,
        "test_2017_flickr": 1000,
        "test_2017_mscoco": 461,
        "test_2018_flickr": 1071,
    },
    "scan/simple": {"train": 16728, "test": 4182},
    "scan/length": {"train": 16990, "test": 3920},
    "scan/addprim_jump": {"train": 14670, "test": 7706},
    "scan/addprim_turn_left": {"train": 21890, "test": 1208},
    "scan/template_jump_around_right": {"train": 18528, "test": 1173},
    "cogs": {"train": 24155, "validation": 3000, "test": 3000},
    "cogs/variable_free": {"train": 24155, "validation": 3000, "test": 3000, "generalization": 21000},
    "listops/d8": {"test": 10000},
    "listops/d20s": {"test": 10000},
    "gsm8k": {"train": 7473, "test": 1319},
    "rte": {"train": 2490, "validation": 277, "test": 3000},
    "sst2": {"train": 6920, "validation": 872, "test": 1821},
    "cola": {"train": 8551, "validation": 527, "validation_out_of_domain": 516},
    "boolq": {"validation": 3270},
    "xquad/en": {"validation": 1190},
    "xquad/de": {"validation": 1190},
    "xquad/ro": {"validation": 1190},
    "hh/helpful_base": {"test": 2354},
    "hh/helpful_online": {"test": 1137},
    "hh/helpful_rejection_sampled": {"test": 2749},
}


@real
@pytest.mark.parametrize("name", COUNTS)
def test_real_corpora_have_all_their_records(name):
    corpus = CORPORA[name]
    assert {split: len(open_corpus(name, split, {})) for split in corpus.splits} == COUNTS[name]
    for split in corpus.splits:
        fields = [field for field in corpus.fields if (name, split, field) != ("rte", "test", "label")]
        assert set(open_corpus(name, split, {field: field for field in fields})[0]) == set(fields)


@real
@pytest.mark.parametrize(
    ("name", "split", "line", "field", "size", "digest"),
    [
        ("multi30k", "train", 12346, "de", 72, "7b4b65025eea005d"),
        ("multi30k", "test_2018_flickr", 1071, "fr", 100, "d8c30216f7fcccbb"),
        ("books", "test", 2, "year", 4, "951f5c4814e4c649"),
        ("cogs/variable_free", "generalization", 21000, "targets", 42, "a2c3cd7602ff6ee8"),
        ("cogs", "validation", 1500, "inputs", 36, "ba91fc4a0e6fdb5a"),
        ("scan/addprim_jump", "test", 7706, "targets", 78, "68f5932af51d5dd8"),
        ("gsm8k", "test", 1000, "answer", 386, "8d50e271b31398c3"),
        ("cola", "validation_out_of_domain", 516, "sentence", 34, "48275f666c7c33d9"),
        ("xquad/ro", "validation", 778, "answer", 45, "df70d77d9f99420b"),
        ("xquad/de", "validation", 1190, "context", 556, "4aa682869557e597"),
        ("hh/helpful_online", "test", 1137, "rejected", 917, "a188edbef42f8635"),
        ("lambada", "test", 5000, "last_word", 5, "bcf95ea1f1de5fcc"),
        ("listops/d20s", "test", 4321, "inputs", 94, "434c7f5f7f0ae09a"),
        ("c4_sample", "validation", 150, "text", 447, "80b3d77c2fcf097a"),
    ],
)
def test_real_records_equal_those_that_shell_tools_print(name, split, line, field, size, digest):
    """Compares a line's length and hash with those that xzcat, tar, sed, cut and jq give."""
    text = open_corpus(name, split, {"text": field})[line - 1]["text"].encode()
    assert (len(text), hashlib.blake2b(text, digest_size=8).hexdigest()) == (size, digest)


@real
def test_real_documents_joined_are_their_files():
    for name, splits, file in [
        ("wikitext2", ["test"], "wikitext2_test.raw.xz"),
        ("tinyshakespeare", ["train", "validation", "test"], "tinyshakespeare.txt.xz"),
    ]:
        sources = [open_corpus(name, split, {"text": "text"}) for split in splits]
        text = "".join(source[i]["text"] for source in sources for i in range(len(source)))
        assert text.encode() == lzma.decompress((SHARED / "lm_small" / file).read_bytes())
    first = open_corpus("wikitext2", "test", {"text": "text"})[0]["text"]
    assert len(first.encode()) == 5668


@real
def test_real_labels_and_kinds():
    def count(name, split, field):
        source = open_corpus(name, split, {"text": field})
        return collections.Counter(source[i]["text"] for i in range(len(source)))

    assert count("boolq", "validation", "answer") == {"True": 2033, "False": 1237}
    assert count("rte", "train", "label") == {"entailment": 1249, "not_entailment": 1241}
    assert count("sst2", "validation", "label") == {"0": 428, "1": 444}
    kinds = count("cogs/variable_free", "generalization", "kind")
    assert len(kinds) == 21 and set(kinds.values()) == {1000}
