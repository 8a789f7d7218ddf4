"""Corpora on small files made here: each parser, slices and content ids, and errors."""

import copy
import gzip
import io
import json
import lzma
import re
import tarfile

import pytest

from common.data.corpora import by_name as corpora
from common.data.corpora import parsers as corpus_parsers
from common.data.corpora.by_name import CorpusSource, open_corpus
from common.data.corpora.table import CORPORA
from common.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of corpora, with an empty cache."""
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


def test_articles_are_cut_only_at_titles_and_nothing_is_lost(folder):
    dog = " \n = Dog = \n \n A dog . \n \n \n = = Legs = = \n \n It has \n = 4 = \n legs . \n = more \n"
    text = f"{dog} \n = A = B = \n \n x \n"
    (folder / "lm_small/wikitext2_test.raw.xz").write_bytes(lzma.compress(text.encode()))
    source = read("wikitext2", "test", text="text")
    assert "".join(source[i]["text"] for i in range(len(source))) == text
    assert [re.findall(r"\A ?\n = (\S+)", source[i]["text"]) for i in range(len(source))] == [["Dog"], ["A"]]


def test_speeches_are_joined_to_documents_and_split_in_order(folder, monkeypatch):
    speeches = [f"WHO{i}:\nWords {i}\nand more.\n\n" for i in range(205)]
    speeches[50] += "\n"
    monkeypatch.setattr(corpus_parsers, "SPEECHES_PER_DOCUMENT", 10)
    (folder / "lm_small/tinyshakespeare.txt.xz").write_bytes(lzma.compress("".join(speeches)[:-1].encode()))
    splits = {split: read("tinyshakespeare", split, text="text") for split in CORPORA["tinyshakespeare"].splits}
    documents = [source[i]["text"] for source in splits.values() for i in range(len(source))]
    assert [len(source) for source in splits.values()] == [19, 1, 1]
    assert "".join(documents) == "".join(speeches)[:-1] and documents[1] == "".join(speeches[10:20])


def test_questions_are_paired_with_their_paragraph(folder):
    asked = [{"id": str(i), "question": f"Q{i}?", "answers": [{"text": f"A{i}", "answer_start": 0}]} for i in range(3)]
    paragraphs = [{"context": "one", "qas": asked[:2]}, {"context": "two", "qas": asked[2:]}]
    text = json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}, indent=1).encode()
    (folder / "tasks/xquad.de.json.xz").write_bytes(lzma.compress(text))
    source = read("xquad/de", "validation", inputs="context", targets="answer", id="id")
    assert [source[i]["inputs"] + source[i]["targets"] for i in range(3)] == ["oneA0", "oneA1", "twoA2"]


def test_booleans_and_numbers_are_text_and_a_split_may_lack_a_field(folder):
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
def test_errors_name_the_nearest_choice(folder, name, split, field, words):
    pairs(folder)
    with pytest.raises(UserError) as error:
        read(name, split, text=field)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_folder_has_no_default(folder, monkeypatch):
    monkeypatch.delenv(corpora.FOLDER_VARIABLE)
    with pytest.raises(UserError, match=f"{corpora.FOLDER_VARIABLE} is not set"):
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
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,  # gzip's depend on the time
)
def test_errors_of_unreadable_files_name_them(folder, name, split, file, content, words):
    pairs(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read(name, split, text=CORPORA[name].fields[0])
    assert file in str(error.value) and "\n" not in str(error.value)


def test_every_corpus_has_its_metadata():
    known = CORPORA
    assert {"books", "t0", "cogs/variable_free", "listops/d20s", "xquad/ro", "hh/helpful_rejection_sampled"} <= set(
        known
    )
    assert len([name for name in known if name.startswith("scan/")]) == 8
    for corpus in known.values():
        assert corpus.splits and corpus.fields and corpus.origin and corpus.licence
