"""The TFDS builder of the built-in data set `pydocs`: documentation and library source of the running Python.

It is for language modelling without a download. Like `cldr_translate` it is an ordinary builder that writes ArrayRecord
files, without TensorFlow. This module imports tensorflow_datasets, which is slow: import it inside the function that
uses it.
"""

import hashlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from common.data.built_in.pydocs_text import (
    DATA_SHARE,
    SKIPPED_PACKAGES,
    Document,
    documents,
    modules,
    standard_library,
)
from common.data.built_in.shares import SPLIT_PER_MILLE, split_by_hash
from common.data.built_in.tfds_builders import one_bar
from common.data.cache import build_once

FIELDS = ("text", "module", "kind")


class Pydocs(tfds.core.GeneratorBasedBuilder):
    """Records {"text", "module", "kind"}; splits train, validation and test.

    All text of one top-level module is in one split. The metadata record how many files could not be read.
    """

    VERSION = tfds.core.Version("1.0.0")

    limit: int | None = None
    """The most topics, and the most files, to read (for tests); all of them if None."""
    tick: Callable[[], object] = staticmethod(lambda: None)
    """Progress callback, called once per file."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Language reference, docstrings and standard library of a Python, one document per topic, per "
            "module's docstrings and per module's source text.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in FIELDS}),
            homepage="https://docs.python.org",
            license="Python Software Foundation License Version 2",
            metadata=tfds.core.MetadataDict(unreadable_files=0),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict]]]:
        made = documents(self.limit, self.tick)
        self.info.metadata["unreadable_files"] = made.unreadable
        splits: dict[str, list[Document]] = {name: [] for name in SPLIT_PER_MILLE}
        for document in made.found:
            splits[split_by_hash(document.family)].append(document)
        return {name: self._generate_examples(members) for name, members in splits.items() if members}

    def _generate_examples(self, members: list[Document]) -> Iterator[tuple[str, dict]]:
        for document in members:
            record = {name: getattr(document, name) for name in FIELDS}
            yield f"{document.kind} {document.module}", record


def maker_version(limit: int | None = None) -> str:
    """Returns the versions that the documents depend on: this builder, the running Python, and which files are read."""
    rules = hashlib.blake2b(repr((sorted(SKIPPED_PACKAGES), DATA_SHARE, limit)).encode(), digest_size=4).hexdigest()
    return f"{Pydocs.VERSION}-{platform.python_implementation().lower()}-{platform.python_version()}-rules-{rules}"


def pydocs_builder(cache_dir: Path, limit: int | None = None) -> tfds.core.DatasetBuilder:
    """Returns a builder with prepared data. Each `maker_version` has its own folder in the cache.

    Args:
      cache_dir: the folder for everything that can be rebuilt; safe with several processes and after a killed one.
      limit: the most topics, and the most files (for tests); None: no limit.
    """

    def build(folder: Path) -> None:
        files = sum(1 for _ in modules(standard_library()))
        with one_bar("making pydocs", files if limit is None else min(limit, files)) as tick:
            builder = Pydocs(data_dir=folder, file_format="array_record")
            builder.limit, builder.tick = limit, tick
            builder.download_and_prepare()

    folder = build_once(cache_dir / "tfds" / f"pydocs-{maker_version(limit)}", build)
    return tfds.builder_from_directory(folder / Pydocs.name / str(Pydocs.VERSION))
