"""`twinstack score`: log-likelihoods of the texts in a file under a trained model.

Each line is a JSON object of one of the forms in `common.infer.scored_texts`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from common.errors import UserError
from common.files import user_rows, write_rows
from common.infer.score import LENGTHS, Score, mean_loss
from common.infer.scored_texts import FORMS_IN_WORDS, has_one_form
from common.paths import check_file, is_special
from common.progress import ProgressBars
from common.recipe import Dtype, Execution
from common.terminal import harmless
from experiments.models.finding import open_model
from experiments.models.loading import mesh_here
from experiments.running.jax_setup import set_up_jax


def score(
    *, model: str, file: Path, out: Path, eos: bool, rows: int, lengths: Sequence[int] | None, dtype: Dtype
) -> None:
    """Writes each line of `file` to `out` with `log_likelihood` (nats), `tokens`, `is_greedy` and `log_probs` added.

    Each device scores up to `rows` packed rows at a time; a row has one of `lengths`. With `eos` the end token of a
    text is scored too. Raises UserError naming the line that cannot be read or scored, or where `out` cannot be a
    file; nothing is written then.
    """
    lengths = LENGTHS if lengths is None else lengths
    check_file(out, "--out")
    if out.exists() and not is_special(out) and file.exists() and out.samefile(file):
        raise UserError(f"--out {out} is --file itself, which is never overwritten: give another name")
    set_up_jax()
    records = read_records(file)
    policy = open_model(model, Execution(dtype=dtype), mesh_here())
    pairs = []
    for number, record in enumerate(records, 1):
        try:
            pairs.append(policy.encode_pair(record, eos=eos, longest=max(lengths)))
        except UserError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
    with ProgressBars(Console(stderr=True)).bar(f"scoring with {policy.origin}", len(pairs)) as advance:
        scores = policy.score_pairs(pairs, rows=rows, lengths=lengths, advance=advance)
    write_rows(out, [record | _as_json(s) for record, s in zip(records, scores, strict=True)])
    print(harmless(f"{_summary(scores)}; written to {out}"))


def read_records(file: Path) -> list[dict[str, Any]]:
    """Reads a JSON-lines file. Raises UserError naming the first line that has none of the forms."""
    records = user_rows(file)
    for number, record in enumerate(records, 1):
        if not has_one_form(record):
            raise UserError(f"{file}, line {number} must be an object with {FORMS_IN_WORDS}")
    return records


def _as_json(found: Score) -> dict[str, Any]:
    """Returns the fields that are added to a line; `log_probs` has the scored tokens only."""
    return {
        "log_likelihood": found.log_likelihood,
        "tokens": found.tokens,
        "is_greedy": found.is_greedy,
        "log_probs": [round(float(x), 6) for x in found.log_probs_T[found.weights_T > 0]],
    }


def _summary(scores: Sequence[Score]) -> str:
    tokens, loss = sum(s.tokens for s in scores), mean_loss(scores)
    return f"{len(scores):,} texts, {tokens:,} tokens: {loss:.4f} nats per token, perplexity {np.exp(loss):.4g}"
