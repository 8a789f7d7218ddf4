"""Texts decoded greedily from a trained model, in length buckets."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from common.data.tokenizers.tokenizer import Tokenizer
from common.infer.config import Greedy, Limits
from common.infer.generate import Generator, Request
from common.infer.texts import EncodedPrompt
from common.model import Skeleton


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OwnRules:
    """Those of our models: targets behind a start token. Inputs come as ids, with whatever ends them."""

    tokenizer: Tokenizer
    alignment: Literal["start_token"] = "start_token"
    start_id: int
    eos_ids: tuple[int, ...]
    bos_id: None = None
    add_bos: bool = False
    eos_after_inputs: bool = False
    prompts: Literal["inputs"] = "inputs"


def greedy_decoder(
    model: Skeleton, params: object, mesh: Mesh, tokenizer: Tokenizer, *, rows: int, max_new_tokens: int
) -> Callable[[Sequence[np.ndarray], Callable[[int], None]], list[str]]:
    """Returns `decode(inputs, advance)`: the text of each row of input ids, in their order.

    `advance` is called with the number of examples that have just been decoded. Inputs of similar length are decoded
    together; an example's text does not depend on its company. All calls share their compiled programs.
    """
    rules = _OwnRules(tokenizer=tokenizer, start_id=tokenizer.start_id, eos_ids=(tokenizer.eos_id,))
    limits = Limits(max_new_tokens=max_new_tokens)
    generator = Generator(model, params, mesh, rules, method=Greedy(), limits=limits, rows=rows)

    def decode(inputs: Sequence[np.ndarray], advance: Callable[[int], None]) -> list[str]:
        texts = [""] * len(inputs)
        requests = [Request(prompt=EncodedPrompt(inputs_I=x, start=tokenizer.start_id)) for x in inputs]
        for index, completions in generator.complete(requests):
            texts[index] = completions[0].text
            advance(1)
        return texts

    return decode
