"""A study: a question, the arms that answer it, how often each is trained, and what it claims to hold equal.

An arm is a run before its seed and its learning rate are set. Training an arm with one seed and one rate gives a
trained model; `experiments.members` lists them all.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

from common.compute.matching import matching_widths, unequal
from common.compute.model_config import ModelConfig as AnyModel
from common.errors import UserError, nearest
from common.files import plain_name
from common.ranges import Count, check_ranges
from common.report.claims import Parity
from common.train.config import Budget
from experiments.run import Label, Run
from experiments.search import Search, check_search

RESERVED_LABELS = ("arm", "run", "seed", "learning_rate")
"""Labels that every run of a study gets by itself, and `run`, which selects runs by their names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    question: str
    expected: str = ""
    """What the study's author saw, and on what machine."""
    arms: dict[str, Run]
    seeds: Count = 1
    """How often each arm is trained. Seed i adds i to the arm's own `train.seed` and `data.seed`."""
    search: Search | None = None
    """None: every arm trains at its own learning rate."""
    parity: tuple[Parity, ...] = (Parity(),)
    factors: tuple[str, ...] = ()
    """Labels with two values each, whose combinations are the arms: the report shows what each of them does on average
    over the others, and which of them depend on each other. The first arm has the values that count as unchanged."""

    def __post_init__(self) -> None:
        check_ranges(self)
        plain_name(self.name, "name")
        if not self.arms:
            raise UserError(f"study {self.name!r} has no arms")
        for name, arm in self.arms.items():
            plain_name(name, "arms")
            if taken := [label for label in arm.labels if label in RESERVED_LABELS]:
                raise UserError(f"arms.{name}.labels has {taken[0]!r}, which every run gets by itself: rename it")
            if arm.after is not None and arm.after.arm not in self.arms:
                unknown = arm.after.arm
                raise UserError(f"arms.{name}.after.arm: unknown arm {unknown!r}: {nearest(unknown, self.arms)}")
        list(self.in_order())
        for claim in self.parity:
            for label in claim.over:
                if label not in (labels := self.label_names()):
                    raise UserError(f"parity.over: no arm has the label {label!r}: {nearest(label, labels)}")
        self._check_factors()
        if self.search is not None:
            check_search(self.search, self.arms)

    def _check_factors(self) -> None:
        cells = [tuple(arm.labels.get(factor) for factor in self.factors) for arm in self.arms.values()]
        levels = [set(values) for values in zip(*cells, strict=True)] if self.factors else []
        for factor, values in zip(self.factors, levels, strict=True):
            if len(values) != 2 or None in values:
                shown = ", ".join(sorted(map(str, values)))
                raise UserError(f"factors: {factor!r} must be a label with two values in all arms; it has {shown}")
        if self.factors and (len(set(cells)), len(cells)) != (2 ** len(self.factors),) * 2:
            raise UserError(
                f"factors: the arms have {len(set(cells))} combinations of {', '.join(self.factors)} in {len(cells)} "
                f"arms; each of the {2 ** len(self.factors)} must be one arm"
            )

    def in_order(self) -> Iterator[str]:
        """Yields the names of the arms, each after the arm that it starts from. Raises UserError for a circle."""
        done: set[str] = set()
        while len(done) < len(self.arms):
            ready = [
                n for n, arm in self.arms.items() if n not in done and (arm.after is None or arm.after.arm in done)
            ]
            if not ready:
                raise UserError(f"arms start from each other in a circle: {', '.join(sorted(set(self.arms) - done))}")
            yield from ready
            done.update(ready)

    def label_names(self) -> tuple[str, ...]:
        """Returns the labels by which runs can be selected and grouped."""
        own = dict.fromkeys(label for arm in self.arms.values() for label in arm.labels)
        return ("arm", *own)

    def labels(self, arm: str) -> dict[str, Label]:
        """Returns an arm's labels, its name among them."""
        return {"arm": arm, **self.arms[arm].labels}

    def edited(self, edit: Callable[[Run], Run], arms: Sequence[str] | None = None) -> Self:
        """Returns the study with `edit` applied to its arms (None: all)."""
        names = self.arms if arms is None else arms
        edited = {name: edit(arm) if name in names else arm for name, arm in self.arms.items()}
        return dataclasses.replace(self, arms=edited)

    def selected(self, wanted: Mapping[str, Sequence[str]]) -> Self:
        """Returns the study with the arms whose labels match one of the patterns of each key, as text.

        The arms that these start from stay too. Raises UserError where a label is unknown or nothing matches.
        """
        kept = [name for name in self.arms if _matches(self.labels(name), wanted)]
        if not kept:
            values = {key: sorted({str(self.labels(name).get(key, "")) for name in self.arms}) for key in wanted}
            raise UserError(f"no arm has {_words(wanted)}; there are {_words(values)}")
        for name in kept:  # grows while it is read
            after = self.arms[name].after
            if after is not None and after.arm not in kept:
                kept.append(after.arm)
        return self.only(kept)

    def only(self, arms: Sequence[str]) -> Self:
        """Returns the study with these arms; without its factors, and claims about labels that none of them has."""
        if len(kept := {name: arm for name, arm in self.arms.items() if name in arms}) == len(self.arms):
            return self
        labels = {"arm", *(label for arm in kept.values() for label in arm.labels)}
        claims = tuple(claim for claim in self.parity if labels.issuperset(claim.over))
        return dataclasses.replace(self, arms=kept, factors=(), parity=claims)

    def equal_steps(self) -> Self:
        """Returns the study with budgets in steps, those of the most expensive arm, where steps are claimed equal."""
        steps = {name: arm.steps for name, arm in self.arms.items()}
        for claim in self.parity:
            for group in self.groups(claim):
                if claim.steps:
                    steps |= dict.fromkeys(group, min(steps[name] for name in group))
        return dataclasses.replace(
            self,
            arms={name: _with_steps(arm, steps[name]) for name, arm in self.arms.items()},
        )

    def groups(self, claim: Parity) -> list[list[str]]:
        """Returns the arms between which a parity claim holds, group by group."""
        found: dict[tuple[tuple[str, Label], ...], list[str]] = {}
        for name in self.arms:
            own = {} if "arm" in claim.over else self.arms[name].labels
            shared = {label: value for label, value in own.items() if label not in claim.over}
            found.setdefault(tuple(sorted(shared.items())), []).append(name)
        return list(found.values())

    def check(self) -> None:
        """Raises UserError where an arm's model has too few token rows or positions for its data."""
        for name, arm in self.arms.items():
            arm.check(name)

    def remarks(self) -> list[str]:
        """Returns a warning for each setting that is allowed but rarely intended."""
        warnings = []
        for claim in self.parity:
            for group in self.groups(claim) if claim.flops_within is not None else ():
                models: dict[str, AnyModel] = {name: self.arms[name].model for name in group}
                if (apart := unequal(models, self.arms[group[0]].data.length_sums)) is not None:
                    warnings.append(f"{apart} (the certificate allows {claim.flops_within:.0%})")
        return [*warnings, *dict.fromkeys(filter(None, (arm.remark() for arm in self.arms.values())))]

    def matching(self, reference: str) -> list[str]:
        """Returns overrides of `d_ff` that give the other arms as many training FLOPs as the arm `reference`.

        Raises UserError for an unknown arm, and where no `d_ff` matches.
        """
        if reference not in self.arms:
            raise UserError(f"--match {reference!r} is no arm: {nearest(reference, self.arms)}")
        models: dict[str, AnyModel] = {name: arm.model for name, arm in self.arms.items()}
        widths = matching_widths(models, reference, self.arms[reference].data.length_sums)
        return [f"arms.{name}.model.d_ff={width}" for name, width in widths.items()]


def _matches(labels: Mapping[str, Label], wanted: Mapping[str, Sequence[str]]) -> bool:
    return all(
        key in labels and any(fnmatch.fnmatchcase(str(labels[key]), pattern) for pattern in patterns)
        for key, patterns in wanted.items()
    )


def _words(values: Mapping[str, Sequence[str]]) -> str:
    return " ".join(f"{key}={','.join(items)}" for key, items in values.items())


def _with_steps(run: Run, steps: int) -> Run:
    if run.train.budget.unit == "steps":
        return run
    budget = Budget(unit="steps", amount=float(steps))
    return dataclasses.replace(run, train=dataclasses.replace(run.train, budget=budget))
