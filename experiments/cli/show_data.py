"""`twinstack data show`: prints rows of training data in readable form.

Legend: B batch rows, I input slots, T target slots, L input or target slots.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.compute.length_sums import LengthSums
from common.data.batch import Batch
from common.data.sources.config import parts_of
from common.data.tokenizers.tokenizer import Tokenizer
from common.report.units import percent
from common.terminal import harmless, marked_up
from experiments.run import Run
from experiments.running.pipeline import open_data
from experiments.study import Study

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
"""Colours of segments, used in turn."""


def show(study: Study, arm: str, rows: int, console: Console) -> None:
    """Prints the first `rows` rows that an arm trains on: their examples, then the slots that each family reads."""
    config, data = study.arms[arm].data, open_data(arm, study.arms[arm])
    readers = {name: run for name, run in study.arms.items() if run.data == config}
    others = config.arms()[1:]
    joint = ", ".join(f"{other.objective.kind} ({other.input_length} + {other.target_length})" for other in others)
    console.print(
        f"{harmless(' and '.join(part.name for part in parts_of(config.source)))}; "
        f"objective {config.objective.kind}; rows of {config.input_length} + {config.target_length} slots; "
        f"{_readers(len(readers), len(study.arms) - len(readers))}"
        + (f"; rows hold only what fits those of {joint} too" if joint else ""),
        markup=False,
    )
    console.print(padding_table(readers, *data.train.filled()))
    steps = (data.train.batch(step).batch for step in range(-(-rows // config.rows)))
    each = ((batch, b) for batch in steps for b in range(config.rows))
    for number, (batch, b) in enumerate(itertools.islice(each, rows)):
        row = BatchRow.of(batch, b)
        console.print()
        console.rule(f"row {number}: {row.summary()}", align="left")
        console.print(examples_table(row, data.tokenizer))
        inputs, targets = input_lines(row, data.tokenizer), target_lines(row, data.tokenizer)
        console.print(slots_table("encoder of an encoder-decoder", inputs, 0))
        console.print(slots_table("its decoder", targets, 0))
        console.print(slots_table("decoder-only: one sequence", [*inputs, *targets], len(row.inputs_I)))


def _readers(these: int, others: int) -> str:
    """
    >>> _readers(1, 0), _readers(2, 1)
    ('1 arm reads them', '2 arms read them, and 1 other reads other rows: arm=NAME shows those')
    """
    words = f"{these} arm{'s read' if these > 1 else ' reads'} them"
    if others:
        words += f", and {others} other{'s read' if others > 1 else ' reads'} other rows: arm=NAME shows those"
    return words


def padding_table(arms: Mapping[str, Run], rows: int, examples: LengthSums) -> Table:
    """Returns the share of padding in the first `rows` rows, and in the FLOPs of these arms, which read them.

    `examples`: length sums of the examples in these rows.
    """
    slots = LengthSums.of_rows(rows, *next(iter(arms.values())).row_slots[1:])

    def share(of: Callable[[LengthSums], int]) -> str:
        useful, total = of(examples), of(slots)
        return percent(1 - useful / total) if total else "none there"

    table = Table(title=f"padding, in the first {rows:,} rows", title_justify="left")
    shares = {
        "input slots": share(lambda sums: sums.inputs),
        "target slots": share(lambda sums: sums.targets),
        "all slots": share(lambda sums: sums.tokens),
    }
    named: dict[str, list[str]] = {}
    for name, run in arms.items():
        named.setdefault(share(lambda sums, run=run: run.model.flops(sums).train_full_attention), []).append(name)  # type: ignore[misc]
    shares |= {f"FLOPs of {', '.join(names)}": padding for padding, names in named.items()}
    for name in shares:
        table.add_column(marked_up(name), justify="right")
    table.add_row(*shares.values())
    return table


@dataclasses.dataclass(frozen=True)
class BatchRow:
    """One row of a batch."""

    inputs_I: np.ndarray
    input_segments_I: np.ndarray
    input_positions_I: np.ndarray
    decoder_inputs_T: np.ndarray
    targets_T: np.ndarray
    target_segments_T: np.ndarray
    target_positions_T: np.ndarray
    weights_T: np.ndarray

    @classmethod
    def of(cls, batch: Batch, b: int) -> "BatchRow":
        return cls(*(getattr(batch, field.name)[b] for field in dataclasses.fields(batch)))

    def segments(self) -> list[int]:
        """Returns the segment ids of the row's examples."""
        found = np.union1d(self.input_segments_I, self.target_segments_T)
        return found[found > 0].tolist()

    def summary(self) -> str:
        sides = (self.input_segments_I, "input"), (self.target_segments_T, "target")
        filled = (f"{np.count_nonzero(segments)} of {len(segments)} {name} slots" for segments, name in sides)
        count = len(self.segments())
        return f"{count} example{'s' if count != 1 else ''}; {' and '.join(filled)} filled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotRun:
    """Consecutive slots of one segment, as a line of a table."""

    slots: slice
    segment: int
    positions: str
    reads: Text
    predicts: Text
    loss: str
    is_target: bool


def examples_table(row: BatchRow, tokenizer: Tokenizer) -> Table:
    """Returns the inputs and targets of each example of the row, as text."""
    table = Table(title="examples", title_justify="left", show_lines=True)
    for name in ("segment", "inputs", "targets"):
        table.add_column(name, overflow="fold")
    for segment in row.segments():
        inputs = row.inputs_I[row.input_segments_I == segment]
        targets = row.targets_T[row.target_segments_T == segment]
        style = _style(segment)
        table.add_row(
            Text(str(segment), style), _words(inputs, tokenizer, style, ""), _words(targets, tokenizer, style, "")
        )
    return table


def input_lines(row: BatchRow, tokenizer: Tokenizer) -> list[SlotRun]:
    return [
        SlotRun(
            slots=slots,
            segment=segment,
            positions=_range(row.input_positions_I[slots]),
            reads=_words(row.inputs_I[slots], tokenizer, _style(segment), "|"),
            predicts=Text(),
            loss="",
            is_target=False,
        )
        for segment, slots in _runs(row.input_segments_I)
    ]


def target_lines(row: BatchRow, tokenizer: Tokenizer) -> list[SlotRun]:
    return [
        SlotRun(
            slots=slots,
            segment=segment,
            positions=_range(row.target_positions_T[slots]),
            reads=_words(row.decoder_inputs_T[slots], tokenizer, _style(segment), "|", starts=True),
            predicts=_words(row.targets_T[slots], tokenizer, _style(segment), "|", weights=row.weights_T[slots]),
            loss=f"{np.count_nonzero(row.weights_T[slots])} of {slots.stop - slots.start}",
            is_target=True,
        )
        for segment, slots in _runs(row.target_segments_T)
    ]


def slots_table(title: str, lines: Sequence[SlotRun], target_offset: int) -> Table:
    """Returns a table with a line for each run; `target_offset` is the number of the first target slot."""
    table = Table(title=title, title_justify="left")
    predicts = any(line.is_target for line in lines)
    for name in ("slots", "segment", "positions", "reads", *(("predicts", "with loss") if predicts else ())):
        table.add_column(name, overflow="fold")
    for line in lines:
        offset = target_offset if line.is_target else 0
        slots = _span(line.slots.start + offset, line.slots.stop + offset)
        if line.segment == 0:
            table.add_row(slots, Text("empty", "dim"))
            continue
        cells: list[str | Text] = [slots, Text(str(line.segment), _style(line.segment)), line.positions, line.reads]
        table.add_row(*cells, *((line.predicts, line.loss) if predicts else ()))
    return table


def _runs(segments_L: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yields (segment, slots) for each run of slots with the same segment.

    >>> list(_runs(np.array([1, 1, 2, 0])))
    [(1, slice(0, 2, None)), (2, slice(2, 3, None)), (0, slice(3, 4, None))]
    """
    ends = [*(np.flatnonzero(np.diff(segments_L)) + 1).tolist(), len(segments_L)]
    begin = 0
    for end in ends:
        if end > begin:
            yield int(segments_L[begin]), slice(begin, end)
        begin = end


def _words(
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    style: str,
    between: str,
    *,
    starts: bool = False,
    weights: np.ndarray | None = None,
) -> Text:
    """Returns tokens separated by `between`, or as running text if that is empty; underlines tokens with loss."""
    text = Text()
    if not between:
        for special, run in itertools.groupby(tokens.tolist(), lambda token: _special_name(token, tokenizer)):
            text.append(special or harmless(tokenizer.decode(run)), f"bold {style}" if special else style)
        return text
    for i, token in enumerate(tokens.tolist()):
        name = "⟨start⟩" if starts and i == 0 else _special_name(token, tokenizer)
        marks = " underline" if weights is not None and weights[i] else ""
        text.append(name or harmless(tokenizer.decode([token])) or "␣", ("bold " if name else "") + style + marks)
        text.append(between, "dim")
    text.right_crop(len(between))
    return text


def _special_name(token: int, tokenizer: Tokenizer) -> str | None:
    """Returns the name of a token that stands for no text, else None."""
    if token == tokenizer.eos_id:
        return "⟨eos⟩"
    names = {mode: name for name, mode in tokenizer.modes.items()}
    return names.get(token) or next(
        (f"⟨{k}⟩" for k in range(tokenizer.sentinels) if token == tokenizer.sentinel_id(k)), None
    )


def _style(segment: int) -> str:
    return COLOURS[(segment - 1) % len(COLOURS)]


def _range(positions_L: np.ndarray) -> str:
    return _span(int(positions_L[0]), int(positions_L[-1]) + 1)


def _span(begin: int, end: int) -> str:
    return str(begin) if end - begin == 1 else f"{begin}-{end - 1}"
