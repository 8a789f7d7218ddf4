"""Parquet, TFRecord and ArrayRecord files: records equal those of other libraries, and all damage is reported."""

import concurrent.futures
import copy
import json
import multiprocessing
import random
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from common.data.sources import columnar, indexes, tf_records
from common.data.sources.by_name import open_fields, tfds_source
from common.data.sources.records import Problem
from common.data.sources.tf_records import masked_crc32c
from common.errors import UserError

TEXT = {"text": "text"}
PAIR = {"text": "text", "id": "id"}


def slow_crc32c(data: bytes) -> int:
    """Computes the checksum bit by bit, as the polynomial is defined."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("length", [*range(6), 8, 255, 256, 20_000])
def test_checksums_are_those_of_the_definition(length):
    for data in (bytes(length), b"\xff" * length, random.Random(length).randbytes(length)):
        assert masked_crc32c(data) == masked(slow_crc32c(data))


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),  # the usual check value; the others are in RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_checksums_of_known_vectors(data, crc):
    assert masked_crc32c(data) == masked(crc) == masked(slow_crc32c(data))


def example(**features) -> bytes:
    made = tf_example_pb2.Example()
    for name, value in features.items():
        feature = made.features.feature[name]
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                feature.int64_list.value.append(one)
            elif isinstance(one, float):
                feature.float_list.value.append(one)
            else:
                feature.bytes_list.value.append(one.encode() if isinstance(one, str) else one)
    return made.SerializeToString()


def frame(data: bytes) -> bytes:
    def checksum(part: bytes) -> bytes:
        return struct.pack("<I", masked(slow_crc32c(part)) if len(part) < 1_000 else masked_crc32c(part))

    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def write_tf_record(path, examples):
    path.write_bytes(b"".join(map(frame, examples)))


def write_array_record(path, examples):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for data in examples:
        writer.write(data)
    writer.close()


def write_parquet(path, examples):
    """The same records as a table, two rows a group."""
    rows = []
    for data in examples:
        features = tf_example_pb2.Example.FromString(data).features.feature
        rows.append({"text": features["text"].bytes_list.value[0], "id": features["id"].int64_list.value[0]})
    schema = pa.schema({"text": pa.binary(), "id": pa.int64()})
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)


FORMATS = {
    "tfrecord": (write_tf_record, "c4-train.tfrecord-{:05}-of-{:05}"),
    "arrayrecord": (write_array_record, "c4-train.array_record-{:05}-of-{:05}"),
    "parquet": (write_parquet, "train-{:05}-of-{:05}.parquet"),
}


def write_set(folder, scheme, sizes):
    write, name = FORMATS[scheme]
    done = 0
    for number, size in enumerate(sizes):
        write(
            folder / name.format(number, len(sizes)),
            [example(text=f"größe {i}", id=i) for i in range(done, done + size)],
        )
        done += size
    return [{"text": f"größe {i}", "id": str(i)} for i in range(done)]


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_folder_is_one_source_in_any_order(tmp_path, scheme, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    wanted = write_set(data, scheme, [5, 0, 1, 7])
    (data / "dataset_info.json").write_text("{}")
    source = open_fields(f"{scheme}:{data}", PAIR, "train", cache)
    assert source.read(range(len(source))) == wanted
    order = random.Random(0).choices(range(len(wanted)), k=60)
    assert source.read(order) == [wanted[i] for i in order]
    part = open_fields(f"{scheme}:{data}/*-of-00004*", PAIR, "train[5:-2]", cache)
    assert part.read(range(len(part))) == wanted[5:-2] and part.content_id != source.content_id
    dumped = multiprocessing.reduction.ForkingPickler.dumps(source)
    assert multiprocessing.reduction.ForkingPickler.loads(dumped)[12] == copy.deepcopy(source)[12] == wanted[12]
    monkeypatch.setattr(indexes, "file_digest", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(columnar, "file_digest", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(tf_records, "file_digest", lambda *_: pytest.fail("read again"))
    assert open_fields(f"{scheme}:{data}", PAIR, "train", cache).content_id == source.content_id
    next(data.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match="1 of 00004 files are missing: .*-00002-of-00004"):
        open_fields(f"{scheme}:{data}", PAIR, "train", cache)


@pytest.mark.parametrize("scheme", FORMATS)
def test_many_threads_and_a_spawned_process_read_the_same(tmp_path, scheme):
    wanted = write_set(tmp_path, scheme, [40, 30, 30])
    source = open_fields(f"{scheme}:{tmp_path}", PAIR, "train", tmp_path / "cache")
    orders = [random.Random(seed).choices(range(100), k=300) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for order, found in zip(orders, pool.map(source.read, orders), strict=True):
            assert found == [wanted[i] for i in order]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as processes:
        assert processes.submit(source.read, orders[0]).result() == [wanted[i] for i in orders[0]]


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_changed_file_is_read_again(tmp_path, scheme):
    write, name = FORMATS[scheme]
    path = tmp_path / name.format(0, 1)
    ids = set()
    for number in (1, 2):
        write(path, [example(text=f"version {number}", id=number)] * number)
        source = open_fields(f"{scheme}:{path}", TEXT, "train", tmp_path / "cache")
        assert source.read(range(len(source))) == [{"text": f"version {number}"}] * number
        ids.add(source.content_id)
    assert len(ids) == 2


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_wrong_field_and_an_empty_folder_are_errors(tmp_path, scheme):
    with pytest.raises(UserError, match="no file in this folder is named"):
        open_fields(f"{scheme}:{tmp_path}", TEXT, "train", tmp_path / "cache")
    write_set(tmp_path, scheme, [3])
    with pytest.raises(UserError, match="source.text: .* has no field 'txt'; did you mean 'text'"):
        open_fields(f"{scheme}:{tmp_path}", {"text": "txt"}, "train", tmp_path / "cache")
    numbers = open_fields(f"{scheme}:{tmp_path}", {"text": "id"}, "train", tmp_path / "cache").read([0])
    assert isinstance(numbers[0], Problem) and "must be text, not int" in numbers[0].what


@pytest.mark.parametrize("scheme", FORMATS)
def test_bytes_that_are_not_text_are_problems(tmp_path, scheme):
    write, name = FORMATS[scheme]
    write(tmp_path / name.format(0, 1), [example(text=text, id=1) for text in (b"a", b"b\xff", "ß" * 5_000_000, b"")])
    found = open_fields(f"{scheme}:{tmp_path}", TEXT, "train", tmp_path / "cache").read(range(4))
    assert found[0] == {"text": "a"} and found[2] == {"text": "ß" * 5_000_000} and found[3] == {"text": ""}
    assert isinstance(found[1], Problem) and "byte 2 is not UTF-8" in found[1].what
    assert found[1].where.endswith(("record 1", "row 1"))


def test_a_tf_record_file_cut_anywhere_has_all_whole_records_and_one_problem(tmp_path):
    framed = [frame(example(text="x" * i, id=i)) for i in range(4)]
    whole, ends = b"".join(framed), np.cumsum([len(part) for part in framed]).tolist()
    for cut in range(len(whole) + 1):
        (tmp_path / f"{cut}.tfrecord").write_bytes(whole[:cut])
        source = open_fields(f"tfrecord:{tmp_path}/{cut}.tfrecord", PAIR, "train", tmp_path / "cache")
        found = source.read(range(len(source)))
        if cut not in (0, *ends):
            tear = found.pop()
            assert isinstance(tear, Problem) and tear.what == "the file ends in the middle of it"
            assert source.read([len(found)]) == [tear]
        assert found == [{"text": "x" * i, "id": str(i)} for i in range(sum(end <= cut for end in ends))]


def test_every_flipped_bit_of_a_tf_record_is_detected(tmp_path):
    framed = [frame(example(text=f"x{i}", id=i)) for i in range(3)]
    start, good = len(framed[0]), [{"text": f"x{i}", "id": str(i)} for i in range(3)]
    for place in range(len(framed[1])):
        damaged = bytearray(b"".join(framed))
        damaged[start + place] ^= 1 << place % 8
        path = tmp_path / f"{place}.tfrecord"
        path.write_bytes(damaged)
        source = open_fields(f"tfrecord:{path}", PAIR, "train", tmp_path / "cache")
        found = source.read(range(len(source)))
        assert found[0] == good[0] and isinstance(found[1], Problem) and found[1].where == f"{path} record 1"
        if place < 12:
            assert "length does not match its checksum" in found[1].what and len(found) == 2
        else:
            assert "bytes do not match their checksum" in found[1].what and found[2:] == good[2:]


def test_features_of_tf_examples(tmp_path):
    data = [
        example(text="a", many=["x", "y"], id=[4], score=0.5, none=[]),
        example(id=5),
        b"\xff\xff\xff",
    ]
    write_tf_record(tmp_path / "a.tfrecord", data)
    fields = {"text": "text", "id": "id", "score": "score", "targets": "many.1"}
    source = open_fields(f"tfrecord:{tmp_path}/a.tfrecord", fields, "train", tmp_path / "cache")
    assert source[0] == {"text": "a", "id": "4", "score": "0.5", "targets": "y"}
    found = source.read([1, 2])
    assert "no field 'text'" in found[0].what and "not a tf.Example" in found[1].what
    several = open_fields(f"tfrecord:{tmp_path}/a.tfrecord", {"text": "many"}, "train", tmp_path / "cache")
    assert "must be text, not list" in several.read([0])[0].what


def test_a_damaged_chunk_of_an_array_record_file_loses_only_its_records(tmp_path):
    path = tmp_path / "a.array_record"
    wanted = [{"text": random.Random(i).randbytes(200).hex()} for i in range(300)]
    write_array_record(path, [example(**record) for record in wanted])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    source = open_fields(f"arrayrecord:{path}", TEXT, "train", tmp_path / "cache")
    found = source.read(range(300))
    bad = [i for i, record in enumerate(found) if isinstance(record, Problem)]
    assert len(bad) == 1 and "hash mismatch" in found[bad[0]].what
    assert all(found[i] == wanted[i] for i in range(300) if i not in bad)


@pytest.mark.parametrize("scheme", ["arrayrecord", "parquet"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_files_are_errors(tmp_path, scheme, share):
    write, name = FORMATS[scheme]
    path = tmp_path / name.format(0, 1)
    write(path, [example(text="x" * 300, id=i) for i in range(400)])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=f"{path.name} is not a whole"):
        open_fields(f"{scheme}:{path}", TEXT, "train", tmp_path / "cache")


def test_parquet_decodes_requested_columns_by_row_group(tmp_path, monkeypatch):
    rows = [{"text": f"t{i}", "n": i, "answers": {"text": [f"a{i}", "b"]}, "large": "x" * 1000} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    fields = {"inputs": "text", "targets": "answers.text.0", "id": "n"}
    source = open_fields(f"parquet:{tmp_path}/a.parquet", fields, "train", tmp_path / "cache")
    decoded, read = [], pq.ParquetFile.read_row_group

    def counting(file, group, columns):
        decoded.append((group, tuple(sorted(columns))))
        return read(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    found = [record for start in range(0, 100, 7) for record in source.read(range(start, min(start + 7, 100)))]
    assert found == [{"inputs": f"t{i}", "targets": f"a{i}", "id": str(i)} for i in range(100)]
    # Each once; the first two when the file was opened.
    assert [group for group, _ in decoded] == list(range(2, 10))
    assert {columns for _, columns in decoded} == {("answers", "n", "text")}


def test_parquet_nulls_and_damage_are_problems(tmp_path):
    rows = [{"text": None if i == 3 else random.Random(i).randbytes(100).hex()} for i in range(40)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="zstd", use_dictionary=False)
    about = pq.ParquetFile(path).metadata.row_group(2).column(0)
    damaged = bytearray(path.read_bytes())
    damaged[about.data_page_offset + 5 : about.data_page_offset + about.total_compressed_size] = bytes(
        about.total_compressed_size - 5
    )
    path.write_bytes(damaged)
    found = open_fields(f"parquet:{path}", TEXT, "train", tmp_path / "cache").read(range(40))
    assert [i for i, record in enumerate(found) if isinstance(record, Problem)] == [3, *range(20, 30)]
    assert "must be text, not null" in found[3].what and "row group cannot be read" in found[25].what
    assert found[39] == rows[39]


def test_bad_text_in_tfds_is_a_problem(tmp_path):
    class Bytes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"t": tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"t": text}) for i, text in enumerate([b"a", b"b\xff", b"c"]))}

        def _generate_examples(self):
            yield from ()  # TFDS requires the method; the splits above make the examples

    builder = Bytes(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = tfds_source(builder, "train", {"text": "t"})
    found = source.read(range(3))
    problems = [record for record in found if isinstance(record, Problem)]
    assert len(problems) == 1 and "byte 2 is not UTF-8" in problems[0].what
    assert sorted(record["text"] for record in found if not isinstance(record, Problem)) == ["a", "c"]
    assert json.dumps(source.read([]), sort_keys=True) == "[]"
