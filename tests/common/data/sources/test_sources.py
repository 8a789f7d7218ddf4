"""Local files as sources: records by number, slices, splits, content ids, and errors that name file and line."""

import copy
import gzip
import json

import pytest
import tensorflow_datasets as tfds

from common.data.sources.by_name import open_fields, open_source
from common.data.sources.config import SourceConfig
from common.data.sources.files import parse_split, slice_bounds
from common.errors import UserError

ROWS = [
    ("one", "eins"),
    ("", "leer"),
    ("naïve “x”", "größer\\t"),
    ("three words here", "日本語 ok"),
    ("", ""),
    ("5", "fünf"),
]


def write(folder, scheme, rows=ROWS, ending="\n", last="\n", name="data") -> str:
    if scheme == "jsonl":
        lines = [json.dumps({"de": de, "en": en}, ensure_ascii=False) for en, de in rows]
    elif scheme == "tsv":
        lines = ["en\tother\tde", *(f"{en}\tx\t{de}" for en, de in rows)]
    else:
        lines = [en for en, _ in rows]
    path = folder / f"{name}.{scheme}"
    path.write_bytes((ending.join(lines) + last).encode())
    return f"{scheme}:{path}"


def config(name: str, **fields) -> SourceConfig:
    if name.startswith("text:"):
        return SourceConfig(name=name, inputs=None, targets=None, **{"text": "text"} | fields)
    return SourceConfig(name=name, **{"inputs": "en", "targets": "de"} | fields)


def expected(scheme: str, rows=ROWS) -> list[dict]:
    return [{"text": en} if scheme == "text" else {"inputs": en, "targets": de} for en, de in rows]


@pytest.mark.parametrize("scheme", ["jsonl", "tsv", "text"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_records_of_local_files_are_read_in_any_order(tmp_path, scheme, ending, last):
    name = write(tmp_path, scheme, ending=ending, last=ending if last else "")
    source = open_source(config(name), "train", tmp_path)
    assert len(source) == len(ROWS)
    assert [source[i] for i in range(len(source))] == expected(scheme)
    order = [3, 0, 5, 3]
    assert source.read(order) == [expected(scheme)[i] for i in order]
    assert copy.deepcopy(source)[3] == expected(scheme)[3]  # as a worker gets it: by state, not by open file
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_a_table_without_a_header_has_columns_by_number(tmp_path, ending):
    path = tmp_path / "a.tsv"
    path.write_bytes((("\ufeff" + "\n".join(f"{en}\t{de}" for en, de in ROWS)) + ending).encode())
    source = open_source(config(f"tsv:{path}", inputs=1, targets=2), "train", tmp_path / "cache")
    assert source.read(range(len(source))) == expected("tsv")
    assert source.content_id != open_fields(f"tsv:{path}", {"inputs": "one"}, "train", tmp_path).content_id
    with pytest.raises(
        UserError, match="no field 'en'.*the first line names the columns; if it does not, give their numbers"
    ):
        open_source(config(f"tsv:{path}"), "train", tmp_path / "cache")
    with pytest.raises(UserError, match="no field '3'.*valid: 1, 2"):
        open_source(config(f"tsv:{path}", inputs=3, targets=2), "train", tmp_path / "cache")
    path.write_bytes(b"\xff\tb\nc\td\te\nf\tg\n")
    bad = open_source(config(f"tsv:{path}", inputs=1, targets=2), "train", tmp_path / "cache")
    problems = bad.read(range(3))
    assert "line 1: byte 1 is not UTF-8" in str(problems[0])
    assert "line 2: 3 cells, but the first line has 2 columns" in str(problems[1])
    assert problems[2] == {"inputs": "f", "targets": "g"}
    path.write_bytes(b"")
    assert len(open_source(config(f"tsv:{path}", inputs=1, targets=2), "train", tmp_path)) == 0
    for name, fields in (("jsonl:a", {"inputs": 1, "targets": 2}), ("tsv:a", {"inputs": 1}), ("tsv:a", {"group": 3})):
        with pytest.raises(UserError, match="column numbers are for tsv files without a header"):
            config(name, **fields)
    with pytest.raises(UserError, match="inputs is 0: it must be 1 or more"):
        config("tsv:a", inputs=0, targets=1)


@pytest.mark.parametrize("scheme", ["jsonl", "tsv", "text"])
def test_a_byte_order_mark_is_not_text(tmp_path, scheme):
    path = write(tmp_path, scheme).split(":", 1)[1]
    with open(path, "rb") as file:
        text = file.read()
    with open(path, "wb") as file:
        file.write(b"\xef\xbb\xbf" + text)
    assert open_source(config(f"{scheme}:{path}"), "train", tmp_path)[0] == expected(scheme)[0]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_index_does_not_depend_on_the_size_of_reads(tmp_path, monkeypatch, chunk):
    whole = open_source(config(write(tmp_path, "jsonl")), "train", tmp_path)
    monkeypatch.setattr("common.data.sources.line_files.CHUNK_BYTES", chunk)
    again = open_source(config(f"jsonl:{tmp_path}/data.jsonl"), "train", tmp_path / "another cache")
    assert again.read(range(len(again))) == whole.read(range(len(whole))) == expected("jsonl")
    assert again.content_id == whole.content_id


@pytest.mark.parametrize("scheme", ["jsonl", "tsv", "text"])
def test_gzip_is_unpacked_once(tmp_path, scheme, monkeypatch):
    plain = write(tmp_path, scheme).split(":", 1)[1]
    with open(plain, "rb") as file, gzip.open(f"{plain}.gz", "wb") as packed:
        packed.write(file.read())
    source = open_source(config(f"{scheme}:{plain}.gz"), "train", tmp_path / "cache")
    assert [source[i] for i in range(len(source))] == expected(scheme)
    monkeypatch.setattr("gzip.open", lambda *_: pytest.fail("unpacked twice"))
    assert open_source(config(f"{scheme}:{plain}.gz"), "train", tmp_path / "cache")[0] == source[0]


@pytest.mark.parametrize(
    "spec",
    ["", "[:1%]", "[99%:]", "[33%:67%]", "[:15%]", "[10:20]", "[-7:]", "[:-7]", "[-10%:]", "[5:]", "[50%:]"],
)
@pytest.mark.parametrize("count", [250, 1_003, 37])
def test_slices_follow_tfds(spec, count):
    info = {"train": tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=0, filename_template=None)}
    (wanted,) = tfds.core.ReadInstruction.from_spec("train" + spec).to_absolute(
        tfds.core.splits.SplitDict(info.values())
    )
    low, high = slice_bounds(*parse_split("train" + spec)[1:], count)
    assert (low, high) == (wanted.from_ or 0, count if wanted.to is None else wanted.to)


def test_slices_of_a_file_partition_it(tmp_path):
    rows = [(str(i), str(-i)) for i in range(103)]
    name = write(tmp_path, "tsv", rows)
    parts = [open_source(config(name), split, tmp_path) for split in ("train[:90%]", "train[90%:]")]
    assert [part[i]["inputs"] for part in parts for i in range(len(part))] == [en for en, _ in rows]
    assert len({part.content_id for part in parts}) == 2


@pytest.mark.parametrize(
    "split", ["train[", "train[5]", "train[:x]", "train[:-]", "a b", "", "train[:%]", "train[:1.5%]"]
)
def test_a_malformed_split_is_a_clear_error(tmp_path, split):
    with pytest.raises(UserError, match="must be a name or a slice"):
        open_source(config(write(tmp_path, "jsonl")), split, tmp_path)


def test_splits_of_local_files_are_files(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, "jsonl", [(split, split)], name=f"part-{split}")
    name = f"jsonl:{tmp_path}/part-{{split}}.jsonl"
    assert open_source(config(name), "validation", tmp_path)[0]["inputs"] == "validation"
    with pytest.raises(UserError, match="no split 'valid'.*did you mean 'validation'.*train"):
        open_source(config(name), "valid", tmp_path)
    with pytest.raises(UserError, match="its only split is 'train', not 'test'"):
        open_source(config(write(tmp_path, "jsonl")), "test", tmp_path)


def test_the_content_id_follows_bytes_split_and_fields(tmp_path):
    name = write(tmp_path, "jsonl")
    ids = {
        open_source(config(name), "train", tmp_path).content_id,
        open_source(config(name), "train[:50%]", tmp_path).content_id,
        open_source(config(name, inputs="de", targets="en"), "train", tmp_path).content_id,
    }
    assert len(ids) == 3
    assert open_source(config(name), "train", tmp_path).content_id in ids
    elsewhere = write(tmp_path / "elsewhere", "jsonl") if (tmp_path / "elsewhere").mkdir() is None else ""
    assert open_source(config(elsewhere), "train", tmp_path).content_id in ids  # the folder does not matter
    changed = write(tmp_path, "jsonl", [*ROWS[:-1], ("6", "fünf")])
    assert open_source(config(changed), "train", tmp_path).content_id not in ids


@pytest.mark.parametrize(
    ("scheme", "content", "index", "words"),
    [
        ("jsonl", b'{"en": "a", "de": "b"}\n{"en": "a"}\n', 1, ("line 2", "'de'", "targets")),
        ("jsonl", b'{"en": "a", "de": "b"}\n{"en": "a", "dee": "b"}\n', 1, ("line 2", "did you mean 'dee'")),
        ("jsonl", b'{"en": "a", "de": "b"}\n\n{"en": "a", "de": "b"}\n', 1, ("line 2", "not JSON")),
        ("jsonl", b'{"en": "a", "de": "b"}\n[1]\n', 1, ("line 2", "object")),
        ("jsonl", b'{"en": "a", "de": "b"}\n{"en": 1, "de": "b"}\n', 1, ("line 2", "'en'", "int")),
        ("jsonl", b'{"en": "a", "de": "b"}\n{"en": "\xff", "de": "b"}\n', 1, ("line 2", "not UTF-8")),
        ("jsonl", b'{"en": "a", "de": "b"', 0, ("line 1", "not JSON")),
        ("tsv", b"en\tde\na\tb\na\tb\tc\n", 1, ("line 3", "3 cells", "2 columns")),
        ("tsv", b"en\tde\na\tb\na\n", 1, ("line 3", "1 cells")),
        ("tsv", b"en\tdee\na\tb\n", 0, ("no field 'de'", "did you mean 'dee'")),
        ("tsv", b"en\ten\na\tb\n", 0, ("2 columns named 'en'",)),
        ("tsv", b"", 0, ("empty",)),
        ("text", b"fine\nb\xe4d\n", 1, ("line 2", "byte 2 is not UTF-8")),
    ],
)
def test_errors_of_bad_records_name_file_and_line(tmp_path, scheme, content, index, words):
    path = tmp_path / "bad.file"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_source(config(f"{scheme}:{path}"), "train", tmp_path)[index]
    for word in ("bad.file", *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_in_a_slice_count_the_lines_of_the_file(tmp_path):
    path = tmp_path / "bad.tsv"
    path.write_bytes(b"en\tde\n" + b"a\tb\n" * 50 + b"oops\n")
    with pytest.raises(UserError, match="bad.tsv line 52"):
        open_source(config(f"tsv:{path}"), "train[-2:]", tmp_path)[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jsonl:{}/dota.jsonl", ("no such file", "did you mean 'data.jsonl'")),
        ("jsonl:{}/nowhere/data.jsonl", ("no such file",)),
        ("jsonl:{}/nowhere/{{split}}.jsonl", ("no split 'train'",)),
    ],
)
def test_the_error_of_a_missing_file_names_the_nearest(tmp_path, name, words):
    write(tmp_path, "jsonl")
    with pytest.raises(UserError) as error:
        open_source(config(name.format(tmp_path)), "train", tmp_path)
    assert all(word in str(error.value) for word in words)


def test_text_has_one_field(tmp_path):
    with pytest.raises(UserError, match="no field 'txt'; did you mean 'text'"):
        open_source(config(write(tmp_path, "text"), text="txt"), "train", tmp_path)


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert len(open_source(config(f"text:{tmp_path}/empty.txt"), "train", tmp_path)) == 0


def test_a_group_is_read_and_does_not_change_the_content_id(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"en": "a", "de": "b", "k": 3}\n')
    grouped = open_source(config(f"jsonl:{path}", group="k"), "train", tmp_path)
    assert grouped[0] == {"inputs": "a", "targets": "b", "group": "3"}
    assert grouped.content_id == open_source(config(f"jsonl:{path}"), "train", tmp_path).content_id
