"""`twinstack convert`: foreign checkpoints to model folders and back, and from one family to the other."""

from pathlib import Path

from rich.console import Console

from common.progress import ProgressBars
from common.terminal import harmless
from experiments.models import convert as conversion


def convert(
    *, source: Path, destination: Path, to: str | None, rung: int | None, config: str | None, tokenizer: Path | None
) -> None:
    progress = ProgressBars(Console(stderr=True))
    remarks = conversion.convert(
        source, destination, progress, to=to, rung=rung, config_name=config, tokenizer=tokenizer
    )
    print(*map(harmless, remarks), sep="\n")
