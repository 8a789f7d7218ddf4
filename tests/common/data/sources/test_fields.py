"""Fields of records: paths, numbers, and missing or repeated names mean the same in every kind of source."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from common.data.sources.by_name import open_fields, open_source
from common.data.sources.config import SourceConfig
from common.data.sources.records import Problem, number_text
from common.errors import UserError
from tests.common.data.sources.test_example_files import write_array_record, write_tf_record

NESTED = [
    {"t": {"en": "one", "de": "eins"}, "answers": {"text": ["a"], "start": [1]}, "many": ["p"], "label": 1.0},
    {
        "t": {"en": "two", "de": "zwei"},
        "answers": {"text": ["b", "c"], "start": [1, 2]},
        "many": ["q", "r"],
        "label": 0.1,
    },
]
KINDS = ["jsonl", "parquet", "parquet maps", "tfrecord", "arrayrecord", "tfds"]


class Nested(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        made = tfds.features
        answers = {"text": made.Text(), "start": made.Scalar(np.int32)}
        features = made.FeaturesDict(
            {
                "t": made.Translation(["en", "de"]),
                "answers": made.Sequence(answers),
                "many": made.Sequence(made.Text()),
                "label": made.Scalar(np.float32),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(NESTED)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    Nested(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def example(record) -> bytes:
    """The record as a tf.Example, flattened as TFDS does."""
    made = tf_example_pb2.Example()
    flat = {
        **record,
        **{f"{outer}/{name}": value for outer in ("t", "answers") for name, value in record[outer].items()},
    }
    for name, value in flat.items():
        for one in value if isinstance(value, list) else [] if isinstance(value, dict) else [value]:
            feature = made.features.feature[name]
            if isinstance(one, str):
                feature.bytes_list.value.append(one.encode())
            else:
                (feature.float_list if isinstance(one, float) else feature.int64_list).value.append(one)
    return made.SerializeToString()


def stored(kind, folder, records=NESTED) -> str:
    """Writes the records to a file of this kind and returns the name of its source."""
    path = folder / f"a.{kind.replace(' ', '')}"
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        case "parquet":
            schema = pa.Table.from_pylist(records).schema
            label = schema.get_field_index("label")
            schema = schema.set(label, schema.field(label).with_type(pa.float32()))
            pq.write_table(pa.Table.from_pylist(records, schema), path)
        case "parquet maps":
            columns = {name: pa.array([record[name] for record in records]) for name in ("answers", "many", "label")}
            pairs = [list(record["t"].items()) for record in records]
            columns["t"] = pa.array(pairs, pa.map_(pa.string(), pa.string()))
            pq.write_table(pa.table(columns), path)
        case "tfrecord":
            write_tf_record(path, map(example, records))
        case "arrayrecord":
            write_array_record(path, map(example, records))
    return f"{kind.split()[0]}:{path}"


@pytest.mark.parametrize("kind", KINDS)
def test_one_path_means_the_same_in_every_kind_of_source(tmp_path, monkeypatch, nested, kind):
    monkeypatch.setenv("TFDS_DATA_DIR", str(nested))
    name = "tfds:nested" if kind == "tfds" else stored(kind, tmp_path)
    fields = {
        "inputs": "t.en",
        "targets": "answers.text.0",
        "first": "many.0",
        "start": "answers.start.0",
        "label": "label",
    }
    source = open_fields(name, fields, "train", tmp_path / "cache")
    found = {record["inputs"]: record for record in source.read(range(2))}
    assert found == {
        "one": {"inputs": "one", "targets": "a", "first": "p", "start": "1", "label": "1"},
        "two": {"inputs": "two", "targets": "b", "first": "q", "start": "1", "label": "0.1"},
    }
    short = open_fields(name, {"text": "many.1"}, "train", tmp_path / "cache").read(range(2))
    (problem,) = [record for record in short if isinstance(record, Problem)]
    assert {"text": "r"} in short and "no field 'many.1' (source.text)" in problem.what
    for wrong, right in (("t.eng", "t.en"), ("answer.text.0", "answers.text"), ("labl", "label")):
        with pytest.raises(UserError, match=f"source.text: .* has no field '{wrong}'.*{right.split('.')[0]}"):
            open_fields(name, {"text": wrong}, "train", tmp_path / "cache")


# A tf.Example has no null.
@pytest.mark.parametrize(
    ("kind", "value"),
    [*itertools.product(KINDS[:-1], [float("nan"), float("inf")]), ("jsonl", None), ("parquet", None)],
)
def test_a_record_with_nan_or_null_in_a_field_is_a_problem(tmp_path, kind, value):
    name = stored(kind, tmp_path, [NESTED[0], NESTED[1] | {"label": value}])
    source = open_fields(name, {"text": "t.en", "label": "label"}, "train", tmp_path / "cache")
    assert source[0] == {"text": "one", "label": "1"}
    problem = source.read([1])[0]
    assert isinstance(problem, Problem) and "field 'label' (source.label)" in problem.what
    assert ("must be text, not null" if value is None else f"{value} is not a finite number") in problem.what


@pytest.mark.parametrize("group", [None, float("nan"), ["a"], "absent"])
def test_a_record_without_a_group_is_read(tmp_path, group):
    """Content ids do not contain groups, so a group must not decide which records are used."""
    rows = [{"text": "a", "kind": "x"}, {"text": "b"} | ({} if group == "absent" else {"kind": group})]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_fields(f"jsonl:{tmp_path}/a.jsonl", {"text": "text", "group": "kind"}, "train", tmp_path / "cache")
    assert source.read([0, 1]) == [{"text": "a", "group": "x"}, {"text": "b", "group": "(none)"}]
    assert source.content_id == open_fields(f"jsonl:{tmp_path}/a.jsonl", {"text": "text"}, "train", tmp_path).content_id


def test_numbers_are_written_the_same_for_every_type():
    for value in (0.1, 0.5, -2.25, 1e-30, 3.0, -0.0, 0.1 + 0.2, 1e22, 1 / 3):
        text = number_text(value)
        assert float(text) == value
        assert number_text(np.float64(value)) == text
    for value in (0.1, 1 / 3, 7.0, 1e-30, 3e38):
        single = np.float32(value)
        assert number_text(single) == number_text(float(single)) and np.float32(number_text(single)) == single
    assert [number_text(value) for value in (3, np.int64(3), 3.0, np.float32(3), -0.0, 1e300)] == [*"33330", "1e+300"]
    assert [number_text(value) for value in (True, np.bool_(False))] == ["True", "False"]


def test_a_repeated_field_name_is_an_error_only_if_it_is_read(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "y", "y"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.tsv").write_text("text\ty\ty\na\tb\tc\n")
    for name in (f"parquet:{tmp_path}/a.parquet", f"tsv:{tmp_path}/a.tsv"):
        assert open_fields(name, {"text": "text"}, "train", tmp_path / "cache")[0] == {"text": "a"}
        with pytest.raises(UserError, match="source.text: .* has 2 columns named 'y'; rename all but one"):
            open_fields(name, {"text": "y"}, "train", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a", "y": {"z": "b", "z": "c"}}\n')
    found = open_fields(f"jsonl:{tmp_path}/a.jsonl", {"text": "text"}, "train", tmp_path / "cache").read([0, 1])
    assert found[0] == {"text": "a"} and found[1].what == "two fields are named 'z'"
    twice = pa.StructArray.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["k", "k"])
    pq.write_table(pa.table({"t": twice}), tmp_path / "b.parquet")
    found = open_fields(f"parquet:{tmp_path}/b.parquet", {"text": "t.k"}, "train", tmp_path / "cache").read([0])
    assert isinstance(found[0], Problem) and "duplicate field names" in found[0].what


@pytest.mark.parametrize("value", [None, 3, 2.5, True, ["x"], {"x": "y"}, []])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_any_type_is_text_or_a_problem(tmp_path, kind, value):
    name = stored(kind, tmp_path, [record | {"odd": value, "label": 1.0} for record in NESTED])
    for fields in ({"text": "odd"}, {"text": "t.en", "odd": "odd"}):
        found = open_fields(name, fields, "train", tmp_path / "cache").read([0, 1])
        if "odd" in fields and isinstance(value, int | float):
            assert found[0] == {"text": "one", "odd": str(value)}
        else:
            kind_of = {type(None): "null"}.get(type(value), type(value).__name__)
            assert all(f"must be text, not {kind_of}" in problem.what for problem in found)


def test_a_data_set_pinned_to_a_version_is_read(tmp_path, monkeypatch, nested):
    monkeypatch.setenv("TFDS_DATA_DIR", str(nested))
    fields = {"text": "t.en"}
    ids = set()
    for version in ("", ":1.2.3", ":1.*.*"):
        config = SourceConfig(name=f"tfds:nested{version}", inputs=None, targets=None, text="t.en")
        ids.add(open_source(config, "train", tmp_path).content_id)
    assert len(ids) == 1 and "nested/1.2.3" in ids.pop()
    with pytest.raises(UserError, match="tfds:nested:9.9.9: .*only: 1.2.3"):
        open_fields("tfds:nested:9.9.9", fields, "train", tmp_path)
    with pytest.raises(UserError, match="contains a split.*name=tfds:nested train_split=test"):
        SourceConfig(name="tfds:nested:test", inputs=None, targets=None, text="t.en")
