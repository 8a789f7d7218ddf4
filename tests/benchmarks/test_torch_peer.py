"""The PyTorch decoder of the benchmarks does the same work as ours."""

import jax
import pytest

from benchmarks import gpt_peer
from common.train.config import AdamW
from common.train.programs import make_programs
from common.train.state import init_state
from tests.helpers import gpt
from tests.tiny import numbers

torch = pytest.importorskip("torch", reason="PyTorch is optional: pip install torch")

LEARNING_RATE = 0.01


def test_steps_agree() -> None:
    """Compares the losses of two steps from equal weights, and every weight after the first step."""
    from benchmarks import torch_peer

    # With a large epsilon Adam's first step depends on the size of the gradient, and so on its clipping.
    optimizer = AdamW(weight_decay=0.5, clip_norm=0.5, epsilon=0.01)
    config = gpt(num_layers=2, num_kv_heads=4)
    setup = gpt_peer.make_setup(config, optimizer, LEARNING_RATE, rows=4, length=16)
    programs, batch = make_programs(setup), gpt_peer.random_batch(setup)
    model = torch_peer.Decoder(config, length=16)
    after = torch_peer.Decoder(config, length=16)
    with jax.set_mesh(programs.mesh):
        state = init_state(programs.model, programs.optimizer, 0, programs.shardings)
        torch_peer.load(model, gpt_peer.named_weights(state.params))
        state, first = programs.train_step(state, programs.put(batch), numbers(LEARNING_RATE))
        torch_peer.load(after, gpt_peer.named_weights(state.params))
        _, second = programs.train_step(state, programs.put(batch), numbers(LEARNING_RATE))
    assert first["grad_norm"] > optimizer.clip_norm

    text = [torch.tensor(x).long() for x in (batch.decoder_inputs_BT, batch.targets_BT)]
    trainer = torch_peer.Trainer(model, optimizer, LEARNING_RATE)
    assert trainer.step(*text) == pytest.approx(float(first["loss"]), rel=1e-5)
    for (name, mine), theirs in zip(model.state_dict().items(), after.state_dict().values(), strict=True):
        assert (mine - theirs).abs().max() < 1e-4 * LEARNING_RATE, name
    assert trainer.step(*text) == pytest.approx(float(second["loss"]), rel=1e-5)
