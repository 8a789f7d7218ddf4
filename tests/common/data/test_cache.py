"""The cache: its folder, and building each thing once."""

import sys

import pytest

from common.data import cache
from common.data.built_in import cldr, pydocs
from common.data.sources import by_name as sources


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "here"))
    assert cache.default_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("TWINSTACK_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / "twinstack"


def test_build_once_builds_once_and_forgets_what_failed(tmp_path):
    built = []

    def build(part):
        part.mkdir()
        (part / "file").write_text(str(len(built)))
        built.append(part)
        if len(built) == 1:
            raise RuntimeError("died half way")

    with pytest.raises(RuntimeError):
        cache.build_once(tmp_path / "deep" / "thing", build)
    assert not (tmp_path / "deep" / "thing").exists()
    assert (cache.build_once(tmp_path / "deep" / "thing", build) / "file").read_text() == "1"
    assert cache.build_once(tmp_path / "deep" / "thing", build).is_dir() and len(built) == 2
    assert (cldr.CldrTranslate.name, pydocs.Pydocs.name) == sources.BUILT_IN
