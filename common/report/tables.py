"""Tables of arms side by side: as rows of text, which the HTML report shows too, and as tables for the terminal.

Cells are `rich.text.Text`, never markup, since names and texts from data may contain square brackets.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from common.evals.measure import TextScore
from common.report.certificate import Certificate
from common.report.results import ArmResult
from common.report.units import duration, fill, percent, percent_interval, scientific, si
from common.terminal import harmless

if TYPE_CHECKING:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

NOT_SCORED = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow:
    """One quantity; `values` has the order of the arms, `note` explains the quantity."""

    label: str
    values: tuple[str, ...]
    note: str = ""


def comparison_rows(results: Sequence[ArmResult]) -> tuple[TableRow, ...]:
    """Returns what was trained, what it cost and what it scored."""
    rows = [
        _row(results, "parameters", lambda r: si(r.parameters)),
        _row(results, "training FLOPs", lambda r: scientific(r.flops.full_attention), "full attention, padded"),
        _row(results, "useful training FLOPs", lambda r: scientific(r.flops.useful_full_attention), "real tokens only"),
        _row(results, "steps", lambda r: f"{r.steps:,}"),
        _row(results, "examples seen", lambda r: si(r.examples)),
        _row(results, "tokens seen", lambda r: si(r.tokens), "inputs and targets, without padding"),
        _row(results, "tokens with loss", lambda r: si(r.loss_tokens)),
        _row(results, "fill", fill, "input / target slots"),
        _row(results, "training loss", lambda r: f"{r.train_loss:.4f}", "nats per token, last tenth of the steps"),
        _row(results, "validation loss", lambda r: f"{r.validation_loss:.4f}", "nats per token"),
    ]
    for split in splits(results):
        whole = [find_score(r, split, "all") for r in results]
        rows.append(_exact_match_row(f"exact match, {split}", whole))
        if any(score and score.bleu for score in whole):
            rows.append(TableRow(label=f"BLEU, {split}", values=tuple(map(_bleu_cell, whole)), note=_bleu_note(whole)))
    rows += [
        _row(results, "tokens per second", lambda r: si(r.tokens_per_second), "training, without padding"),
        _row(results, "training time", lambda r: duration(r.train_seconds), "without compilation and evaluation"),
        _row(results, "waiting for data", lambda r: percent(r.data_wait_share), "share of step time"),
    ]
    return tuple(rows)


def group_rows(results: Sequence[ArmResult], split: str) -> tuple[TableRow, ...]:
    """Returns exact match by kind of example in `split`, best of the first arm first; empty if all are of one kind."""
    names = list(dict.fromkeys(s.group for r in results for s in r.scores if s.split == split and s.group != "all"))
    if len(names) == 1:
        return ()
    scores = {name: [find_score(r, split, name) for r in results] for name in names}

    def share(name: str) -> float:
        score = scores[name][0]
        return score.exact_match.value if score else -1.0

    names.sort(key=lambda name: (-share(name), name))
    return tuple(_exact_match_row(name, scores[name]) for name in names)


def splits(results: Sequence[ArmResult]) -> tuple[str, ...]:
    """Returns every split that some arm was scored on, in order of appearance."""
    return tuple(dict.fromkeys(score.split for result in results for score in result.scores))


def find_score(result: ArmResult, split: str, group: str) -> TextScore | None:
    """Returns an arm's score for a group of a split; None if it was not scored."""
    return next((score for score in result.scores if (score.split, score.group) == (split, group)), None)


def comparison_table(results: Sequence[ArmResult]) -> "Table":
    """Returns all arms side by side; intervals are 95 %."""
    return _table("Comparison", [r.arm for r in results], comparison_rows(results), "95 % intervals in brackets")


def groups_table(results: Sequence[ArmResult]) -> "Table":
    """Returns exact match by kind of example, for every split."""
    rows = []
    for split in splits(results):
        whole = [find_score(r, split, "all") for r in results]
        rows.append(_exact_match_row(f"{split}: all", whole))
        rows += [dataclasses.replace(row, label=f"  {row.label}") for row in group_rows(results, split)]
    return _table("Exact match by kind", [r.arm for r in results], rows, "95 % intervals in brackets")


def certificate_panel(certificate: Certificate) -> "Panel":
    """Returns the certificate for the terminal: green if all checks agree, red if one differs, else yellow."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    answers = {True: ("agree", "green"), False: ("DIFFERS", "bold red"), None: ("unchecked", "yellow")}
    checks = Table.grid(padding=(0, 2))
    for check in certificate.checks:
        checks.add_row(plain_text(*answers[check.agrees]), plain_text(check.name), plain_text(check.detail, "dim"))
    style = answers[certificate.agrees][1]
    headline = plain_text(certificate.headline, style)
    notes = [plain_text(sentence, "dim") for sentence in certificate.unclaimed]
    return Panel(Group(headline, checks, *notes), title=Text("Parity certificate"), border_style=style, expand=False)


def plain_text(text: str, style: str = "") -> "Text":
    """Returns a text that may come from data for the terminal: no markup, no control characters."""
    from rich.text import Text

    return Text(harmless(text), style)


def _table(title: str, arms: Sequence[str], rows: Sequence[TableRow], caption: str) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, "bold"), caption=Text(caption), box=box.SIMPLE_HEAD)
    table.add_column("")
    for arm in arms:
        table.add_column(plain_text(arm), justify="right")
    table.add_column("", style="dim")
    for row in rows:
        table.add_row(plain_text(row.label), *map(plain_text, row.values), plain_text(row.note))
    return table


def _row(results: Sequence[ArmResult], label: str, show: Callable[[ArmResult], str], note: str = "") -> TableRow:
    return TableRow(label=label, values=tuple(show(result) for result in results), note=note)


def _exact_match_row(label: str, scores: Sequence[TextScore | None]) -> TableRow:
    return TableRow(label=label, values=tuple(map(_exact_match_cell, scores)), note=_examples_note(scores))


def _exact_match_cell(score: TextScore | None) -> str:
    return percent_interval(score.exact_match) if score else NOT_SCORED


def _bleu_cell(score: TextScore | None) -> str:
    if score is None or score.bleu is None:
        return NOT_SCORED
    return f"{score.bleu.value:.1f} [{score.bleu.low:.1f}, {score.bleu.high:.1f}]"


def _bleu_note(scores: Sequence[TextScore | None]) -> str:
    copied = {f"{score.copied_bleu:.2f}" for score in scores if score and score.copied_bleu is not None}
    copying = [f"the inputs themselves score {bleu}" for bleu in sorted(copied)]
    words = {s.bleu_signature.split("tok:")[-1].split("|")[0] for s in scores if s and s.bleu_signature} - {"13a"}
    return "; ".join([_examples_note(scores), *copying, *(f"sacrebleu's tokenizer {name}" for name in sorted(words))])


def _examples_note(scores: Iterable[TextScore | None]) -> str:
    counts = dict.fromkeys(f"{score.examples:,}" for score in scores if score)
    return f"n = {' / '.join(counts)}"
