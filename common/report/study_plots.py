"""Draws the plots of a report of several seeds or many arms.

Legend: S seeds, P points.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.analysis.seeds import t_interval
from common.report.drawing import FAINT, GROUND, colour, draw_value, line, marker, svg
from common.report.findings import Finding, Measure
from common.report.plots import MAX_POINTS, place_of, set_log_losses, set_loss_axes, smooth
from common.report.run_files import FinishedRun
from common.report.run_list import Trial, short_names
from common.report.search import ArmTrials

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 3
"""Most measures that are drawn side by side."""
WIDEST_LABEL = 44
"""Characters in a line of a comparison's name."""
MOST_ON_A_GRID = 12
"""More values of a hyperparameter than this were drawn at random, so that some would share a place as ticks."""
SHIFT = 0.24
"""How far below an arm's mean its seeds are drawn, in rows."""


def seeds_plot(arms: Mapping[str, Sequence[FinishedRun]], measures: Sequence[Measure]) -> "Markup":
    """Draws by each measure every arm's mean with its t interval and, below it, each seed's value.

    Only the first `MOST_PANELS` measures are drawn.
    """
    measures = measures[:MOST_PANELS]

    def draw(figure: "Figure") -> None:
        all_axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(all_axes, measures, strict=True):
            for i, runs in enumerate(arms.values()):
                _draw_seeds(axes, i, [value for run in runs if (value := measure.of(run)) is not None])
            axes.set_title(f"{measure.name}, {measure.unit}", fontsize=9.5, loc="left")
            axes.margins(x=0.08)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        all_axes[0].set_yticks(range(len(arms)), list(arms), parse_math=False)
        all_axes[0].set_ylim(len(arms) - 0.5, -0.5)

    return svg("seeds", (10.4, 0.9 + 0.48 * len(arms)), draw)


def _draw_seeds(axes: "Axes", arm: int, values: Sequence[float]) -> None:
    if not values:
        return
    below = [arm + SHIFT] * len(values)
    axes.plot(values, below, marker(arm), color=colour(arm), markersize=4, alpha=0.6, markeredgewidth=0)
    mean = t_interval(np.array(values))
    if len(values) > 2:  # the interval of two seeds would fill the plot
        draw_value(axes, arm, (mean.value, mean.low, mean.high), arm)
    else:
        draw_value(axes, arm, (mean.value,) * 3, arm)


def differences_plot(found: Sequence[Finding]) -> "Markup":
    """Draws every comparison by each measure with its t interval over seeds: filled if resolved, open if not.

    Only the first `MOST_PANELS` measures are drawn.
    """
    shown = list(dict.fromkeys(finding.measure for finding in found))[:MOST_PANELS]
    rows = list(dict.fromkeys((finding.first, finding.second) for finding in found))

    def draw(figure: "Figure") -> None:
        all_axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, measure in zip(all_axes, shown, strict=True):
            axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
            for finding in found:
                if finding.measure == measure:
                    _draw_difference(axes, rows.index((finding.first, finding.second)), finding)
            better = "right" if measure.higher_is_better else "left"
            axes.set_title(f"{measure.name}, {measure.unit}\n{better}: the first is better", fontsize=9, loc="left")
            axes.margins(x=0.08)
            axes.locator_params(axis="x", nbins=6)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        labels = [textwrap.fill(f"{first} − {second}", WIDEST_LABEL) for first, second in rows]
        all_axes[0].set_yticks(range(len(rows)), labels, parse_math=False, fontsize=8.5)
        all_axes[0].set_ylim(len(rows) - 0.5, -0.5)

    return svg("differences", (10.4, 0.9 + 0.48 * len(rows)), draw)


def _draw_difference(axes: "Axes", row: int, finding: Finding) -> None:
    difference = finding.compared.difference
    ends = (difference.low, difference.high)
    if math.isfinite(difference.low):
        axes.plot(ends, [row, row], color=colour(0), linewidth=1.6, solid_capstyle="round")
    inside = colour(0) if finding.resolution.resolved else GROUND
    axes.plot([difference.value], [row], "o", color=colour(0), markersize=7, markerfacecolor=inside)


def curves_plot(arms: Mapping[str, Sequence[FinishedRun]], axis: str) -> "Markup":
    """Draws each arm's smoothed training loss and its validation loss as means over seeds, with the seeds' range."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, runs in enumerate(arms.values()):
            _draw_curve(axes, i, runs, axis)
            _draw_validation(axes, i, runs, axis)
        set_loss_axes(axes, axis)

    return svg(f"loss against {axis}", (3.7, 3.0), draw)


def _draw_curve(axes: "Axes", arm: int, runs: Sequence[FinishedRun], axis: str) -> None:
    """Draws the training loss at the steps that all seeds have."""
    curves = []
    for run in runs:
        kept = [row for row in run.metrics if row.loss is not None and math.isfinite(row.loss) and row.loss > 0]
        if kept:
            losses = smooth(np.array([row.loss for row in kept], float))
            x_of = place_of(run, axis)
            curves.append({row.step: (x_of(row), loss) for row, loss in zip(kept, losses, strict=True)})
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return
    thin = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    points_SP2 = np.array([[curve[steps[i]] for i in thin] for curve in curves])
    x_P, loss_SP = points_SP2[..., 0].mean(axis=0), points_SP2[..., 1]
    if len(curves) > 1:
        axes.fill_between(x_P, loss_SP.min(axis=0), loss_SP.max(axis=0), color=colour(arm), alpha=0.18, linewidth=0)
    axes.plot(x_P, loss_SP.mean(axis=0), line(arm), color=colour(arm), linewidth=1.5)


def _draw_validation(axes: "Axes", arm: int, runs: Sequence[FinishedRun], axis: str) -> None:
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        x_of = place_of(run, axis)
        for row in run.metrics:
            loss, x = row.validation_loss, x_of(row)
            if loss is not None and loss > 0 and math.isfinite(loss) and math.isfinite(x):
                by_step.setdefault(row.step, []).append((x, loss))
    points = [np.mean(found, axis=0) for found in by_step.values()]
    if points:
        style: dict[str, Any] = {"color": colour(arm), "markeredgecolor": GROUND, "markeredgewidth": 0.8}
        axes.plot(*np.array(points).T, marker(arm), markersize=5, **style)


def trial_plots(trials: Sequence[ArmTrials]) -> list["Markup"]:
    """Draws the validation loss of every trial against its learning rate, then against each other hyperparameter."""
    paths = dict.fromkeys(path for arm in trials for trial in arm.losses for path, _ in trial.also)
    names = short_names(list(paths))
    others = [_trial_plot(trials, names[path], functools.partial(_value, path)) for path in paths]
    return [_trial_plot(trials, "learning rate", lambda trial: trial.rate), *others]


def _value(path: str, trial: Trial) -> float:
    return dict(trial.also)[path]


def _trial_plot(trials: Sequence[ArmTrials], name: str, x_of: Callable[[Trial], float]) -> "Markup":
    """Draws the validation loss of every trial against one hyperparameter; the chosen trials have large markers.

    A line connects the lowest mean at each value, unless each trial of several hyperparameters has a value of its own.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = sorted({x_of(trial) for arm in trials for trial in arm.losses})

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        if values and values[0] > 0:
            axes.set_xscale("log")
        elif values:  # 0 has no logarithm
            axes.set_xscale("symlog", linthresh=min((x for x in values if x > 0), default=1.0))
        for i, arm in enumerate(trials):
            _draw_trials(axes, i, arm, x_of)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(values)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        set_log_losses(axes)
        axes.set_xlabel(name)
        axes.set_ylabel("validation loss")

    return svg(f"loss against {name}", (5.2, 3.4), draw)


def _ticks(values: Sequence[float]) -> Sequence[float]:
    """Returns the values of a grid, thinned if there are many; of random draws, five places between the ends."""
    if len(values) > MOST_ON_A_GRID and values[0] > 0:
        return [float(f"{x:.2g}") for x in np.geomspace(values[0], values[-1], 5)]
    return values[:: max(1, len(values) // 6)]


def _draw_trials(axes: "Axes", i: int, arm: ArmTrials, x_of: Callable[[Trial], float]) -> None:
    seeds = [(x_of(trial), loss) for trial, losses in arm.losses.items() for loss in losses if math.isfinite(loss)]
    means = {trial: loss for trial, loss in arm.means.items() if math.isfinite(loss)}
    if not means:
        return
    axes.plot(*zip(*seeds, strict=True), marker(i), color=colour(i), markersize=3.5, alpha=0.5)
    lowest: dict[float, float] = {}
    for trial, loss in means.items():
        lowest[x_of(trial)] = min(loss, lowest.get(x_of(trial), math.inf))
    if len(lowest) < len(means) or not any(trial.also for trial in means):
        axes.plot(*zip(*sorted(lowest.items()), strict=True), line(i), color=colour(i), linewidth=1.5)
    if arm.choice is not None and (best := means.get(arm.choice.trial)) is not None:
        style: dict[str, Any] = {"color": colour(i), "markeredgecolor": GROUND, "markeredgewidth": 1}
        axes.plot([x_of(arm.choice.trial)], [best], marker(i), markersize=9, **style)


def effort_plot(trials: Sequence[ArmTrials]) -> "Markup":
    """Draws the expected validation loss of the best of k trials against k."""
    from matplotlib.ticker import MaxNLocator

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, arm in enumerate(trials):
            known = [(k, loss) for k, loss in enumerate(arm.expected_best, start=1) if math.isfinite(loss)]
            if known:
                style: dict[str, Any] = {"color": colour(i), "markeredgecolor": GROUND, "linewidth": 1.5}
                axes.plot(*zip(*known, strict=True), f"{marker(i)}{line(i)}", markersize=6, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        set_log_losses(axes)
        axes.set_xlabel("trials")
        axes.set_ylabel("expected best validation loss")

    return svg("expected best of k trials", (5.2, 3.4), draw)
