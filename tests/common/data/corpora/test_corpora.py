"""Corpora: parsers on small files of our own, mistakes named, and the real files where they are."""

import collections
import copy
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
from pathlib import Path

import pytest

from common.data.corpora import by_name as corpora
from common.data.corpora import parsers as corpus_parsers
from common.data.corpora.by_name import CorpusSource, open_corpus
from common.data.corpora.recurring import source_groups, split_by_source
from common.data.corpora.table import CORPORA
from common.errors import UserError

SHARED = Path(os.environ.get(corpora.FOLDER_VARIABLE) or Path(__file__).parents[3] / "../shared/data")
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent: set {corpora.FOLDER_VARIABLE}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of corpora, and a cache of its own."""
    monkeypatch.setenv(corpora.FOLDER_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "cache"))
    for inside in ("lm_small", "mt_multi30k", "synthetic", "tasks"):
        (tmp_path / "data" / inside).mkdir(parents=True)
    return tmp_path / "data"


def pairs(folder, english=b"a dog\na cat\n\xe2\x80\xa8odd\n", french=b"un chien\nun chat\n\n"):
    for language, text in (("en", english), ("de", b"Hund\nKatze\nx"), ("fr", french)):
        (folder / f"mt_multi30k/val.{language}.gz").write_bytes(gzip.compress(text))


def read(name, split, **fields) -> CorpusSource:
    return open_corpus(name, split, fields)


def test_lines_of_several_files_are_joined_in_order_and_only_newlines_end_them(folder):
    pairs(folder)
    source = read("multi30k", "validation", inputs="en", targets="fr")
    assert [source[i] for i in range(3)] == [
        {"inputs": "a dog", "targets": "un chien"},
        {"inputs": "a cat", "targets": "un chat"},
        {"inputs": "\u2028odd", "targets": ""},
    ]
    assert source.read([2, 0]) == [source[2], source[0]] and source.read([]) == []
    assert read("multi30k", "validation[1:]", text="de").read([0, 1]) == [{"text": "Katze"}, {"text": "x"}]
    assert len(read("multi30k", "validation[:50%]", text="de")) == 2
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]
    assert copy.deepcopy(source).read(range(3)) == source.read(range(3))  # as a worker gets it


def test_the_content_id_follows_bytes_split_and_fields(folder):
    pairs(folder)
    ids = {
        read("multi30k", "validation", inputs="en", targets="de").content_id,
        read("multi30k", "validation", inputs="de", targets="en").content_id,
        read("multi30k", "validation[:2]", inputs="en", targets="de").content_id,
    }
    assert read("multi30k", "validation", inputs="en", targets="de", group="fr").content_id in ids
    assert len(ids) == 3
    pairs(folder, english=b"a dog\na cat\n an odd\n")
    changed = read("multi30k", "validation", inputs="en", targets="de")
    assert changed.content_id not in ids and changed[2]["inputs"] == " an odd"


def test_files_in_an_archive_are_read_in_place(folder):
    lines = {"train": b"IN: jump OUT: I_JUMP\n", "test": b"IN: jump twice OUT: I_JUMP I_JUMP\nIN: run OUT: I_RUN\n"}
    with tarfile.open(folder / "synthetic/scan.tar.xz", "w:xz") as archive:
        for split, text in lines.items():
            member = tarfile.TarInfo(f"scan/simple_split/tasks_{split}_simple.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    source = read("scan/simple", "test", inputs="inputs", targets="targets")
    assert source.read([0, 1])[0] == {"inputs": "jump twice", "targets": "I_JUMP I_JUMP"} and len(source) == 2
    assert read("scan/simple", "train", text="targets")[0] == {"text": "I_JUMP"}
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["scan.tar.xz"]
    with pytest.raises(UserError, match=r"scan.tar.xz cannot be unpacked.*tasks_test_length"):
        read("scan/length", "test", text="inputs")


def test_articles_are_cut_at_titles_alone_and_nothing_is_lost(folder):
    dog = " \n = Dog = \n \n A dog . \n \n \n = = Legs = = \n \n It has \n = 4 = \n legs . \n = more \n"
    text = f"{dog} \n = A = B = \n \n x \n"
    (folder / "lm_small/wikitext2_test.raw.xz").write_bytes(lzma.compress(text.encode()))
    source = read("wikitext2", "test", text="text")
    assert "".join(source[i]["text"] for i in range(len(source))) == text
    assert [re.findall(r"\A ?\n = (\S+)", source[i]["text"]) for i in range(len(source))] == [["Dog"], ["A"]]


def test_speeches_are_gathered_and_split_in_order(folder, monkeypatch):
    speeches = [f"WHO{i}:\nWords {i}\nand more.\n\n" for i in range(205)]
    speeches[50] += "\n"
    monkeypatch.setattr(corpus_parsers, "SPEECHES_A_DOCUMENT", 10)
    (folder / "lm_small/tinyshakespeare.txt.xz").write_bytes(lzma.compress("".join(speeches)[:-1].encode()))
    splits = {split: read("tinyshakespeare", split, text="text") for split in CORPORA["tinyshakespeare"].splits}
    documents = [source[i]["text"] for source in splits.values() for i in range(len(source))]
    assert [len(source) for source in splits.values()] == [19, 1, 1]
    assert "".join(documents) == "".join(speeches)[:-1] and documents[1] == "".join(speeches[10:20])


def test_questions_stand_beside_their_paragraph(folder):
    asked = [{"id": str(i), "question": f"Q{i}?", "answers": [{"text": f"A{i}", "answer_start": 0}]} for i in range(3)]
    paragraphs = [{"context": "one", "qas": asked[:2]}, {"context": "two", "qas": asked[2:]}]
    text = json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}, indent=1).encode()
    (folder / "tasks/xquad.de.json.xz").write_bytes(lzma.compress(text))
    source = read("xquad/de", "validation", inputs="context", targets="answer", id="id")
    assert [source[i]["inputs"] + source[i]["targets"] for i in range(3)] == ["oneA0", "oneA1", "twoA2"]


def test_truth_values_and_numbers_are_text_and_a_split_may_lack_a_field(folder):
    (folder / "tasks/rte.test.jsonl.xz").write_bytes(lzma.compress(b'{"premise": "a", "hypothesis": "b", "idx": 7}'))
    assert read("rte", "test", inputs="premise", targets="idx")[0] == {"inputs": "a", "targets": "7"}
    with pytest.raises(UserError, match="source.targets: corpus:rte test has no field 'label'; valid: hyp"):
        read("rte", "test", inputs="premise", targets="label")


@pytest.mark.parametrize(
    ("name", "split", "field", "words"),
    [
        ("multi3k", "train", "en", ("corpus:multi3k", "did you mean 'multi30k'", "scan/length")),
        ("multi30k", "valid", "en", ("no split 'valid'", "did you mean 'validation'", "test_2017_mscoco")),
        ("multi30k", "validation", "eng", ("source.text", "'eng'", "did you mean 'en'")),
        ("multi30k", "validation[x]", "en", ("'validation[x]'", "slice")),
        ("multi30k", "train", "en", ("train.en.gz", corpora.FOLDER_VARIABLE)),
        ("gsm8k", "test", "question", ("gsm8k.test.jsonl.xz", corpora.FOLDER_VARIABLE)),
    ],
)
def test_mistakes_are_named(folder, name, split, field, words):
    pairs(folder)
    with pytest.raises(UserError) as error:
        read(name, split, text=field)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_folder_has_no_default(folder, monkeypatch):
    monkeypatch.delenv(corpora.FOLDER_VARIABLE)
    with pytest.raises(UserError, match=f"{corpora.FOLDER_VARIABLE} names, which is not set"):
        read("multi30k", "validation", text="en")


@pytest.mark.parametrize(
    ("name", "split", "file", "content", "words"),
    [
        ("sst2", "test", "tasks/sst2.test.tsv.xz", lzma.compress(b"a\t1\nb\n"), "line 2 has 1 columns, not 2"),
        ("sst2", "test", "tasks/sst2.test.tsv.xz", lzma.compress(b"\xff\t1\n"), "utf-8"),
        ("sst2", "test", "tasks/sst2.test.tsv.xz", b"a\t1\n", "cannot be unpacked"),
        ("sst2", "test", "tasks/sst2.test.tsv.xz", lzma.compress(b"a\t1\n" * 99)[:-9], "cannot be unpacked"),
        ("gsm8k", "test", "tasks/gsm8k.test.jsonl.xz", lzma.compress(b'{"question"'), "line 1 is not JSON"),
        ("gsm8k", "test", "tasks/gsm8k.test.jsonl.xz", lzma.compress(b"[1]"), "line 1 is not a JSON object"),
        (
            "gsm8k",
            "test",
            "tasks/gsm8k.test.jsonl.xz",
            lzma.compress(b'{"question": "a", "answer": "b"}\n{"question": "a"}'),
            "some records lack one of question, answer",
        ),
        ("gsm8k", "test", "tasks/gsm8k.test.jsonl.xz", lzma.compress(b'{"question": null}'), "not NoneType"),
        ("xquad/en", "validation", "tasks/xquad.en.json.xz", lzma.compress(b'{"dat": []}'), "SQuAD.*data"),
        ("multi30k", "validation", "mt_multi30k/val.fr.gz", gzip.compress(b"one\n"), "3, 3, 1 lines"),
        ("multi30k", "validation", "mt_multi30k/val.fr.gz", gzip.compress(b"one\n" * 9)[:-3], "cannot be unpacked"),
        ("scan/simple", "test", "synthetic/scan.tar.xz", lzma.compress(b"no archive"), "cannot be unpacked"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,  # gzip's tell the time
)
def test_files_that_cannot_be_read_are_named(folder, name, split, file, content, words):
    pairs(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read(name, split, text=CORPORA[name].fields[0])
    assert file in str(error.value) and "\n" not in str(error.value)


def rendered(data_set: str, passages: list[str], shuffle: int = 0) -> list[dict[str, str]]:
    """Rows of two templates; the second asks about its passages in another order."""
    rows = [
        {"template": f"{data_set}_a", "inputs": f"Read this text and say what it is: {p}", "targets": p[:3]}
        for p in passages
    ]
    turned = passages[shuffle:] + passages[:shuffle]
    return rows + [
        {"template": f"{data_set}_b", "inputs": f"Which text begins so? {p[:3]}", "targets": p} for p in turned
    ]


def test_rows_of_one_source_are_found_again():
    passages = [f"{i:03} word{i} thing{i} and what all have" for i in range(60)]
    rows = rendered("imdb", passages, shuffle=17)
    groups = source_groups(rows)
    assert len(set(groups.tolist())) == 60
    number = [re.search(r"\d{3} word", row["inputs"] + row["targets"])[0] for row in rows]  # type: ignore[index]
    assert len(set(zip(groups.tolist(), number, strict=True))) == 60


def test_a_shared_passage_joins_sources_across_data_sets_and_a_templates_own_words_do_not():
    long = "this passage is long enough that nobody would write it twice by chance"
    rows = rendered("imdb", [f"{i:03} word{i} here" for i in range(20)]) + rendered("xsum", ["q1 x", "q2 y"])
    rows[3]["inputs"] += f"\n{long}"
    rows[-1]["inputs"] += f"\n{long.upper()}"
    for row in rows[:20]:
        row["inputs"] += "\nThe template itself says this long sentence in every single row of it"
    groups = source_groups(rows)
    assert groups[3] == groups[-1] and len(set(groups.tolist())) == 21
    assert len(set(split_by_source([row for row, group in zip(rows, groups, strict=True) if group == groups[3]]))) == 1


def test_every_corpus_says_what_it_has():
    known = corpora.corpora()
    assert {"books", "t0", "cogs/variable_free", "listops/d20s", "xquad/ro", "hh/helpful_rejection_sampled"} <= set(
        known
    )
    assert len([name for name in known if name.startswith("scan/")]) == 8
    for corpus in known.values():
        assert corpus.splits and corpus.fields and corpus.origin and corpus.licence


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
def test_real_records_are_those_that_a_shell_finds(name, split, line, field, size, digest):
    """Bytes and hash of a line as xzcat, tar, sed, cut and jq give it."""
    text = open_corpus(name, split, {"text": field})[line - 1]["text"].encode()
    assert (len(text), hashlib.blake2b(text, digest_size=8).hexdigest()) == (size, digest)


@real
def test_real_documents_are_their_files():
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
def test_a_question_is_in_one_split_whichever_template_asks_about_it(t0):
    """Two of the templates show the question between words of their own, so that it can be cut out."""
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
