"""From a prompt's text to what decoding starts from, and from tokens back to text.

Legend: I input slots.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError


class TextRules(Protocol):
    """How a model writes text; read only."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def alignment(self) -> Literal["start_token", "native"]:
        """Whether targets begin behind a start token, or inputs and targets are one text."""
        ...

    @property
    def start_id(self) -> int: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def add_bos(self) -> bool:
        """Whether a text on its own begins with `bos_id`."""
        ...

    @property
    def eos_after_inputs(self) -> bool:
        """Whether inputs, where they are apart from targets, end with an end token."""
        ...

    @property
    def prompts(self) -> Literal["inputs", "targets"]:
        """Where a prompt stands, where inputs are apart from targets: a language model's inputs are always empty."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """What the model reads before it writes."""

    inputs_I: np.ndarray
    start: int
    """The next decoder input."""
    written: tuple[int, ...] = ()
    """Decoder inputs before that one."""
    before: tuple[int, ...] = ()
    """Tokens of the same text as what is written, so that the two are turned into text together."""

    @property
    def length(self) -> int:
        """Positions that it takes before its `start`."""
        return len(self.inputs_I) + len(self.written)

    def hash(self) -> int:
        """32 bits of what is read."""
        read = np.concatenate([self.inputs_I, self.written, [self.start]]).astype("<i4").tobytes()
        person = b"written" if self.written else b""
        return int.from_bytes(hashlib.blake2b(read, digest_size=4, person=person).digest(), "little")


def encode_prompt(text: str, rules: TextRules) -> EncodedPrompt:
    """Sentinels in the text are read as such.

    Raises UserError for text that is not valid Unicode, and for a model without a tokenizer.
    """
    ids = [int(i) for i in tokenizer_of(rules).encode_with_sentinels(text)]
    if rules.alignment == "start_token" and rules.prompts == "targets":
        *written, start = rules.start_id, *ids
        return EncodedPrompt(inputs_I=np.zeros(0, np.int32), start=start, written=tuple(written), before=tuple(ids))
    if rules.alignment == "start_token":
        return EncodedPrompt(inputs_I=np.array(framed(ids, rules), np.int32), start=rules.start_id)
    if rules.bos_id is not None and (rules.add_bos or not ids):
        ids = [rules.bos_id, *ids]
    if not ids:
        ids = [rules.eos_ids[0] if rules.eos_ids else rules.start_id]
    return EncodedPrompt(inputs_I=np.array(ids[:-1], np.int32), start=ids[-1], before=tuple(ids))


def framed(inputs: Sequence[int], rules: TextRules) -> list[int]:
    """Inputs, where they are apart from targets, with the special tokens before and after them."""
    before = [rules.bos_id] if rules.add_bos and rules.bos_id is not None else []
    return [*before, *inputs, *(rules.eos_ids[:1] if rules.eos_after_inputs else ())]


def written_text(prompt: EncodedPrompt, tokens: Sequence[int], rules: TextRules) -> str:
    """The text that `tokens` add behind the prompt."""
    tokenizer = tokenizer_of(rules)
    if not prompt.before:
        return tokenizer.decode(tokens)
    # Not of the tokens alone: what begins a text loses its space with many tokenizers.
    begun = tokenizer.decode(prompt.before)
    whole = tokenizer.decode([*prompt.before, *tokens])
    return whole[len(begun) :] if whole.startswith(begun) else tokenizer.decode(tokens)


def tokenizer_of(rules: TextRules) -> Tokenizer:
    if rules.tokenizer is None:
        raise UserError("the model came without a tokenizer: it cannot read a prompt")
    return rules.tokenizer
