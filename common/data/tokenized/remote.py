"""Writes tokenised sources to a URL, shard by shard. The manifest, sent last, marks the source as complete.

`destination` returns where to write: to a URL with `Remote`, or to a local folder with `prepare.Folder`.
"""

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
    """A folder at a URL.

    A shard's files are written to a temporary local folder and sent. Its report, sent after them, marks the shard as
    complete.
    """

    folder: RemoteFolder

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> dict | None:
        return self.folder.read_json(MANIFEST)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Locks nothing, and needs no lock: two processes that write the same source send the same bytes."""
        return contextlib.nullcontext()

    def write(self, shard: int, task: ShardTask, tick: Callable[[int], None]) -> ShardReport:
        """Writes one shard, unless its report is there; `tick` is called with counts of records that are done."""
        report_name = REPORT.format(shard=shard)
        if (finished := self.folder.read_json(report_name)) is not None:
            report = ShardReport(**finished)
            tick(report.records)
            return report
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary)
            report = write_shard(shard, task, local, tick)
            self.folder.make()
            for file_name in report.hashes:
                self.folder.send(local / file_name)
        self.folder.send_json(report_name, dataclasses.asdict(report))
        return report

    def finish(self, task: ShardTask, reports: Sequence[ShardReport]) -> None:
        """Sends the list of problems and the manifest, then removes the reports, which the manifest replaces."""
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary)
            finish(task, local, reports)
            self.folder.send(local / PROBLEMS)
            self.folder.send_json(MANIFEST, read_json(local / MANIFEST))
        for shard in range(len(reports)):
            self.folder.remove(REPORT.format(shard=shard))


def destination(to: str, task: ShardTask) -> Destination:
    """Returns the folder for the task in `to`, a local folder or a URL; its name is the task's key."""
    if "://" in to:
        return Remote(RemoteFolder(f"{to.rstrip('/')}/{task.key()}"))
    return Folder(user_path(to) / task.key())


def check_destination(to: str) -> None:
    """Makes the folder `to`, or checks the protocol of the URL `to`. Raises UserError if this fails."""
    if "://" in to:
        file_system(to)
        return
    folder = user_path(to, "--to")
    check_folder(folder, "--to")
    folder.mkdir(parents=True, exist_ok=True)
