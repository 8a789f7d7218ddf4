"""The parts of a report that need several seeds, many arms or a search, and its table for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.analysis.seeds import t_interval
from common.report import plots, study_plots
from common.report.findings import Findings, Measure, measures
from common.report.run_files import FinishedRun, StudyRuns
from common.report.run_list import Choice, short_names
from common.report.search import ArmTrials, reversals, trials_of, tuning
from common.report.tables import plain_text
from common.report.units import p_text, scientific, si

if TYPE_CHECKING:
    from rich.table import Table

MOST_COLUMNS = 6
"""Most arms that a page of one seed shows as columns side by side."""
FEW_COLUMNS = 4
"""Most arms of a larger study whose samples and configs are shown, of their first seed."""


def is_large(study: StudyRuns) -> bool:
    """Returns whether a study has several seeds or too many arms for one column each."""
    return study.seeds > 1 or len(study.first_seed) > MOST_COLUMNS


def columns(study: StudyRuns) -> tuple[FinishedRun, ...]:
    """Returns the runs that have a column of their own, each of another arm."""
    return study.first_seed[: FEW_COLUMNS if is_large(study) else MOST_COLUMNS]


def by_arm(study: StudyRuns) -> dict[str, list[FinishedRun]]:
    """Returns the compared runs of each arm by ascending seed, in the order of `first_seed`."""
    return {
        first.arm: sorted((run for run in study.compared if run.arm == first.arm), key=lambda run: run.seed)
        for first in study.first_seed
    }


def large_parts(study: StudyRuns, findings: Findings) -> dict[str, Any]:
    """Returns the template's variables of the parts that a large study has instead of columns side by side."""
    arms, shown = by_arm(study), measures(study)
    drawn = study.seeds > 1 and findings.found
    return {
        "tuned": _tuned(study),
        "measures": [f"{measure.name}, {measure.unit}" for measure in shown],
        "arm_rows": [_arm_row(study.listed.chosen.get(arm), runs, shown) for arm, runs in arms.items()],
        "comparisons": [
            {
                "arms": f"{finding.first} − {finding.second}",
                "measure": f"{finding.measure.name}, {finding.measure.unit}",
                "difference": finding.shown(finding.compared.difference),
                "seeds": len(finding.compared.seeds),
                "p": p_text(finding.resolution.p_value),
                "smallest": finding.measure.shown(finding.compared.smallest),
                "resolved": finding.resolution.resolved,
                "answer": finding.answer,
                "reasons": "; ".join(finding.resolution.reasons),
            }
            for finding in findings.found
        ],
        "differences_plot": study_plots.differences_plot(findings.found) if drawn else None,
        "seeds_plot": study_plots.seeds_plot(arms, shown),
        "loss_plots": [study_plots.curves_plot(arms, axis) for axis in plots.LOSS_AXES],
    }


def mean_cell(runs: Sequence[FinishedRun], measure: Measure) -> str:
    """Formats the mean over seeds with its t interval, which takes at least three seeds."""
    values = [value for run in runs if (value := measure.of(run)) is not None]
    if not values:
        return "–"
    mean = t_interval(np.array(values))
    if len(values) < 3:
        each = f" ({', '.join(map(measure.shown, values))})" if len(values) == 2 else ""
        return measure.shown(mean.value) + each
    return f"{measure.shown(mean.value)} [{measure.shown(mean.low)}, {measure.shown(mean.high)}]"


def arms_table(study: StudyRuns) -> "Table":
    """Returns a row for each arm for the terminal: means over seeds, with intervals from three seeds on."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = measures(study)
    caption = Text("means over seeds, 95 % intervals over seeds in brackets")
    table = Table(title=Text("Arms", "bold"), caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("")
    for head in ("seeds", _tuned(study), "parameters", *(f"{measure.name}, {measure.unit}" for measure in shown)):
        table.add_column(plain_text(head), justify="right")
    for arm, runs in by_arm(study).items():
        row = _arm_row(study.listed.chosen.get(arm), runs, shown)
        cells = (arm, str(row["seeds"]), row["rate"], row["parameters"], *row["means"])
        table.add_row(*map(plain_text, cells))
    return table


def _tuned(study: StudyRuns) -> str:
    """Returns the heading of what `Trial.words` says: the learning rate comes first."""
    return "learning rate and others" if any(run.listed.tried for run in study.compared) else "learning rate"


def _arm_row(choice: Choice | None, runs: Sequence[FinishedRun], shown: Sequence[Measure]) -> dict[str, Any]:
    result = runs[0].result
    return {
        "seeds": len(runs),
        "rate": runs[0].trial.words + (" (edge)" if choice is not None and choice.at_edge else ""),
        "parameters": si(result.parameters),
        "flops": scientific(result.flops.full_attention),
        "means": [mean_cell(runs, measure) for measure in shown],
    }


def search_parts(study: StudyRuns, findings: Findings) -> dict[str, Any]:
    """Returns the template's variables of the search, empty ones if there was none."""
    trials = trials_of(study)
    if not trials:
        return {"trials": []}
    return {
        "trials": [
            {
                "chosen": arm.choice.trial.words if arm.choice else "not chosen yet",
                "trials": len(arm.losses),
                "tried": _tried(arm),
                "best": f"{min(arm.means.values()):.4f}" if arm.losses else "–",
                "edge": _edges(study, arm),
            }
            for arm in trials
        ],
        "tuned": _tuned(study),
        "trial_seeds": study.study["search"]["seeds"],
        "trial_plots": study_plots.trial_plots(trials),
        "effort_plot": study_plots.effort_plot(trials),
        "reversals": list(reversals(trials, ((found.first, found.second) for found in findings.found))),
    }


def _tried(arm: ArmTrials) -> str:
    """Returns every rate that was tried; of several hyperparameters, the lowest and the highest value of each."""
    trials = list(arm.losses)
    if not any(trial.also for trial in trials):
        return ", ".join(f"{trial.rate:g}" for trial in trials)
    columns = {"learning rate": [trial.rate for trial in trials]}
    names = short_names([path for path, _ in trials[0].also])
    columns |= {names[path]: [dict(trial.also)[path] for trial in trials] for path in names}
    return ", ".join(f"{name} {min(values):g} to {max(values):g}" for name, values in columns.items())


def _edges(study: StudyRuns, arm: ArmTrials) -> str:
    """Returns the hyperparameters of which an arm's best trial lies at the edge, in words; "" if there is none."""
    found = tuning(study, arm.arm)
    return " and ".join(found.edges) if found is not None else ""
