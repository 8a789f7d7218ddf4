"""Decodes texts greedily with a trained model, batched by length."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from common.data.tokenizers.tokenizer import Tokenizer
from common.infer.config import GenerationConfig, Limits
from common.infer.generate import Generator, Request
from common.infer.texts import EncodedPrompt, TextCodec, TextConventions
from common.model import Skeleton
from common.sharding.shape import ROW_AXES


def greedy_decoder(
    model: Skeleton, params: object, mesh: Mesh, tokenizer: Tokenizer, *, rows: int, max_new_tokens: int
) -> Callable[[Sequence[np.ndarray], Callable[[int], None]], list[str]]:
    """Returns `decode(inputs, advance)`, which returns the text for each array of input ids, in order.

    `advance` is called with the number of examples just decoded. Inputs of similar lengths are decoded together; an
    example's text does not depend on the others. All calls share compiled programs.
    """
    # Inputs come as ids with their end token, so `eos_after_inputs` has no effect.
    conventions = TextConventions(
        alignment="start_token", start_id=tokenizer.start_id, eos_ids=(tokenizer.eos_id,), bos_id=None
    )
    codec = TextCodec(tokenizer=tokenizer, conventions=conventions)
    generator = Generator(model, params, mesh, codec)
    devices = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    how = GenerationConfig(limits=Limits(max_new_tokens=max_new_tokens), rows=-(-rows // devices))

    def decode(inputs: Sequence[np.ndarray], advance: Callable[[int], None]) -> list[str]:
        texts = [""] * len(inputs)
        requests = [Request(prompt=EncodedPrompt(inputs_I=x, start=tokenizer.start_id)) for x in inputs]
        for index, completions in generator.complete(requests, how):
            texts[index] = completions[0].text
            advance(1)
        return texts

    return decode
