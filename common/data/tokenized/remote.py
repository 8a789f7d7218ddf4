"""Writes tokenised sources to a URL, shard by shard. The manifest comes last and marks the source as complete."""

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
    """A folder at a URL. A shard is written locally, sent and removed; its report, sent last, marks it complete."""

    folder: RemoteFolder

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> dict | None:
        return self.folder.read_json(MANIFEST)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Locks nothing: two processes that write the same source send the same bytes."""
        return contextlib.nullcontext()

    def write(self, shard: int, task: ShardTask, tick: Callable[[int], None]) -> ShardReport:
        name = REPORT.format(shard=shard)
        if (finished := self.folder.read_json(name)) is not None:
            report = ShardReport(**finished)
            tick(report.records)
            return report
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary)
            report = write_shard(shard, task, local, tick)
            self.folder.make()
            for file in report.hashes:
                self.folder.send(local / file)
        self.folder.send_json(name, dataclasses.asdict(report))
        return report

    def finish(self, task: ShardTask, reports: Sequence[ShardReport]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary)
            finish(task, local, reports)
            self.folder.send(local / PROBLEMS)
            self.folder.send_json(MANIFEST, read_json(local / MANIFEST))
        for shard in range(len(reports)):
            self.folder.remove(REPORT.format(shard=shard))


def destination(to: str, task: ShardTask) -> Destination:
    """Returns the task's own folder in `to`, a local folder or a URL."""
    if "://" in to:
        return Remote(RemoteFolder(f"{to.rstrip('/')}/{task.key()}"))
    return Folder(user_path(to) / task.key())


def check_destination(to: str) -> None:
    """Raises UserError if `to` is a URL of an unknown kind, or a folder that cannot be made."""
    if "://" in to:
        file_system(to)
        return
    folder = user_path(to, "--to")
    check_folder(folder, "--to")
    folder.mkdir(parents=True, exist_ok=True)
