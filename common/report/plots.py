"""Draws the plots of a report that shows one run of each arm.

Legend: P points.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.evals.measure import TextScore
from common.report.drawing import FAINT, GROUND, colour, draw_value, marker, svg
from common.report.results import ArmResult
from common.report.run_files import FinishedRun, MetricsRow
from common.report.tables import find_score, group_rows
from common.report.units import scientific, si

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 800
"""Most points of a curve."""
LOSS_AXES = ("tokens", "FLOPs", "seconds")


def loss_plot(runs: Sequence[FinishedRun], axis: str) -> "Markup":
    """Draws training loss (smoothed, with faint raw values) and validation loss against one of `LOSS_AXES`.

    The loss axis is logarithmic, because the last tenth of the fall matters most. Non-finite losses are not drawn.
    """
    assert axis in LOSS_AXES, axis

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, run in enumerate(runs):
            _draw_loss(axes, run, axis, i)
        set_loss_axes(axes, axis)

    return svg(f"loss against {axis}", (3.7, 3.0), draw)


def set_loss_axes(axes: "Axes", axis: str) -> None:
    """Sets scales, ticks and labels of a plot of losses against one of `LOSS_AXES`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    show: Callable[[float], str] = (lambda x: scientific(x, 2)) if axis == "FLOPs" else si
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    set_log_losses(axes)
    axes.set_xlabel(f"training {axis}" if axis != "seconds" else "seconds of training")


def set_log_losses(axes: "Axes") -> None:
    """Makes the y axis logarithmic, with plain numbers; an empty plot stays as it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not np.isfinite(axes.dataLim.minposy):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _draw_loss(axes: "Axes", run: FinishedRun, axis: str, arm: int) -> None:
    x_of = place_of(run, axis)
    x_P = np.array([x_of(row) for row in run.metrics], float)
    loss_P = np.array([row.loss for row in run.metrics], float)
    kept = np.isfinite(x_P) & np.isfinite(loss_P) & (loss_P > 0)
    x_P, loss_P = x_P[kept], loss_P[kept]
    if len(x_P):
        thin = np.unique(np.linspace(0, len(x_P) - 1, MAX_POINTS).round().astype(int))
        axes.plot(x_P[thin], loss_P[thin], color=colour(arm), linewidth=0.8, alpha=0.25)
        axes.plot(x_P[thin], smooth(loss_P)[thin], color=colour(arm), linewidth=1.6)
    validated = [(x_of(row), row.validation_loss) for row in run.metrics if row.validation_loss]
    points = [(x, y) for x, y in validated if np.isfinite(x) and np.isfinite(y) and y > 0]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            marker(arm),
            color=colour(arm),
            markersize=6,
            markeredgecolor=GROUND,
            markeredgewidth=1,
        )


def place_of(run: FinishedRun, axis: str) -> Callable[[MetricsRow], float]:
    """Returns where a step of a run lies on one of `LOSS_AXES`."""
    seconds = {row.step: row.seconds for row in run.timings}
    places: dict[str, Callable[[MetricsRow], float]] = {
        "tokens": lambda row: row.tokens,
        "FLOPs": lambda row: row.flops,
        "seconds": lambda row: seconds.get(row.step, np.nan),
    }
    return places[axis]


def smoothing_window(points: int) -> int:
    """Returns how many steps a smoothed point averages."""
    return max(1, points // 40)


def smooth(values_P: np.ndarray) -> np.ndarray:
    """Returns the trailing mean over `smoothing_window` points, over fewer at the start; float64 [P].

    >>> smooth(np.arange(80.0))[[0, 1, 79]].tolist()
    [0.0, 0.5, 78.5]
    """
    window = smoothing_window(len(values_P))
    sums = np.concatenate([[0.0], np.cumsum(values_P, dtype=np.float64)])
    ends = np.arange(1, len(values_P) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def groups_plot(results: Sequence[ArmResult], split: str) -> "Markup":
    """Draws exact match of `split` and of each kind in it: one dot per arm, with its 95 % interval."""
    from matplotlib.ticker import FuncFormatter

    names = ["all", *(row.label for row in group_rows(results, split))]
    scores = [[find_score(result, split, name) for result in results] for name in names]
    labels = [f"{name} ({_example_counts(row)})" for name, row in zip(names, scores, strict=True)]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i in range(len(results)):
            shift = (i - (len(results) - 1) / 2) * min(0.26, 0.7 / len(results))
            _draw_scores(axes, [row[i] for row in scores], shift, i)
        axes.set_yticks(range(len(names)), labels, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.axhline(0.5, color=FAINT, linewidth=0.8)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(right=100.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))

    return svg(f"exact match, {split}", (10.4, 0.75 + 0.36 * len(names)), draw)


def arms_plot(results: Sequence[ArmResult]) -> "Markup":
    """Draws exact match on the first split, validation loss and parameters of all arms in order."""
    from matplotlib.ticker import FuncFormatter

    split = next((score.split for result in results for score in result.scores), "")
    wholes = [find_score(result, split, "all") for result in results]
    columns: list[tuple[str, list[tuple[float, float, float] | None], Callable[[float], str]]] = [
        ("validation loss, nats per token", [(r.validation_loss,) * 3 for r in results], lambda x: f"{x:g}"),
        ("parameters", [(float(r.parameters),) * 3 for r in results], si),
    ]
    if any(wholes):
        matches = [w.exact_match if w else None for w in wholes]
        shares = [(100 * m.value, 100 * m.low, 100 * m.high) if m else None for m in matches]
        columns.insert(0, (f"exact match, {split}", shares, lambda x: f"{x:g} %"))

    def draw(figure: "Figure") -> None:
        all_axes = figure.subplots(1, len(columns), sharey=True, width_ratios=[2] * (len(columns) - 1) + [1])
        for axes, (title, values, show) in zip(all_axes, columns, strict=True):
            for i, value in enumerate(values):
                if value:
                    draw_value(axes, i, value, i)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _, show=show: show(x)))
            axes.set_title(title, fontsize=9.5, loc="left")
            axes.margins(x=0.12)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        all_axes[-1].set_xlim(left=0)
        all_axes[0].set_yticks(range(len(results)), [r.arm for r in results], parse_math=False)
        all_axes[0].set_ylim(len(results) - 0.5, -0.5)

    return svg("arm by arm", (10.4, 0.9 + 0.42 * len(results)), draw)


def turns_plot(results: Sequence[ArmResult]) -> "Markup":
    """Draws the seconds before a turn's answer begins, against the length of the conversation so far.

    Solid lines: everything is read again. Dashed, if the arm can: the cache is kept and only the message is read.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, result in enumerate(results):
            style: dict[str, Any] = {"color": colour(i), "markersize": 5, "markeredgecolor": GROUND, "linewidth": 1.6}
            history = [turn.history_tokens for turn in result.multi_turn]
            axes.plot(history, [turn.read_again_seconds for turn in result.multi_turn], f"{marker(i)}-", **style)
            new = [turn.read_new_seconds for turn in result.multi_turn if turn.read_new_seconds is not None]
            if len(new) == len(history):
                axes.plot(history, new, f"{marker(i)}--", **style)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of the conversation so far")
        axes.set_ylabel("seconds to read a turn")

    return svg("cost of a turn", (10.4, 3.4), draw)


def _draw_scores(axes: "Axes", scores: Sequence[TextScore | None], shift: float, arm: int) -> None:
    known = [(y + shift, score.exact_match) for y, score in enumerate(scores) if score]
    for y, match in known:
        draw_value(axes, y, (100 * match.value, 100 * match.low, 100 * match.high), arm)


def _example_counts(scores: Sequence[TextScore | None]) -> str:
    return " / ".join(dict.fromkeys(f"{score.examples:,}" for score in scores if score))
