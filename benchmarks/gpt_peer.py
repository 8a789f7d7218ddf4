"""The JAX side of the comparison with PyTorch.

`python -m benchmarks.gpt_peer WEIGHTS.npz` writes its initial weights and its batch, takes two steps, prints their
losses, then trains as many steps as each line of stdin asks for.

Legend: B rows, L length (target slots; there are no input slots).
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import decoder
from common.allocator import keep_freed_memory
from common.data.batch import Batch
from common.recipe import Execution
from common.train.config import AdamW, Budget, Linear, TrainConfig
from common.train.programs import Setup, make_programs
from common.train.state import init_state
from common.train.step import Numbers
from experiments.families import builder
from gpt.config import GptConfig


def make_setup(config: GptConfig, optimizer: AdamW, learning_rate: float, rows: int, length: int) -> Setup:
    """Returns the setup of a float32 training step at a constant learning rate, on rows of target slots only."""
    train = TrainConfig(
        budget=Budget(unit="steps", amount=1),
        optimizer=optimizer,
        schedule=Linear(final_fraction=1.0),
        validate_every=1,
        checkpoint_every=1,
        execution=Execution(dtype="float32", scan_layers=False),
    )
    return Setup(
        build=builder(config, train.execution),
        model=config,
        train=train,
        learning_rate=learning_rate,
        steps=1,
        row_slots=(rows, 0, length),
    )


def random_batch(setup: Setup) -> Batch:
    """Returns a batch of random tokens: one segment fills each row, and there are no inputs."""
    rows, _, length = setup.row_slots
    targets_BL = np.random.default_rng(0).integers(0, setup.model.vocab_size, (rows, length), np.int32)
    empty_B0 = np.zeros((rows, 0), np.int32)
    return Batch(
        inputs_BI=empty_B0,
        input_segments_BI=empty_B0,
        input_positions_BI=empty_B0,
        decoder_inputs_BT=np.pad(targets_BL, ((0, 0), (1, 0)))[:, :-1],
        targets_BT=targets_BL,
        target_segments_BT=np.ones_like(targets_BL),
        target_positions_BT=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        weights_BT=np.ones((rows, length), np.float32),
    )


def named_weights(params: Any) -> dict[str, np.ndarray]:
    """Copies the parameters, by dotted name: a training step donates the originals, which are then gone."""
    return {name: np.array(x) for name, x in nnx.traversals.flatten_mapping(params, sep=".").items()}


def main(path: Path) -> None:
    keep_freed_memory()
    setup = make_setup(decoder.DECODER, decoder.OPTIMIZER, decoder.LEARNING_RATE, decoder.ROWS, decoder.LENGTH)
    programs = make_programs(setup)
    host = random_batch(setup)
    with jax.set_mesh(programs.mesh):
        state = init_state(programs.model, programs.optimizer, setup.train.seed, programs.shardings)
        arrays: dict[str, Any] = named_weights(state.params)
        np.savez(path, tokens_BL=host.decoder_inputs_BT, targets_BL=host.targets_BT, **arrays)
        batch = programs.put(host)
        rate = np.float32(setup.learning_rate)
        numbers = programs.replicate(Numbers(seed=np.uint32(setup.train.seed), learning_rate=rate))

        def run(steps: int) -> list[float]:
            nonlocal state
            losses = []
            for _ in range(steps):
                state, metrics = programs.train_step(state, batch, numbers)
                losses.append(float(metrics["loss"]))
            return losses

        about = {"losses": run(2), "version": jax.__version__, "flops_per_step": setup.flops_per_step()}
        decoder.serve(run, about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
