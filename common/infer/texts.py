"""Encodes a prompt's text as the token ids that decoding starts from, and decodes tokens to text.

Legend: I input slots.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConventions:
    """Where a model expects special tokens: plain values, the `text` of a model folder's model.json.

    Fields with a default may be absent there, in folders of earlier versions.
    """

    alignment: Literal["start_token", "native"]
    """"start_token": inputs and targets are separate, and targets begin after a start token. "native": inputs and
    targets are one text in which each token predicts the next."""
    start_id: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    eos_after_inputs: bool = True
    """Whether separate inputs end with an end token."""
    prompts: Literal["inputs", "targets"] = "inputs"
    """Where a prompt goes if inputs and targets are separate. A language model's inputs are always empty, so its
    prompts go to the targets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCodec:
    """A model's tokenizer and text conventions."""

    tokenizer: Tokenizer | None
    """None for a model without one: it reads and writes ids only."""
    conventions: TextConventions
    add_bos: bool = False
    """Whether a text begins with `bos_id`."""

    @property
    def leading_ids(self) -> list[int]:
        """`[bos_id]` if a text begins with it, else empty."""
        bos_id = self.conventions.bos_id
        return [bos_id] if self.add_bos and bos_id is not None else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """Token ids that the model reads before it generates."""

    inputs_I: np.ndarray
    start: int
    """The next decoder input."""
    written: tuple[int, ...] = ()
    """Decoder inputs before `start`."""
    before: tuple[int, ...] = ()
    """Tokens of the text that generation continues. They are decoded together with the generated tokens."""

    @property
    def length(self) -> int:
        """Positions that the prompt takes before `start`."""
        return len(self.inputs_I) + len(self.written)

    def hash(self) -> int:
        """Returns a 32-bit hash of all ids that the model reads."""
        ids = np.concatenate([self.inputs_I, self.written, [self.start]]).astype("<i4").tobytes()
        person = b"written" if self.written else b""
        return int.from_bytes(hashlib.blake2b(ids, digest_size=4, person=person).digest(), "little")


def encode_prompt(text: str, codec: TextCodec) -> EncodedPrompt:
    """Encodes a prompt; sentinels written in the text become sentinel ids.

    Raises UserError if the text is not valid Unicode or the model has no tokenizer.
    """
    conventions = codec.conventions
    ids = [int(i) for i in tokenizer_of(codec).encode_with_sentinels(text)]
    if conventions.alignment == "start_token" and conventions.prompts == "targets":
        *written, start = conventions.start_id, *ids
        return EncodedPrompt(inputs_I=np.zeros(0, np.int32), start=start, written=tuple(written), before=tuple(ids))
    if conventions.alignment == "start_token":
        return EncodedPrompt(inputs_I=np.array(frame_inputs(ids, codec), np.int32), start=conventions.start_id)
    if conventions.bos_id is not None and (codec.add_bos or not ids):
        ids = [conventions.bos_id, *ids]
    if not ids:
        ids = [conventions.eos_ids[0] if conventions.eos_ids else conventions.start_id]
    return EncodedPrompt(inputs_I=np.array(ids[:-1], np.int32), start=ids[-1], before=tuple(ids))


def frame_inputs(ids: Sequence[int], codec: TextCodec) -> list[int]:
    """Returns separate inputs with their special tokens in front and at the end."""
    ends = codec.conventions.eos_ids[:1] if codec.conventions.eos_after_inputs else ()
    return [*codec.leading_ids, *ids, *ends]


def decode_continuation(prompt: EncodedPrompt, tokens: Sequence[int], codec: TextCodec) -> str:
    """Returns the text that `tokens` add to the prompt's."""
    tokenizer = tokenizer_of(codec)
    if not prompt.before:
        return tokenizer.decode(tokens)
    # Decoded together with the prompt: alone, the first token would lose its leading space with many tokenizers.
    begun = tokenizer.decode(prompt.before)
    whole = tokenizer.decode([*prompt.before, *tokens])
    return whole[len(begun) :] if whole.startswith(begun) else tokenizer.decode(tokens)


def tokenizer_of(codec: TextCodec) -> Tokenizer:
    """Returns the model's tokenizer. Raises UserError if there is none."""
    if codec.tokenizer is None:
        raise UserError("the model has no tokenizer, so it cannot read a prompt")
    return codec.tokenizer
