"""`twinstack data show` and `twinstack data prepare`: prints the data of training, or tokenizes them."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console

from common.errors import UserError
from experiments.cli.chosen import Chosen, choose, print_resolved
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
    chosen = choose(name, overrides)
    if print_config:
        print_resolved(chosen.study)
        return
    if action == "show":
        show(chosen.selected, _shown(chosen), rows, Console())
    else:
        prepare_data(chosen.selected, Console(), workers=workers, to=to, beam=beam)


def _shown(chosen: Chosen) -> str:
    """Returns the arm that `arm=NAME` names, which may start from an arm before it; else the first."""
    named = {override.removeprefix("arm=") for override in chosen.overrides}
    return next((arm for arm in chosen.arms if arm in named), chosen.arms[0])
