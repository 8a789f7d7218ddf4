"""`twinstack score`: log-likelihoods of the texts in a file under a trained model.

Each line is a JSON object of one of three forms. A value is a text, in which sentinels such as `<extra_id_0>` count as
single tokens, or a list of token ids.

    {"inputs": ..., "targets": ...}          as in training: inputs end as there, and targets follow a start token
    {"context": ..., "continuation": ...}    as a language model: both are targets, only the continuation is scored
    {"text": ...}                            the same without a context

For a language model, whose inputs are always empty or form one text with its targets ("native" alignment), the first
form means the same as the second.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from common.errors import UserError
from common.files import user_rows, write_rows
from common.infer import score as scoring
from common.infer.score import Pair, Score, continuation, pair
from common.infer.texts import TextCodec, frame_inputs
from common.paths import check_file, is_special
from common.progress import ProgressBars
from common.recipe import Execution
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.terminal import harmless
from experiments.cli.options import Dtype
from experiments.models.finding import open_model
from experiments.running.jax_setup import set_up_jax

FORMS = (("inputs", "targets"), ("context", "continuation"), ("text",))


def score(
    *, model: str, file: Path, out: Path, eos: bool, rows: int, lengths: Sequence[int] | None, dtype: Dtype
) -> None:
    """Writes each line of `file` to `out` with `log_likelihood` (nats), `tokens`, `is_greedy` and `log_probs` added.

    Each device scores up to `rows` packed rows at a time; a row has one of `lengths`. With `eos` the end token of a
    text is scored too. Raises UserError naming the line that cannot be read or scored, or where `out` cannot be a
    file; nothing is written then.
    """
    execution = Execution(dtype=dtype)
    lengths = scoring.LENGTHS if lengths is None else lengths
    check_file(out, "--out")
    if out.exists() and not is_special(out) and file.exists() and out.samefile(file):
        raise UserError(f"--out {out} is --file itself, which is never overwritten: give another name")
    set_up_jax()
    records = read_records(file)
    devices = len(jax.devices())
    loaded = open_model(model, execution, make_mesh(MeshShape(data=devices)))
    pairs = []
    for number, record in enumerate(records, 1):
        try:
            pairs.append(to_pair(record, loaded.text, loaded.config.vocab_size, eos=eos))
            scoring.check_fits("it", pairs[-1], max(lengths), loaded.model)
        except UserError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
    with ProgressBars(Console(stderr=True)).bar(f"scoring with {loaded.origin}", len(pairs)) as advance:
        scores = scoring.score(
            loaded.model,
            loaded.params,
            loaded.mesh,
            pairs,
            execution=execution,
            rows=min(rows, max(len(pairs), 1)) * devices,
            lengths=lengths,
            advance=advance,
        )
    write_rows(out, [record | _as_json(s) for record, s in zip(records, scores, strict=True)])
    print(harmless(f"{_summary(scores)}; written to {out}"))


def read_records(file: Path) -> list[dict[str, Any]]:
    """Reads a JSON-lines file. Raises UserError naming the first line that has none of `FORMS`."""
    records = user_rows(file)
    for number, record in enumerate(records, 1):
        if sum(all(name in record for name in form) for form in FORMS) != 1:
            forms = " or ".join(" and ".join(form) for form in FORMS)
            raise UserError(f"{file}, line {number} must be an object with {forms}")
    return records


def to_pair(record: dict[str, Any], codec: TextCodec, vocab_size: int, *, eos: bool) -> Pair:
    """Returns the pair to score for one record. Raises UserError for values that are not texts, and for unknown ids."""
    before, after = next((form[0] if len(form) == 2 else None, form[-1]) for form in FORMS if form[-1] in record)
    conventions = codec.conventions
    separate = conventions.alignment == "start_token" and conventions.prompts == "inputs"
    as_trained = before == "inputs" and separate
    if as_trained:
        inputs, targets = (_ids(record, name, codec, vocab_size) for name in FORMS[0])
        inputs = frame_inputs(inputs, codec)
    else:
        inputs, targets = _one_text(record, before, after, codec, vocab_size)
    targets = [*targets, *(conventions.eos_ids[:1] if eos else ())]
    if as_trained:
        scored = pair(inputs, targets, start_id=conventions.start_id)
    elif conventions.alignment == "start_token":
        scored = continuation(inputs, targets, start_id=conventions.start_id)
    else:
        scored = continuation([*codec.leading_ids, *inputs] or [conventions.start_id], targets, start_id=None)
    whole = [scored.start_id, *scored.example.inputs_I.tolist(), *scored.example.targets_T.tolist()]
    _check_ids("with the model's own tokens it", whole, vocab_size)
    return scored


def _one_text(
    record: dict[str, Any], before: str | None, after: str, codec: TextCodec, vocab_size: int
) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of its continuation.

    Encodes the two texts together, since the tokenizer may encode the beginning of a text differently from its middle.
    Where a token would span the border, encodes them separately.
    """
    context = [] if before is None else _ids(record, before, codec, vocab_size)
    alone = _ids(record, after, codec, vocab_size)
    if before is None or not (isinstance(record[before], str) and isinstance(record[after], str)):
        return context, alone
    whole = _ids({after: record[before] + record[after]}, after, codec, vocab_size)
    return context, whole[len(context) :] if whole[: len(context)] == context else alone


def _ids(record: dict[str, Any], name: str, codec: TextCodec, vocab_size: int) -> list[int]:
    value = record[name]
    if isinstance(value, str):
        if codec.tokenizer is None:
            raise UserError(f"{name} is text, but the model has no tokenizer: give a list of token ids")
        return codec.tokenizer.encode_with_sentinels(value).tolist()
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise UserError(f"{name} must be a text, or a list of token ids")
    _check_ids(name, value, vocab_size)
    return value


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise UserError(f"{name} contains token {wrong[0]}; ids go from 0 to {vocab_size - 1}")


def _as_json(found: Score) -> dict[str, Any]:
    """Returns the fields that are added to a line; `log_probs` has the scored tokens only."""
    return {
        "log_likelihood": found.log_likelihood,
        "tokens": found.tokens,
        "is_greedy": found.is_greedy,
        "log_probs": [round(float(x), 6) for x in found.log_probs_T[found.weights_T > 0]],
    }


def _summary(scores: Sequence[Score]) -> str:
    tokens = sum(s.tokens for s in scores)
    mean = sum(s.log_likelihood for s in scores) / max(tokens, 1)
    return f"{len(scores):,} texts, {tokens:,} tokens: {-mean:.4f} nats per token, perplexity {np.exp(-mean):.4g}"
