"""Benchmarks (`make bench`): where a training step's time goes in both families; a step of `gpt` compared with PyTorch;
decoding compared with Hugging Face; how fast data become batches; what a checkpoint costs; how many small models are
trained in an hour. On request: a step's memory on TPU, and `twinstack plan` compared with published speeds."""

import argparse
import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.checkpoints import BETWEEN, PERIOD_SECONDS, measure, measured_steps
from benchmarks.data import BATCHES, SHAPES, THREADS, time_making, time_tokenizing
from benchmarks.decoder import DECODER, LENGTH, ROWS, Spread, cores
from benchmarks.estimates import PUBLISHED, estimates
from benchmarks.generation import MODELS, NEW, PROMPT, Generation
from benchmarks.generation import ROWS as PROMPTS
from benchmarks.generation import compare as compare_generation
from benchmarks.many_runs import SIZES, STEPS
from benchmarks.many_runs import measure as time_runs
from benchmarks.memory import CASES, MemoryCase, PlannedMemory, plan
from benchmarks.side_by_side import SideBySide, compare
from benchmarks.train_step import Parts, time_loader, time_step
from common.files import write_json
from common.progress import rich_bars
from common.report.units import percent, si
from common.train.environment import environment
from experiments.first_light import first_light

INSTALL = f"{sys.executable} -m pip install torch --index-url https://download.pytorch.org/whl/cpu"


def main() -> int:
    options = _options()
    console = Console()
    here = environment()
    console.print(f"{here['cpu']}, {cores()} cores; JAX {here['jax']} on {here['platform']}, Python {here['python']}\n")
    found: dict[str, Any] = {"environment": here, "rounds": options.rounds, "steps": options.steps}
    if options.only in (None, "families"):
        found["families"] = _families(console, options.rounds, options.steps)
    if options.only in (None, "torch"):
        found["torch"] = _torch(console, options.rounds, options.steps, options.torch)
    if options.only in (None, "generation"):
        found["generation"] = _generation(console, options.rounds)
    if options.only in (None, "data"):
        found["data"] = _data(console, options.rounds)
    if options.only in (None, "checkpoints"):
        found["checkpoints"] = _checkpoints(console, options.rounds)
    if options.only in (None, "runs"):
        found["runs"] = _runs(console)
    for name, of_tpu in (("memory", _memory), ("estimates", _estimates)):  # these do not measure this machine
        if options.only == name and _has_libtpu(console):
            found[name] = of_tpu(console)
    if options.json:
        write_json(options.json, found)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=_positive, default=7, help="repeated measurements (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=3, help="steps in each of them (default: %(default)s)")
    parts = ["families", "torch", "generation", "data", "checkpoints", "runs", "memory", "estimates"]
    parser.add_argument("--only", choices=parts, help="run one part only")
    parser.add_argument("--torch", choices=["eager", "compiled"], default="eager", help="how PyTorch runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


@contextlib.contextmanager
def _bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    # Drawn between measurements only: a bar that refreshes itself would be measured too.
    with rich_bars(console, auto_refresh=False) as progress:
        task = progress.add_task(title, total=total, detail="")
        progress.refresh()

        def advance(done: int) -> None:
            progress.advance(task, done)
            progress.refresh()

        yield advance


def _families(console: Console, rounds: int, steps: int) -> dict[str, Any]:
    study = first_light()
    any_arm = next(iter(study.arms.values()))
    batch, loading = time_loader(any_arm.data, any_arm.model.vocab_size, 10 * rounds)
    arms = {}
    for name, run in study.arms.items():
        with _bar(console, f"timing {name}", rounds) as advance:
            arms[name] = time_step(run, batch, rounds, steps, advance)
    rows, inputs, targets = any_arm.row_slots
    caption = (
        f"median [min, max] of {rounds} rounds of {steps} steps; tokens are slots, FLOPs full attention, both padded"
    )
    table = _table(f"Training step of {study.name}: {rows} rows of {inputs} + {targets} slots", arms, caption)
    _fill(table, list(arms.values()), loading)
    console.print(table, "")
    return {"loader_seconds": dataclasses.asdict(loading), "arms": {k: dataclasses.asdict(v) for k, v in arms.items()}}


def _fill(table: Table, arms: list[Parts], loading: Spread) -> None:
    def row(label: str, cell: Callable[[Parts], str]) -> None:
        table.add_row(label, *(Text(cell(parts)) for parts in arms))

    def share(name: str, of: Callable[[Parts], dict[str, float]]) -> None:
        row(f"  {name}", lambda parts: percent(of(parts)[name]) if name in of(parts) else "–")

    row("parameters", lambda parts: si(parts.parameters))
    row("tokens/s", lambda parts: _spread(parts.slots_per_second))
    row("step, ms", lambda parts: _spread(parts.step_seconds, 1e3))
    row("page faults a step", lambda parts: _number(parts.page_faults))
    row("GFLOP/s by the ledger", lambda parts: _spread(parts.ledger_flops_per_second, 1e-9))
    row("compiling, s", lambda parts: _number(parts.compile_seconds))
    row("building a batch, ms", lambda _: _spread(loading, 1e3))
    table.add_section()
    table.add_row("share of the step")
    for name in arms[0].shares:
        share(name, lambda parts: parts.shares)
    table.add_section()
    table.add_row("share of the step, alone")
    for name in dict.fromkeys(name for parts in arms for name in parts.alone):
        share(name, lambda parts: parts.alone)


def _torch(console: Console, rounds: int, steps: int, mode: str) -> dict[str, Any] | None:
    if importlib.util.find_spec("torch") is None:
        console.print("PyTorch is not installed, so gpt is not compared with it. To install its CPU build:")
        console.print(Text(f"  {INSTALL}"), soft_wrap=True)
        return None
    with _bar(console, "timing gpt and PyTorch", rounds) as advance:
        found = compare(rounds, steps, mode, advance)
    console.print(_torch_table(found, rounds, steps, mode))
    console.print(f"gpt over PyTorch: [bold]{found.ratio:.3f}[/] (above 1: gpt is faster)")
    console.print(Text(f"round by round:   {_spread(found.paired)}"))
    return {
        "mode": mode,
        "rows": ROWS,
        "length": LENGTH,
        "model": dataclasses.asdict(DECODER),
        **dataclasses.asdict(found),
    }


def _torch_table(found: SideBySide, rounds: int, steps: int, mode: str) -> Table:
    c = DECODER
    title = (
        f"Decoder: {c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads of {c.head_dim}, SwiGLU {c.d_ff},\n"
        f"vocabulary {c.vocab_size}, RoPE, RMSNorm, AdamW, clipping; {ROWS} rows of {LENGTH} tokens, float32 on CPU"
    )
    caption = f"median [min, max] of {rounds} alternating rounds of {steps} steps; FLOPs full attention"
    table = _table(title, ["gpt", f"PyTorch, {mode}"], caption)

    def row(label: str, cells: Iterable[str]) -> None:
        table.add_row(label, *(Text(cell) for cell in cells))

    sides = (found.gpt, found.torch)
    row("version", (side.version for side in sides))
    row("tokens/s", (_spread(side.tokens_per_second) for side in sides))
    row("step, ms", (_spread(side.step_seconds, 1e3) for side in sides))
    row("GFLOP/s by the ledger", (_number(found.gflop_per_step / side.step_seconds.median) for side in sides))
    row("loss before a step", (f"{side.losses[0]:.6f}" for side in sides))
    row("loss after it", (f"{side.losses[1]:.6f}" for side in sides))
    row("CPU s in the other's turns", (f"{side.idle_cpu_seconds:.2f}" for side in sides))
    return table


def _generation(console: Console, rounds: int) -> dict[str, Any] | None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"{' and '.join(missing)} not installed, so decoding is not compared with Hugging Face")
        return None
    found = {}
    for name in MODELS:
        with _bar(console, f"decoding {name} here and with Hugging Face", rounds) as advance:
            found[name] = compare_generation(name, rounds, advance)
    console.print(_generation_table(found, rounds))
    return {name: dataclasses.asdict(one) for name, one in found.items()}


def _generation_table(found: dict[str, Generation], rounds: int) -> Table:
    title = (
        f"Greedy decoding, tokens/s: {PROMPTS} prompts of {PROMPT} tokens, {NEW} new tokens each, float32 on CPU;\n"
        f"{' and '.join(next(iter(found.values())).versions)}"
    )
    caption = f"median [min, max] of {rounds} alternating rounds of one batch, including prefill"
    table = _table(title, ["parameters", "twinstack", "Hugging Face", "ratio", "round by round"], caption)
    for name, one in found.items():
        cells = (f"{one.parameters:,}", _spread(one.ours), _spread(one.theirs), f"{one.ratio:.2f}", _spread(one.paired))
        table.add_row(name, *(Text(cell) for cell in cells))
    return table


def _data(console: Console, rounds: int) -> dict[str, Any]:
    making = {}
    for name in SHAPES:
        with _bar(console, f"making batches: {name}", rounds) as advance:
            making[name] = time_making(name, rounds, advance)
    title = f"Tokens on disk to packed batches, million tokens/s; {BATCHES} batches at a time"
    caption = f"median [min, max] of {rounds} rounds"
    table = _table(title, [f"{THREADS} threads", "one thread", "copying the batches"], caption)
    for name, one in making.items():
        cells = (_spread(spread, 1e-6) for spread in (one.tokens_per_second, one.one_thread, one.copying))
        table.add_row(name, *(Text(cell) for cell in cells))
    console.print(table)
    with _bar(console, "tokenising", rounds) as advance:
        tokenizing = time_tokenizing(rounds, advance)
    title = "Text to tokens on disk, million characters/s"
    table = _table(title, ["twinstack", "SentencePiece alone", "ratio, round by round"], caption)
    sides = (_spread(tokenizing.ours, 1e-6), _spread(tokenizing.sentence_piece, 1e-6), _spread(tokenizing.paired))
    table.add_row("tokenising", *map(Text, sides))
    console.print(table, "")
    return {
        "making": {name: dataclasses.asdict(one) for name, one in making.items()},
        "tokenizing": dataclasses.asdict(tokenizing),
    }


def _checkpoints(console: Console, saves: int) -> dict[str, Any]:
    with _bar(console, "saving checkpoints", measured_steps(saves)) as advance:
        found = measure(saves, advance)
    title = (
        f"Saving {si(found.parameters)} parameters with AdamW's moments, {si(found.state_bytes)}B on disk, by the loop"
    )
    caption = f"median [min, max] of {saves} checkpoints, each with {BETWEEN} steps before and {BETWEEN} after it"
    table = _table(title, ["per checkpoint"], caption)
    table.add_row("step, s", Text(_spread(found.step)))
    table.add_row("training blocked, s", Text(_spread(found.blocking)))
    table.add_row("steps slowed, s", Text(_spread(found.slowdown)))
    table.add_row(f"share of {PERIOD_SECONDS:.0f} s, %", Text(_spread(found.share, 100.0)))
    console.print(table, "")
    return dataclasses.asdict(found)


def _runs(console: Console) -> dict[str, Any]:
    with _bar(console, "running studies", len(SIZES)) as advance:
        found = {arm: time_runs(arm, advance) for arm in SIZES}
    title = f"Small models an hour by `twinstack run --jobs {cores()}`: {STEPS} steps of 8 x (64 + 64) slots each"
    caption = (
        "each size once; everything included: start-up, compiling, a validation, decoding 125 examples, the report"
    )
    table = _table(title, ["parameters", "models", "seconds", "models an hour"], caption)
    for arm, one in found.items():
        table.add_row(
            f"width {arm}", f"{one.parameters:,}", str(one.runs), f"{one.seconds:.0f}", f"{one.per_hour:,.0f}"
        )
    console.print(table, "")
    return {arm: dataclasses.asdict(one) | {"per_hour": one.per_hour} for arm, one in found.items()}


def _has_libtpu(console: Console) -> bool:
    found = importlib.util.find_spec("libtpu") is not None
    if not found:
        console.print("libtpu, the compiler for TPU, is not installed: pip install -e '.[plan]'", markup=False)
    return found


def _memory(console: Console) -> dict[str, Any]:
    table = _table(
        "Memory of a training step on TPU, GiB per device, without a TPU",
        ["TPU", "rows x length", "arguments + temporaries", "MaxText 0.2.5's", "peak"],
        "full rematerialisation, bf16, AdamW in float32, as the TPU compiler plans it",
    )
    found = {}
    with _bar(console, "compiling for TPU", len(CASES)) as advance:
        for name, case in CASES.items():
            found[name] = plan(name)
            table.add_row(name, *map(Text, _memory_cells(case, found[name])))
            advance(1)
    console.print(table)
    return {name: dataclasses.asdict(one) for name, one in found.items()}


def _estimates(console: Console) -> dict[str, Any]:
    table = _table(
        "MFU estimated by `twinstack plan`, and published by MaxText for its own steps",
        ["TPU", "rows x length", "estimated, %", "published, %"],
        "causal-half FLOPs; full rematerialisation; from no communication overlapped with compute to all of it",
    )
    found = dict(estimates(console))
    for name, (low, high) in found.items():
        run = PUBLISHED[name]
        shape = [run.topology, f"{run.rows} x {run.length}"]
        table.add_row(name, *shape, f"{100 * low:.0f} to {100 * high:.0f}", f"{100 * run.published_mfu:.1f}")
    console.print(table)
    return found


def _memory_cells(case: MemoryCase, found: PlannedMemory) -> list[str]:
    length = f"{case.input_length} + {case.target_length}" if case.input_length else f"{case.target_length}"
    shape = [case.topology, f"{case.rows} x {length}"]
    if found.no_room:
        return [*shape, f"no room: {found.no_room}", "–", "–"]
    theirs = "–" if case.maxtext_mib is None else f"{sum(case.maxtext_mib) / 2**10:.2f}"
    ours = f"{found.arguments / 2**30:.2f} + {found.temporaries / 2**30:.2f} = {found.total / 2**30:.2f}"
    return [*shape, ours, theirs, f"{found.peak / 2**30:.2f}"]


def _table(title: str, columns: Iterable[str], caption: str) -> Table:
    return Table("", *columns, title=title, caption=Text(caption), title_justify="left", caption_justify="left")


def _spread(spread: Spread, scale: float = 1.0) -> str:
    low, median, high = (_number(scale * value) for value in (spread.low, spread.median, spread.high))
    return f"{median} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
