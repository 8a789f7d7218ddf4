"""Encodes texts whose log-likelihood is asked for.

A record has one of three forms. A value is a text, in which sentinels such as `<extra_id_0>` count as single tokens, or
a list of token ids.

    {"inputs": ..., "targets": ...}          as in training: inputs end as there, and targets follow a start token
    {"context": ..., "continuation": ...}    as a language model: both are targets, only the continuation is scored
    {"text": ...}                            the same without a context

For a language model, whose inputs are always empty or form one text with its targets ("native" alignment), the first
form means the same as the second.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.infer.score import Pair, continuation, pair
from common.infer.texts import TextCodec, frame_inputs

FORMS = (("inputs", "targets"), ("context", "continuation"), ("text",))
FORMS_IN_WORDS = " or ".join(" and ".join(form) for form in FORMS)


def has_one_form(record: Mapping[str, Any]) -> bool:
    """Returns whether a record has the fields of exactly one form.

    >>> has_one_form({"text": "a", "note": "b"}), has_one_form({"inputs": "a"})
    (True, False)
    """
    return sum(all(name in record for name in form) for form in FORMS) == 1


def to_pair(record: Mapping[str, Any], codec: TextCodec, vocab_size: int, *, eos: bool) -> Pair:
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
    record: Mapping[str, Any], before: str | None, after: str, codec: TextCodec, vocab_size: int
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


def _ids(record: Mapping[str, Any], name: str, codec: TextCodec, vocab_size: int) -> list[int]:
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
