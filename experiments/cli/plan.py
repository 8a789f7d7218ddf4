"""`twinstack plan`: every arm's cost and memory before anything is trained."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from common.errors import UserError
from experiments.cli.chosen import choose, print_resolved
from experiments.planning import plan as planning


def plan(
    *,
    name: str,
    overrides: Sequence[str],
    print_config: bool,
    match: str | None,
    topology: str | None,
    slices: int | None,
    mesh: str | None,
    price: float | None,
    search: bool,
) -> None:
    for_slices = {"slices": slices, "mesh": mesh, "price": price, "search": search or None}
    given = [option for option, value in for_slices.items() if value is not None]
    if given and topology is None:
        raise UserError(f"--{given[0]} is for a TPU slice: name it by --topology, such as --topology v5e:4x4")
    chosen = choose(name, overrides, match=match)
    if print_config:
        print_resolved(chosen.study)
        return
    # Arms that are not selected may decide how many steps the others take.
    study = dataclasses.replace(chosen, study=chosen.study.equal_steps()).selected
    target = None
    if topology is not None:
        target = planning.Target(
            topology=topology, slices=1 if slices is None else slices, mesh=mesh, price=price, search=search
        )
    planning.plan(study, Console(), target)
