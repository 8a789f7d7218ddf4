"""Tokenised sources are put at an url: shard by shard, and the manifest last, so that a manifest means all is there."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common.data.sources.files import file_system
from common.data.tokenized.prepare import Destination, Folder, finish
from common.data.tokenized.prepared import MANIFEST, PROBLEMS
from common.data.tokenized.remote_folder import RemoteFolder
from common.data.tokenized.shards import REPORT, ShardReport, ShardTask, write_shard
from common.files import read_json
from common.paths import check_folder, user_path


@dataclasses.dataclass(frozen=True)
class Remote:
    """An url. A shard is written here, sent, and forgotten here; its report, sent last, says that it is there."""

    folder: RemoteFolder

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> dict | None:
        return self.folder.read_json(MANIFEST)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Nobody is kept out: two that make the same send the same bytes."""
        return contextlib.nullcontext()

    def write(self, number: int, task: ShardTask, tick: Callable[[int], None]) -> ShardReport:
        name = REPORT.format(number=number)
        if (there := self.folder.read_json(name)) is not None:
            report = ShardReport(**there)
            tick(report.records)
            return report
        with tempfile.TemporaryDirectory() as temporary:
            here = Path(temporary)
            report = write_shard(number, task, here, tick)
            self.folder.make()
            for file in report.hashes:
                self.folder.send(here / file)
        self.folder.send_json(name, dataclasses.asdict(report))
        return report

    def finish(self, task: ShardTask, reports: Sequence[ShardReport]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            here = Path(temporary)
            finish(task, here, reports)
            self.folder.send(here / PROBLEMS)
            self.folder.send_json(MANIFEST, read_json(here / MANIFEST))
        for number in range(len(reports)):
            self.folder.remove(REPORT.format(number=number))


def destination(to: str, task: ShardTask) -> Destination:
    """The task's own folder in `to`, a folder here or an url."""
    if "://" in to:
        return Remote(RemoteFolder(f"{to.rstrip('/')}/{task.key()}"))
    return Folder(user_path(to) / task.key())


def check_destination(to: str) -> None:
    """Raises UserError where nothing can be put in `to`, as far as can be told without trying."""
    if "://" in to:
        file_system(to)
        return
    folder = user_path(to, "--to")
    check_folder(folder, "--to")
    folder.mkdir(parents=True, exist_ok=True)
