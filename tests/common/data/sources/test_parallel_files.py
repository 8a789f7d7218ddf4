"""Parallel text files, one for each field."""

import copy
import gzip
import os
from pathlib import Path

import pytest

from common.data.sources.by_name import open_fields, open_source
from common.data.sources.config import SourceConfig
from common.data.sources.records import Problem
from common.errors import UserError

SHARED = Path(os.environ.get("TWINSTACK_SHARED_DATA", "../shared/data"))


def parallel(folder, name="{split}.{field}.gz") -> str:
    for split, count in (("train", 9), ("test", 4)):
        for language, word in (("en", "word"), ("de", "Wört")):
            data = "".join(f"{word} {i}\n" for i in range(count)).encode()
            path = folder / name.format(split=split, field=language)
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return f"lines:{folder}/{name}"


@pytest.mark.parametrize("name", ["{split}.{field}.gz", "{field}-{split}.txt"])
def test_lines_of_parallel_files_are_pairs(tmp_path, name):
    config = SourceConfig(name=parallel(tmp_path, name), inputs="en", targets="de")
    source = open_source(config, "test", tmp_path / "cache")
    assert source.read([3, 0]) == [{"inputs": f"word {i}", "targets": f"Wört {i}"} for i in (3, 0)]
    assert len(source) == 4 and copy.deepcopy(source)[1]["targets"] == "Wört 1"
    part = open_source(config, "train[50%:]", tmp_path / "cache")
    assert part[0]["inputs"] == "word 4" and part.content_id != source.content_id
    turned = open_fields(config.name, {"inputs": "de", "targets": "en"}, "test", tmp_path / "cache")
    assert turned.content_id != source.content_id


def test_errors_of_parallel_files(tmp_path):
    name, pair = parallel(tmp_path), {"inputs": "en", "targets": "de"}
    with pytest.raises(UserError, match="source.targets: .*no field 'dee'; did you mean 'de'"):
        open_fields(name, pair | {"targets": "dee"}, "train", tmp_path / "cache")
    with pytest.raises(UserError, match="must contain {field}"):
        open_fields(f"lines:{tmp_path}/train.en.gz", pair, "train", tmp_path / "cache")
    with pytest.raises(UserError, match="no split 'tst'.*did you mean 'test'"):
        open_fields(name, pair, "tst", tmp_path / "cache")
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"one\n\xff\nthree\n"))
    with pytest.raises(UserError, match="field 'de' has 3 lines, but field 'en' has 9"):
        open_fields(name, pair, "train[:1]", tmp_path / "cache")
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"1\n2\n3\n"))
    found = open_fields(name, pair, "train", tmp_path / "cache").read([0, 1, 2])
    assert found[0] == {"inputs": "1", "targets": "one"} and found[2] == {"inputs": "3", "targets": "three"}
    assert isinstance(found[1], Problem) and found[1].where.endswith("train.de.gz line 2")


@pytest.mark.parametrize(("split", "other"), [("val", "de"), ("test_2016_flickr", "fr")])
def test_real_parallel_text_equals_what_gzip_reads(tmp_path, split, other):
    folder = SHARED / "mt_multi30k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set TWINSTACK_SHARED_DATA")
    pairs = {"inputs": "en", "targets": other}
    source = open_fields(f"lines:{folder}/{{split}}.{{field}}.gz", pairs, split, tmp_path)
    found = source.read(range(len(source)))
    for ours, theirs in pairs.items():
        with gzip.open(folder / f"{split}.{theirs}.gz", "rt", encoding="utf-8", newline="\n") as file:
            assert [record[ours] for record in found] == [line.removesuffix("\n").removesuffix("\r") for line in file]
