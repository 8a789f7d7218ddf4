"""Sources: random access to text records, from TFDS or from local files.

A source is opened by name. `tfds:cldr_translate/SRC_DST` is built here from Unicode CLDR; any other `tfds:NAME` is read
from `$TFDS_DATA_DIR` (or the cache) and downloaded where it can be; `jsonl:PATH`, `tsv:PATH` and `text:PATH` are local
files, plain or gzipped. Splits may be sliced as in TFDS: "train[:1%]", "train[95%:]".
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from common.data.cache import locked
from common.data.files import FileSource
from common.data.source_config import SourceConfig
from common.errors import UserError, nearest

BUILT_IN = "cldr_translate"
FIELDS = ("inputs", "targets", "text", "group")


class Source(Protocol):
    """Records by number; each has "inputs" and "targets", or "text", and "group" where the config names one.

    `content_id` differs whenever the records may: it holds name, version, split, the fields read, and the version of
    whatever made the records.
    """

    @property
    def content_id(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, str]: ...

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, str]]:
        """Several records at once, which for TFDS is many times faster than one by one."""
        ...


def open_source(config: SourceConfig, split: str, cache_dir: Path) -> Source:
    """Opens one split, building or downloading what is missing.

    Raises UserError, naming the nearest valid choice, for an unknown data set, split or field, a missing file, and
    (when it is read) a record that cannot be used.
    """
    scheme, _, name = config.name.partition(":")
    fields = config.fields()
    if scheme == "tfds":
        source = _open_tfds(name, split, fields, cache_dir)
    else:
        source = FileSource.open(scheme, name, split, fields, cache_dir)
    from common.data.templates import TemplatedSource

    return TemplatedSource(source, config.templates) if config.templates else source


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TfdsSource:
    """One split of a prepared TFDS data set."""

    content_id: str
    records: Any
    """TFDS's own data source, whose texts are bytes."""
    fields: dict[str, str]
    """Name of a field in our records -> its name in the data set's."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.__getitems__([index])[0]

    def read(self, indices):
        return self.__getitems__(indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, str]]:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
        found = self.records.__getitems__(list(indices)) if len(indices) else []
        return [self._read(record, index) for record, index in zip(found, indices, strict=True)]

    def _read(self, record: dict[str, Any], index: int) -> dict[str, str]:
        return {
            ours: _text(
                record[theirs], f"{self.content_id} record {index}, field {theirs!r} (source.{ours})", ours == "group"
            )
            for ours, theirs in self.fields.items()
        }


def _text(value: Any, where: str, numbers: bool) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} is not UTF-8") from error
    if numbers and (isinstance(value, int) or getattr(value, "shape", None) == ()):
        return str(value)
    raise UserError(f"{where}: must be text, not {type(value).__name__}")


def _open_tfds(name: str, split: str, fields: dict[str, str], cache_dir: Path) -> TfdsSource:
    data_set, _, pair = name.partition("/")
    if data_set == BUILT_IN:
        from common.data.cldr import cldr_builder, maker_version

        builder, made_by = cldr_builder(pair, cache_dir), f"+{maker_version()}"
    else:
        builder, made_by = _prepared(name, Path(os.environ.get("TFDS_DATA_DIR") or cache_dir / "tfds")), ""
    return tfds_source(builder, split, fields, made_by)


def tfds_source(builder: Any, split: str, fields: dict[str, str], made_by: str = "") -> TfdsSource:
    """The split of a prepared TFDS builder.

    Args:
      builder: a `tfds.core.DatasetBuilder` whose data are there, in a format of random access.
      split: a split or a slice of one, for example "train[:1%]".
      fields: name of a field in our records ("inputs", "targets", "text", "group") -> its name in the data set's.
      made_by: what the content id adds to the builder's own version.
    """
    info = builder.info
    for ours, theirs in fields.items():
        if theirs not in info.features:
            raise UserError(
                f"source.{ours}: {info.full_name} has no field {theirs!r}; {nearest(theirs, info.features)}"
            )
    base = re.split(r"[\[+]", split)[0]
    if base not in info.splits:
        raise UserError(f"{info.full_name} has no split {base!r}; {nearest(base, info.splits)}")
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"{info.full_name} in {builder.data_path} is stored as {info.file_format.value}, which has no random "
            f"access; prepare it again with --file_format=array_record"
        ) from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"{info.full_name}: split {split!r} cannot be read ({_first_line(error)})") from error
    reading = ",".join(f"{ours}={theirs}" for ours, theirs in fields.items() if ours != "group")
    size = f"{info.splits[base].num_examples} records"
    return TfdsSource(
        content_id=f"tfds:{info.full_name}{made_by}:{split}:{reading}:{size}", records=records, fields=fields
    )


def _prepared(name: str, data_dir: Path) -> Any:
    """The builder of a data set under `data_dir`, downloaded where it is not there yet."""
    import tensorflow_datasets as tfds

    how = (
        f"prepare it where TensorFlow and a network are: tfds build {name} --file_format=array_record "
        f"--data_dir={data_dir} (reading it takes no TensorFlow)"
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        there = [path.name for path in data_dir.iterdir()] if data_dir.is_dir() else []
        close = difflib.get_close_matches(
            name.split("/")[0], [BUILT_IN, *tfds.list_builders(with_community_datasets=False), *there], n=1, cutoff=0.8
        )
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"tfds:{name} is neither in {data_dir} nor can it be made here{hint}; or {how}") from error
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"tfds:{name}: {_first_line(error)}; {how}") from error
    if builder.is_prepared():
        return builder
    with locked(data_dir / f"{name.replace('/', '-')}"):
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # downloads fail in as many ways as there are data sets
            raise UserError(f"tfds:{name} could not be prepared in {data_dir} ({_first_line(error)}); {how}") from error
    return builder


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
