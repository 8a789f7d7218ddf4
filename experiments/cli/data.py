"""`twinstack data show` and `twinstack data prepare`: prints the data of training, or tokenizes them."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console

from common.errors import UserError
from experiments.cli.chosen import choose, print_resolved
from experiments.cli.prepare_data import prepare_data
from experiments.cli.show_data import show


def data(
    *,
    action: Literal["show", "prepare"],
    name: str,
    overrides: Sequence[str],
    print_config: bool,
    rows: int,
    workers: int | None,
    to: str | None,
    beam: Sequence[str] | None,
) -> None:
    for_prepare = {"workers": workers, "to": to, "beam": beam}
    given = [option for option, value in for_prepare.items() if value is not None]
    if action != "prepare" and given:
        raise UserError(f"--{given[0]} is for `twinstack data prepare`, not for {action}")
    if beam is not None and to is None:
        raise UserError("--beam needs a folder or url that its workers share: put --to before it")
    experiment = choose(name, overrides).experiment
    if print_config:
        print_resolved(experiment)
        return
    if action == "show":
        show(experiment, rows, Console())
    else:
        prepare_data(experiment, Console(), workers=workers, to=to, beam=beam)
