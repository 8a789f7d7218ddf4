"""Files in buckets: fetched once, fetched again after a change, and errors that name the url."""

import gzip
import sys

import fsspec
import pytest

from common.data.sources.by_name import open_fields
from common.errors import UserError
from tests.common.data.sources.line_data import TEXT, lines, shards, texts


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


def test_files_in_a_bucket_are_fetched_once_and_again_when_they_change(tmp_path, bucket, monkeypatch):
    wanted = shards(tmp_path, [4, 9], name="a-{:05}-of-{:05}.jsonl.gz", packer=gzip.compress)
    for path in tmp_path.glob("a-*"):
        bucket.pipe(f"/bucket/data/{path.name}", path.read_bytes())
    cache = tmp_path / "cache"
    url = "jsonl:memory://bucket/data/a-*.jsonl.gz"
    source = open_fields(url, TEXT, "train", cache)
    assert texts(source) == wanted
    local = open_fields(f"jsonl:{tmp_path}/a-*.jsonl.gz", TEXT, "train", cache)
    assert source.content_id == local.content_id
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "get_file", lambda *_: pytest.fail("fetched twice"))
        assert open_fields(url, TEXT, "train", cache).content_id == source.content_id
    bucket.pipe("/bucket/data/a-00000-of-00002.jsonl.gz", gzip.compress(lines(5, 100)))
    assert texts(open_fields(url, TEXT, "train", cache))[:5] == [f"größe {i}" for i in range(100, 105)]
    bucket.rm("/bucket/data/a-00001-of-00002.jsonl.gz")
    with pytest.raises(UserError, match="1 of 00002 files are missing: a-00001-of-00002.jsonl.gz"):
        open_fields(url, TEXT, "train", cache)


def test_missing_files_in_a_bucket_are_errors(tmp_path, bucket):
    bucket.pipe("/bucket/train.jsonl", lines(3))
    with pytest.raises(UserError, match="memory://bucket/trian.jsonl: no such file; did you mean 'train.jsonl'"):
        open_fields("jsonl:memory://bucket/trian.jsonl", TEXT, "train", tmp_path)
    with pytest.raises(UserError, match="no split 'test'.*valid: train"):
        open_fields("jsonl:memory://bucket/{split}.jsonl", TEXT, "test", tmp_path)
    with pytest.raises(UserError, match="unknown protocol; did you mean 'memory'"):
        open_fields("jsonl:memoryy://bucket/a", TEXT, "train", tmp_path)


def test_a_missing_package_is_an_error_that_names_it(tmp_path, monkeypatch):
    known = sys.modules["fsspec.registry"].known_implementations
    monkeypatch.setitem(known, "nowhere", {"class": "gone_fs.core.FileSystem", "err": "install it"})
    with pytest.raises(UserError, match="nowhere://b/a.jsonl: nowhere:// needs a package: pip install gone_fs"):
        open_fields("jsonl:nowhere://b/a.jsonl", TEXT, "train", tmp_path)
