"""Opens a source (random access to text records) by its name.

`tfds:cldr_translate/SRC_DST` is built here from Unicode CLDR, and `tfds:pydocs` from the running Python. Any other
`tfds:NAME` is read from `$TFDS_DATA_DIR` (or the cache), and downloaded if it is missing. `corpus:NAME` is one of
`common.data.corpora.table`. The other schemes name files:

- `jsonl:PATH`, `tsv:PATH`, `text:PATH`: one record per line. The first line of a TSV file names its columns, unless the
  fields are numbers.
- `lines:PATH`: parallel text files, one for each field; PATH contains `{field}`.
- `parquet:PATH`, `tfrecord:PATH`, `arrayrecord:PATH`: the last two hold tf.Example protos; PATH may be a folder.

PATH may contain `{split}`, and may be a glob or a url (`gs://bucket/c4-train.*.jsonl.gz`). Remote files are fetched
into the cache once, and files that end in .gz, .bz2, .xz or .zst are unpacked there once. Splits can be sliced as in
TFDS: "train[:1%]", "train[95%:]".
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.data.cache import locked
from common.data.corpora.by_name import open_corpus
from common.data.sources.config import SourceConfig
from common.data.sources.divided import open_divided
from common.data.sources.file_sources import fields_id, open_files, open_parallel
from common.data.sources.files import ONLY_SPLIT
from common.data.sources.records import (
    Problem,
    Record,
    Source,
    SourceBase,
    UnusableRecord,
    check_range,
    first_line,
    pick_fields,
)
from common.data.sources.templates import TemplatedSource
from common.errors import UserError, nearest

BUILT_IN = ("cldr_translate", "pydocs")
TFDS_FOLDER = "TFDS_DATA_DIR"


def open_source(config: SourceConfig, split: str, cache_dir: Path) -> Source:
    """Opens one split; builds, downloads, fetches, unpacks and indexes whatever is missing.

    Raises UserError, naming the nearest valid choice, for an unknown data set, split or field, and for a file that is
    missing or in another format. A record that cannot be used does not raise: reading it returns a Problem.
    """
    if config.held_out is None:
        source = open_fields(config.name, config.fields(), split, cache_dir, config.header)
    else:
        whole = open_fields(config.name, config.fields(), ONLY_SPLIT, cache_dir, config.header)
        source = open_divided(whole, split, config.held_out, config.hashed_fields(), cache_dir)
    return TemplatedSource(source, config.templates) if config.templates else source


def open_fields(name: str, fields: Mapping[str, str], split: str, cache_dir: Path, header: bool = True) -> Source:
    """As `open_source`, but for any fields.

    Args:
      name: SCHEME:NAME.
      fields: our name of a field -> its name in the data set, or a path to it ("answers.0.text"). "inputs", "targets"
        and "text" must be text; other fields may also be numbers, which become text.
      split: a split or a slice of one.
      cache_dir: the folder for everything that can be rebuilt.
      header: whether the first line of a `tsv:` file names the columns.
    """
    scheme, _, rest = name.partition(":")
    match scheme:
        case "tfds":
            return _open_tfds(rest, split, dict(fields), cache_dir)
        case "corpus":
            return open_corpus(rest, split, dict(fields))
        case "lines":
            return open_parallel(rest, split, dict(fields), cache_dir)
        case _:
            return open_files(scheme, rest, split, dict(fields), cache_dir, header)


def downloaded(name: str) -> bool:
    """Returns whether SCHEME:NAME may be downloaded: a TFDS data set not built here, with TFDS_DATA_DIR unset."""
    scheme, _, rest = name.partition(":")
    made_here = rest.partition(":")[0].partition("/")[0] in BUILT_IN
    return scheme == "tfds" and not made_here and not os.environ.get(TFDS_FOLDER)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TfdsSource(SourceBase):
    """One split of a prepared TFDS data set."""

    content_id: str
    records: Any
    """TFDS's data source, which returns text as bytes."""
    fields: dict[str, str]
    """Our name of a field -> its name in the data set."""

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        check_range(indices, len(self))
        found = self.records.__getitems__(list(indices)) if len(indices) else []
        return [self._pick(record, index) for record, index in zip(found, indices, strict=True)]

    def _pick(self, record: dict[str, Any], index: int) -> Record | Problem:
        try:
            return pick_fields(record, self.fields)
        except UnusableRecord as error:
            return Problem(where=f"{self.content_id} record {index}", what=str(error))


def _open_tfds(name: str, split: str, fields: dict[str, str], cache_dir: Path) -> TfdsSource:
    unpinned, _, version = name.partition(":")
    data_set, _, pair = unpinned.partition("/")
    if data_set == "cldr_translate":
        from common.data.built_in.cldr import cldr_builder, maker_version

        builder, made_by = cldr_builder(pair, cache_dir), f"+{maker_version()}"
    elif unpinned == "pydocs":
        from common.data.built_in import pydocs

        builder, made_by = pydocs.pydocs_builder(cache_dir), f"+{pydocs.maker_version()}"
    else:
        builder, made_by = _prepared_builder(name, Path(os.environ.get(TFDS_FOLDER) or cache_dir / "tfds")), ""
    if version and not builder.version.match(version):
        raise UserError(f"tfds:{name} is built here, only in version {builder.version}; remove {':' + version!r}")
    return tfds_source(builder, split, fields, made_by)


def _may_have_path(features: Any, path: str) -> bool:
    """Returns whether records may have a value at `path`; features do not say how long lists are."""
    if path in features:
        return True
    for part in path.split("."):
        inside = getattr(features, "feature", features)  # the element of a sequence
        if not part.isdecimal():
            if not (hasattr(inside, "keys") and part in inside):
                return False
            inside = inside[part]
        features = inside
    return True


def _feature_paths(features: Any) -> list[str]:
    """Returns the paths of all fields, without indices into lists."""
    names = []
    for name, feature in features.items():
        inside = getattr(feature, "feature", feature)
        names += [f"{name}.{below}" for below in _feature_paths(inside)] if hasattr(inside, "keys") else [name]
    return names


def tfds_source(builder: Any, split: str, fields: dict[str, str], made_by: str = "") -> TfdsSource:
    """Opens a split of a prepared TFDS builder.

    Args:
      builder: a `tfds.core.DatasetBuilder`, prepared in a format with random access.
      split: a split or a slice of one, for example "train[:1%]".
      fields: our name of a field ("inputs", "targets", "text", "group") -> its name in the data set.
      made_by: what the content id adds to the builder's version.

    Raises UserError for an unknown field or split, and for a format without random access.
    """
    info = builder.info
    for ours, theirs in fields.items():
        if not _may_have_path(info.features, theirs):
            hint = nearest(theirs, _feature_paths(info.features))
            raise UserError(f"source.{ours}: {info.full_name} has no field {theirs!r}; {hint}")
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
        raise UserError(f"{info.full_name}: split {split!r} cannot be read ({first_line(error)})") from error
    size = f"{info.splits[base].num_examples} records"
    return TfdsSource(
        content_id=f"tfds:{info.full_name}{made_by}:{split}:{fields_id(fields)}:{size}", records=records, fields=fields
    )


def _prepared_builder(name: str, data_dir: Path) -> Any:
    """Returns the builder of a data set in `data_dir`, after downloading the data if they are missing."""
    import tensorflow_datasets as tfds

    how = (
        f"prepare it on a machine with TensorFlow and a network: tfds build {name} --file_format=array_record "
        f"--data_dir={data_dir} (reading it needs no TensorFlow)"
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        there = [path.name for path in data_dir.iterdir()] if data_dir.is_dir() else []
        close = difflib.get_close_matches(
            name.split("/")[0], [*BUILT_IN, *tfds.list_builders(with_community_datasets=False), *there], n=1, cutoff=0.8
        )
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"tfds:{name} is not in {data_dir} and cannot be built here{hint}; or {how}") from error
    except (ValueError, RuntimeError, ImportError, AssertionError) as error:  # AssertionError: unknown version
        raise UserError(f"tfds:{name}: {first_line(error)}; {how}") from error
    if builder.is_prepared():
        return builder
    with locked(data_dir / f"{name.replace('/', '-')}"):
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # every data set's download fails in its own way
            raise UserError(f"tfds:{name} could not be prepared in {data_dir} ({first_line(error)}); {how}") from error
    return builder
