"""Shows a plan for a TPU slice: a table with one column per arm, and lines of advice."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from rich.table import Table

from common.compute.aot import Compiled
from common.compute.collectives import as_compiled, reduce_scatter_bytes
from common.compute.memory import Memory
from common.compute.roofline import Estimate, axes_name, estimate
from common.compute.topology import Topology
from common.report.units import percent, scientific, si
from common.terminal import marked_up
from experiments.run import Run
from experiments.study import Study

GIB = 2**30
SHOWN_BUFFERS = 4
SMALLEST_SHOWN_BYTES = 2**17
"""Smaller buffers are not shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmEstimate:
    """One arm on a topology, and what follows from its estimated step time; pairs are (lowest, highest)."""

    run: Run
    compiled: Compiled
    time: Estimate
    mfu_causal_half: tuple[float, float]
    mfu_full: tuple[float, float]
    tokens_a_day: tuple[float, float]
    days: tuple[float, float]

    def usd(self, topology: Topology, usd_per_chip_hour: float) -> tuple[float, float]:
        low, high = (days * 24 * topology.chips * usd_per_chip_hour for days in self.days)
        return low, high


def estimate_run(run: Run, topology: Topology, compiled: Compiled) -> ArmEstimate:
    """Estimates one run. The FLOPs inside kernels are not visible in the program and come from the ledger."""
    rows, inputs, targets = run.row_slots
    ledger = run.model.flops(run.data.length_sums)
    slowest = ledger.of_slowest(run.train.mesh.context)
    kernel_flops = slowest.train_kernels(run.train.execution) if compiled.has_kernels else 0
    flops = compiled.flops + kernel_flops / topology.devices
    time = estimate(
        topology,
        flops=flops,
        traffic_bytes=compiled.traffic_bytes,
        collectives=as_compiled(compiled.collectives, compiled.scattered_bytes, compiled.summed_gather_bytes),
        ring_links=compiled.ring_links,
    )
    low, high = time.seconds
    peak = topology.devices * topology.chip_spec.flops_per_second

    def share(model_flops: int) -> tuple[float, float]:
        return model_flops / (high * peak), model_flops / (low * peak)

    def days(seconds: float) -> float:
        return run.steps * seconds / 86_400

    tokens = rows * (inputs + targets) * 86_400
    return ArmEstimate(
        run=run,
        compiled=compiled,
        time=time,
        mfu_causal_half=share(ledger.train_causal_half),
        mfu_full=share(ledger.train_full_attention),
        tokens_a_day=(tokens / high, tokens / low),
        days=(days(low), days(high)),
    )


def plan_table(study: Study, topology: Topology, compiled: Mapping[str, Compiled], price: float | None) -> Table:
    """Returns the table of all arms: memory, communication, time and money; `price` (None: listed) is in USD."""
    estimates = {arm: estimate_run(study.arms[arm], topology, program) for arm, program in compiled.items()}
    settings = [_settings(one.run) for one in estimates.values()]
    shared = {name: value for name, value in settings[0].items() if all(each[name] == value for each in settings)}
    words = ", ".join(f"{name} {value}" for name, value in shared.items())
    table = Table(title=marked_up(f"{study.name} on {topology} ({topology.devices} devices): {words}"))
    table.add_column("")
    for arm in estimates:
        table.add_column(marked_up(arm), justify="right")

    def section(title: str) -> None:
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")

    def line(label: str, cell: Callable[[ArmEstimate], str]) -> None:
        shown = [marked_up(cell(arm)) for arm in estimates.values()]
        if any(shown):
            table.add_row(marked_up(label), *shown)

    for name in settings[0]:
        if name not in shared:
            line(name, lambda arm, name=name: _settings(arm.run)[name])  # type: ignore[misc]
    line("parameters", lambda arm: f"{arm.run.model.param_count():,}")
    line("training FLOPs per step", lambda arm: scientific(arm.run.flops_per_step, 4))
    section("Memory of a device")
    _memory_rows(line, topology)
    if any(program.collectives for program in compiled.values()):
        section("Sent per step")
    for kind, axes in _largest_collectives(compiled):
        line(f"{kind} along {axes_name(axes)}", lambda arm, key=(kind, axes): _sent(arm.compiled, *key))  # type: ignore[misc]
    if any(reduce_scatter_bytes(program.collectives) for program in compiled.values()):
        line("reduce-scatters kept", lambda arm: _kept(arm.compiled))
    if any(arm.compiled.memory for arm in estimates.values()):
        section("Time (estimate)")
        _time_rows(_where_it_fits(line), topology)
        section("Budget (estimate)")
        _budget_rows(_where_it_fits(line), topology, price)
    return table


def _settings(run: Run) -> dict[str, str]:
    """Returns how the run is computed, by name; a table's title has what all arms share."""
    rows, inputs, targets = run.row_slots
    return {
        "mesh": str(run.train.mesh),
        "steps": f"{run.steps:,}",
        "rows": f"{rows:,} x ({inputs} + {targets}) slots",
        "remat": run.train.execution.remat,
        "accumulation": str(run.train.accumulation),
    }


def advice(study: Study, topology: Topology, compiled: Mapping[str, Compiled]) -> list[str]:
    """Returns lines that explain the numbers and what would improve them; advice for several arms is one line."""
    arms_of: dict[str, list[str]] = {}
    for arm, program in compiled.items():
        for words in _advice(estimate_run(study.arms[arm], topology, program)):
            arms_of.setdefault(words, []).append(arm)
    return [
        "Memory and bytes sent are per device; bytes sent are those of the partitioned program's collectives. The "
        "estimate is a roofline at published peaks: the lower end overlaps all communication with computation, the "
        "upper end none of it; real steps take longer, since nothing reaches these peaks. MFU counts the model's own "
        "FLOPs, without recomputation; tokens are slots. FLOPs in attention kernels follow from how they are written.",
        *(f"{', '.join(arms)}: {words}" for words, arms in arms_of.items()),
    ]


def _advice(arm: ArmEstimate) -> Iterator[str]:
    compiled, requested = arm.compiled, reduce_scatter_bytes(arm.compiled.collectives)
    if compiled.out_of_memory:
        needed, available = compiled.out_of_memory.needed / GIB, compiled.out_of_memory.available / GIB
        yield f"does not fit: a device needs {needed:.1f} GiB, and {available:.2f} can be used."
        return
    if requested and compiled.scattered_bytes < 0.9 * requested:
        yield (
            f"libtpu all-reduces gradients on every device and slices them ({_kept(compiled)} stay reduce-scatters), "
            "which sends twice as much; the estimate includes this. A smaller fsdp axis with a data axis may help."
        )
    if arm.time.limit == "HBM":
        yield "is limited by HBM; look at the largest temporaries above."
    elif arm.time.limit != "matrix products":
        yield f"is limited by {arm.time.limit}; more rows per step, or another mesh (--search), would help."


Cell = Callable[[ArmEstimate], str]
Line = Callable[[str, Cell], None]


def _where_it_fits(line: Line) -> Line:
    """Returns `line` with "-" for arms that do not fit, which have no memory or time to show."""
    return lambda label, cell: line(label, lambda arm: cell(arm) if arm.compiled.memory else "-")


def _memory_rows(line: Line, topology: Topology) -> None:
    def total(arm: ArmEstimate) -> str:
        usable = (topology.chip_spec.usable_hbm_bytes or topology.chip_spec.hbm_bytes) / GIB
        if error := arm.compiled.out_of_memory:
            return f"{error.needed / GIB:.2f} of {error.available / GIB:.2f} GiB"
        return f"{_memory(arm).total / GIB:.2f} of {usable:.2f} GiB"

    def argument(name: str) -> Cell:
        def size(arm: ArmEstimate) -> str:
            parts = _memory(arm).arguments.items()
            return _mib(sum(size for key, size in parts if key.startswith(name)))

        return size

    def buffer(place: int) -> Cell:
        def words(arm: ArmEstimate) -> str:
            largest = _memory(arm).largest[place : place + 1]
            return "".join(
                f"{_mib(buffer.bytes)} {buffer.array} ({buffer.made_by.rsplit('/', 1)[-1]})"
                for buffer in largest
                if buffer.bytes >= SMALLEST_SHOWN_BYTES
            )

        return words

    line("fits", lambda arm: "no" if arm.compiled.out_of_memory else "yes")
    line("HBM", total)
    inside = _where_it_fits(line)
    inside("  stored parameters", argument("state.params"))
    inside("  optimizer state", argument("state.opt_state"))
    inside("  batch", argument("batch"))
    inside("  temporaries", lambda arm: _mib(_memory(arm).temporaries))
    inside("    in use at peak", lambda arm: _mib(_memory(arm).at_peak))
    for place in range(SHOWN_BUFFERS):
        inside("    largest at peak" if place == 0 else "", buffer(place))


def _time_rows(line: Line, topology: Topology) -> None:
    line("matrix products", lambda arm: _seconds(arm.time.compute))
    line("HBM", lambda arm: _seconds(arm.time.memory))
    line("links (ICI)", lambda arm: _seconds(arm.time.links))
    if topology.slices > 1:
        line("between slices (DCN)", lambda arm: _seconds(arm.time.data_centre))
    line("step", lambda arm: _span(arm.time.seconds, _seconds))
    line("limited by", lambda arm: arm.time.limit)
    line("MFU, causal half", lambda arm: _span(arm.mfu_causal_half, percent))
    line("MFU, full attention", lambda arm: _span(arm.mfu_full, percent))


def _budget_rows(line: Line, topology: Topology, price: float | None) -> None:
    def usd(rate: float) -> Cell:
        return lambda arm: _span(arm.usd(topology, rate), lambda usd: f"{usd:,.0f}" if usd >= 100 else f"{usd:.2f}")

    line("tokens a day", lambda arm: _span(arm.tokens_a_day, si))
    line("days", lambda arm: _span(arm.days, lambda days: f"{days:.3g}"))
    listed = topology.chip_spec.price
    if price is not None:
        line(f"USD at {price:.2f} per chip-hour", usd(price))
    elif listed is not None:
        line(f"USD on demand ({listed.on_demand:.2f} per chip-hour, {listed.region})", usd(listed.on_demand))
        if listed.spot is not None:
            line(f"USD spot ({listed.spot:.2f})", usd(listed.spot))


def _memory(arm: ArmEstimate) -> Memory:
    assert arm.compiled.memory is not None
    return arm.compiled.memory


def _largest_collectives(compiled: Mapping[str, Compiled]) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, axes) of the collectives of any arm, most bytes first; skips those below a thousandth of all bytes."""
    sizes: dict[tuple[str, tuple[str, ...]], float] = {}
    for program in compiled.values():
        for one in program.collectives:
            sizes[one.kind, one.axes] = sizes.get((one.kind, one.axes), 0.0) + one.sent_bytes
    least = sum(sizes.values()) / 1000
    return sorted((key for key, size in sizes.items() if size > least), key=lambda key: -sizes[key])


def _sent(compiled: Compiled, kind: str, axes: tuple[str, ...]) -> str:
    """How often one device sends by these collectives, and how much."""
    found = [one for one in compiled.collectives if (one.kind, one.axes) == (kind, axes)]
    if not found:
        return "-"
    return f"{sum(one.times for one in found):,} x, {_mib(sum(one.sent_bytes for one in found))}"


def _kept(compiled: Compiled) -> str:
    """Which share of the reduce-scatters (by bytes) the compiler keeps as such."""
    requested = reduce_scatter_bytes(compiled.collectives)
    if compiled.out_of_memory or not requested:
        return "-"
    return percent(min(1.0, compiled.scattered_bytes / requested), 0)


def _span(pair: tuple[float, float], show: Callable[[float], str]) -> str:
    low, high = (show(number) for number in pair)
    return low if low == high else f"{low} to {high}"


def _seconds(seconds: float) -> str:
    """
    >>> _seconds(0.28), _seconds(0.0028)
    ('0.28 s', '2.8 ms')
    """
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _mib(size: float) -> str:
    """
    >>> _mib(2**30), _mib(2**17)
    ('1,024 MiB', '0.1 MiB')
    """
    if size < 10 * 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**20:,.0f} MiB"
