"""Texts decoded greedily from a trained model, in length buckets.

Legend: B rows, I input slots, T new tokens.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from common.data.tokenizer import Tokenizer
from common.infer.decode import make_greedy
from common.infer.prompt import Prompt
from common.train.state import Skeleton

BUCKET = 16
"""Input widths are multiples of this many slots, so that few programs are compiled."""


def decode_greedily(
    model: Skeleton,
    params: object,
    mesh: Mesh,
    tokenizer: Tokenizer,
    inputs: Sequence[np.ndarray],
    *,
    rows: int,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> list[str]:
    """The decoded text of each row of input ids, in the order given.

    `advance` hears how many examples have just been done. Inputs of similar length are decoded together; an example's
    text does not depend on its company.
    """
    greedy = make_greedy(model, max_new_tokens=max_new_tokens, start_id=tokenizer.start_id, eos_id=tokenizer.eos_id)
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    texts = [""] * len(inputs)
    with jax.set_mesh(mesh):
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            tokens_BT = np.asarray(greedy(params, _prompt([inputs[i] for i in chosen], rows, tokenizer.pad_id)))
            for i, tokens_T in zip(chosen, tokens_BT, strict=False):
                ended = np.flatnonzero(tokens_T == tokenizer.eos_id)
                # Ids of the table's padding rows are no tokens; a poor model may still choose one.
                kept_T = tokens_T[: ended[0] if len(ended) else None]
                texts[i] = tokenizer.decode(kept_T[kept_T < tokenizer.vocab_size])
            advance(len(chosen))
    return texts


def _prompt(inputs: Sequence[np.ndarray], rows: int, pad_id: int) -> Prompt:
    """`rows` rows wide enough for the longest input, missing rows empty."""
    width = -(-max(1, *(len(x) for x in inputs)) // BUCKET) * BUCKET
    inputs_BI = np.full((rows, width), pad_id, np.int32)
    lengths_B = np.zeros(rows, np.int32)
    for row, x in enumerate(inputs):
        inputs_BI[row, : len(x)] = x
        lengths_B[row] = len(x)
    return Prompt(inputs_BI=jax.numpy.asarray(inputs_BI), lengths_B=jax.numpy.asarray(lengths_B))
