"""TFDS data sets as sources: prepared ones, built-in ones, and errors."""

import os
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from common.data.built_in import cldr
from common.data.sources.by_name import open_source
from common.data.sources.config import SourceConfig
from common.errors import UserError


def config(name: str, **fields) -> SourceConfig:
    return SourceConfig(name=name, **{"inputs": "en", "targets": "de"} | fields)


class TinyTranslate(tfds.core.GeneratorBasedBuilder):
    """An ordinary TFDS data set, as a user may have prepared it on another machine."""

    VERSION = tfds.core.Version("3.1.4")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=3)
        text = tfds.features.Text
        features = tfds.features.FeaturesDict({"en": text(), "de": text(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(200), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"en": f"number {i}", "de": f"Nummer größer {i}", "label": i % 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyTranslate(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_tfds_data_set_is_read_without_its_code_or_tensorflow(tiny, tmp_path):
    code = f"""
import pathlib, sys
from common.data.sources.config import SourceConfig
from common.data.sources.by_name import open_fields, open_source
assert "tensorflow_datasets" not in sys.modules
config = SourceConfig(name="tfds:tiny_translate", inputs="en", targets="de", group="label")
source = open_source(config, "train[:10%]", pathlib.Path({str(tmp_path)!r}))
print(source.content_id, len(source), source[3])
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TFDS_DATA_DIR": str(tiny)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "tiny_translate/3.1.4:train[:10%]" in run.stdout and " 20 " in run.stdout
    assert "größer" in run.stdout and "'group': '" in run.stdout


def test_tfds_records_by_number(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny))
    source = open_source(config("tfds:tiny_translate"), "train", tmp_path)
    found = source.read(range(len(source)))
    assert {record["inputs"] for record in found} == {f"number {i}" for i in range(200)}
    assert all(record["targets"] == record["inputs"].replace("number", "Nummer größer") for record in found)
    assert [source[i] for i in (5, 0, 199)] == [found[i] for i in (5, 0, 199)]
    assert source.read([]) == []
    for index in (-1, 200):
        with pytest.raises(IndexError):
            source[index]
    halves = [open_source(config("tfds:tiny_translate"), split, tmp_path) for split in ("train[:50%]", "train[50%:]")]
    assert [half[i] for half in halves for i in range(len(half))] == found


@pytest.mark.parametrize(
    ("name", "split", "fields", "words"),
    [
        ("tiny_translate", "trian", {}, ("no split 'trian'", "did you mean 'train'", "test")),
        ("tiny_translate", "train[:x%]", {}, ("split 'train[:x%]' cannot be read",)),
        ("tiny_translate", "train", {"inputs": "lable"}, ("source.inputs", "'lable'", "did you mean 'label'")),
        ("tiny_translate", "train", {"inputs": "label"}, ("source.inputs", "must be text")),
        ("tiny_translat", "train", {}, ("did you mean 'tiny_translate'", "tfds build tiny_translat", "array_record")),
        ("cldr_translate/en_dee", "train", {}, ("'dee'", " or de ")),
        ("cldr_translate", "train", {}, ("SRC_DST",)),
    ],
)
def test_errors_of_tfds_sources(tiny, monkeypatch, tmp_path, name, split, fields, words):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny))
    with pytest.raises(UserError) as error:
        open_source(config(f"tfds:{name}", **fields), split, tmp_path)[0]
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_error_of_a_failed_download_explains_how_to_prepare(monkeypatch, tmp_path):
    class NeedsNetwork(TinyTranslate):
        def _split_generators(self, dl_manager):
            raise OSError("no network")

    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(UserError, match="no network.*tfds build needs_network --file_format=array_record"):
        open_source(config("tfds:needs_network"), "train", tmp_path)


def test_the_built_in_data_set_opens_by_name(monkeypatch, tmp_path):
    for kind in cldr.MIX:
        monkeypatch.setitem(cldr.MIX, kind, 30)
    built = config("tfds:cldr_translate/en_de", group="kind")
    source = open_source(built, "train[:50]", tmp_path)
    assert len(source) == 50 and set(source[0]) == {"inputs", "targets", "group"}
    assert cldr.maker_version() in source.content_id and "train[:50]" in source.content_id
    with pytest.raises(UserError, match="did you mean 'test_unseen_names'"):
        open_source(built, "test_unseen", tmp_path)


def test_importing_the_module_does_not_import_tfds():
    """Importing the module does not import TFDS, which takes seconds."""
    code = (
        "import sys, common.data.sources.by_name; print('tensorflow_datasets' in sys.modules, 'babel' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
