"""Our side of the comparison with Hugging Face: `python -m benchmarks.generation_peer NAME` decodes on request.

Legend: B rows, V vocab.
"""

import sys

import jax
import numpy as np
from flax import nnx

from benchmarks import decoder
from benchmarks.generation import EOS, MODELS, NEW, PROMPT, ROWS
from common.allocator import keep_freed_memory
from common.infer.config import Greedy, Limits
from common.infer.decode import Decoder, Seeds, decoding_weights
from common.infer.prompt import pad_prompts
from common.model import skeleton
from common.recipe import Execution
from experiments.families import builder


def main(name: str) -> None:
    keep_freed_memory()
    config = MODELS[name]
    model = skeleton(builder(config, Execution(dtype="float32", scan_layers=False)))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(model.build(nnx.Rngs(0)))))()
    weights, program = decoding_weights(model, params), Decoder(model, Greedy(), (EOS,))
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (ROWS, PROMPT), np.int32)
    prompt = pad_prompts(list(tokens), [0] * ROWS, rows=ROWS)
    nothing_B = np.zeros(ROWS, np.uint32)
    limits = Limits(max_new_tokens=NEW, min_new_tokens=NEW)

    def run(batches: int) -> None:
        for _ in range(batches):
            seeds = Seeds(seed=0, prompts_B=nothing_B, samples_B=nothing_B)
            state = program.start(weights, prompt, seeds, np.ones(ROWS, bool), slots=NEW)
            found = program.read(program.advance(weights, state, limits))
            assert (found.lengths_BR == NEW).all()

    run(1)
    size = sum(x.size for x in jax.tree.leaves(params))
    decoder.serve(run, {"version": f"JAX {jax.__version__}", "parameters": size})


if __name__ == "__main__":
    main(sys.argv[1])
