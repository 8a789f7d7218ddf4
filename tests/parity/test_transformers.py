"""Parity with Hugging Face Transformers on the same weights: logits, loss, gradients, a step of AdamW; in float32."""

import copy
import dataclasses
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from common.data.batch import Batch
from common.infer.policy import Policy
from common.progress import ProgressBars
from common.recipe import Execution
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.train.config import AdamW
from common.train.optimizer import make_optimizer
from common.train.state import TrainState
from common.train.step import Numbers, make_train_step, weighted_loss
from common.trees import flatten
from common.weights.folder import leaf_shapes, read_leaf
from experiments.models.convert import convert
from experiments.models.finding import open_model
from tests.parity.padded import Side, one_text, padded, two_texts
from tests.parity.their_models import ENCODER_DECODERS, LLAMA, T5, VOCAB, random_model

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.slow
PROGRESS = ProgressBars(Console(file=io.StringIO()))
EXECUTION = Execution(dtype="float32", matmul_precision="highest", attention_block=8, loss_chunk=32)

TOLERANCE = 2e-5
LEARNING_RATE = 1e-3
# Adam's first step is the gradient's sign, unless epsilon is large: it must dominate gradients that are only rounding.
OPTIMIZER = AdamW(clip_norm=1e9, epsilon=1e-6)

CASES = [
    *((name, side, 12) for name in ("t5-v1.0", "t5-v1.1") for side in ("left", "right")),
    *((name, side, slots) for name in ("gpt2", "llama") for side in ("left", "right") for slots in (0, 7)),
    ("mt5", "left", 12),
    ("llama-tied", "right", 7),
]
"""(model, padding, input slots)."""

ALWAYS_ZERO = {"gpt2": {"layers/attention/key_bias_GC"}}
"""Adding a constant to the logits of all keys leaves softmax unchanged, so these gradients are only rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers:
    """One model in both libraries."""

    theirs: Any
    ours: Policy
    saved: Path
    """The folder of Transformers' files."""

    def parameters(self) -> dict[str, np.ndarray]:
        return {leaf: np.asarray(value) for leaf, value in flatten(self.ours.params, "/").items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedTexts:
    """The same texts for both libraries."""

    batch: Batch
    arguments: dict[str, Any]
    """Arguments of their model's call."""
    compared_BT: np.ndarray
    """Target slots that are not padding."""


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peers]:
    made: dict[str, Peers] = {}

    def get(name: str) -> Peers:
        if name not in made:
            made[name] = _make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _make(name: str, folder: Path) -> Peers:
    theirs = random_model(name)
    theirs.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours", PROGRESS)
    ours = open_model(str(folder / "ours"), EXECUTION, make_mesh(MeshShape()))
    return Peers(theirs=theirs, ours=ours, saved=folder / "theirs")


def make_texts(name: str, side: Side, input_slots: int) -> PaddedTexts:
    text = padded([20, 11, 15, 18], 20, side, vocab_size=VOCAB, seed=1)
    if name not in ENCODER_DECODERS:
        batch, labels = one_text(text, input_slots)
        arguments = {
            "input_ids": text.tokens_BL,
            "attention_mask": text.real_BL.astype(np.int64),
            "position_ids": text.positions_BL,
        }
        compared_BT = text.real_BL[:, input_slots:]
    else:
        inputs = padded([5, 12, 1, 9], input_slots, side, vocab_size=VOCAB, seed=2)
        targets_BT = np.random.default_rng(3).integers(0, VOCAB, text.tokens_BL.shape)
        batch, labels = two_texts(inputs, text, targets_BT)
        arguments = {
            "input_ids": inputs.tokens_BL,
            "attention_mask": inputs.real_BL.astype(np.int64),
            "decoder_input_ids": text.tokens_BL,
            "decoder_attention_mask": text.real_BL.astype(np.int64),
        }
        compared_BT = text.real_BL
    tensors = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in (arguments | {"labels": labels}).items()}
    return PaddedTexts(batch=batch, arguments=tensors, compared_BT=compared_BT)


@jax.default_matmul_precision("highest")
def our_logits(peers: Peers, batch: Batch) -> np.ndarray:
    def logits(params: Any, batch: Batch) -> jax.Array:
        model = peers.ours.model.merge(params)
        return model.hidden(batch) @ model.head()

    return np.asarray(jax.jit(logits)(peers.ours.params, batch))


@jax.default_matmul_precision("highest")
def our_loss_and_gradient(peers: Peers, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    def loss(params: Any, batch: Batch) -> jax.Array:
        total, _, weight = weighted_loss(peers.ours.model, params, batch, EXECUTION, 0.0, None)
        return total / weight

    value, gradient = jax.jit(jax.value_and_grad(loss))(peers.ours.params, batch)
    return float(value), {leaf: np.asarray(x) for leaf, x in flatten(gradient, "/").items()}


def as_ours(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of one of their folders, by our names."""
    destination = folder.with_name(f"{folder.name}-as-ours")
    convert(folder, destination, PROGRESS)
    return {leaf: read_leaf(destination, leaf).read().result() for leaf in flatten(leaf_shapes(destination), "/")}


def their_gradient(peers: Peers, case: PaddedTexts, folder: Path) -> dict[str, np.ndarray]:
    """Their gradients, named and laid out by the tables that convert weights."""
    peers.theirs.zero_grad()
    peers.theirs(**case.arguments).loss.backward()
    named = dict(peers.theirs.named_parameters(remove_duplicate=False))
    keys = safetensors_torch.load_file(peers.saved / "model.safetensors").keys()
    folder.mkdir()
    safetensors_torch.save_file({key: named[key].grad.clone() for key in keys}, folder / "model.safetensors")
    shutil.copyfile(peers.saved / "config.json", folder / "config.json")
    return as_ours(folder)


def assert_close(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    """Compares leaf by leaf, by the relative norm of the difference."""
    assert ours.keys() == theirs.keys()
    errors = {}
    for leaf, reference in theirs.items():
        assert ours[leaf].shape == reference.shape, leaf
        scale = np.linalg.norm(reference.astype(np.float64))
        assert scale > 0, leaf
        errors[leaf] = np.linalg.norm(ours[leaf].astype(np.float64) - reference.astype(np.float64)) / scale
    worst = max(errors, key=errors.__getitem__)
    print(f"{worst}: {errors[worst]:.1e}")
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize(("name", "tied", "scaled"), [("t5-v1.0", 1, 1), ("t5-v1.1", 0, 0), ("mt5", 0, 0)])
def test_the_reference_t5_is_tied_and_scaled_as_expected(peers, name, tied, scaled):
    both = peers(name)
    model, recipe = both.theirs, both.ours.config.recipe
    assert (model.lm_head.weight is model.shared.weight) == tied
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    with torch.no_grad():
        out = model(**make_texts(name, "right", 12).arguments, output_hidden_states=True)
        hidden_BTD = out.decoder_hidden_states[-1] * (T5["d_model"] ** -0.5 if scaled else 1.0)
        torch.testing.assert_close(out.logits, hidden_BTD @ model.lm_head.weight.T)
    assert (recipe.tied_embeddings, recipe.scale_logits) == (tied, scaled)
    assert recipe.mlp == ("relu" if name == "t5-v1.0" else "geglu")


def test_the_tied_llama_is_tied(peers):
    both = peers("llama-tied")
    assert both.theirs.lm_head.weight is both.theirs.model.embed_tokens.weight
    assert both.ours.config.recipe.tied_embeddings


def test_the_reference_llama_has_grouped_heads_and_its_rope_theta(peers):
    both = peers("llama")
    steps = torch.arange(0, LLAMA["head_dim"], 2) / LLAMA["head_dim"]
    torch.testing.assert_close(both.theirs.model.rotary_emb.inv_freq, 50.0**-steps)
    assert both.theirs.model.layers[0].self_attn.k_proj.weight.shape == (2 * 8, 24)
    assert both.theirs.lm_head.weight is not both.theirs.model.embed_tokens.weight
    assert both.ours.config.recipe.rope_theta == 50.0
    assert (both.ours.config.num_heads, both.ours.config.num_kv_heads) == (4, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_relu_is_at_its_kink(peers, side):
    """If an input of ReLU were nearly 0, rounding would decide its derivative, and gradients could not be compared."""
    model, case, seen = peers("t5-v1.0").theirs, make_texts("t5-v1.0", side, 12), []
    hooks = [
        block.layer[-1].DenseReluDense.wi.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
        for block in (*model.encoder.block, *model.decoder.block)
    ]
    with torch.no_grad():
        model(**case.arguments)
    for hook in hooks:
        hook.remove()
    assert len(seen) == T5["num_layers"] + T5["num_decoder_layers"]
    assert min(float(out.abs().min()) for out in seen) > 1e-5


@pytest.mark.parametrize(("name", "side", "input_slots"), CASES)
def test_logits_and_loss(peers, name, side, input_slots):
    both, case = peers(name), make_texts(name, side, input_slots)
    with torch.no_grad():
        out = both.theirs(**case.arguments)
    # Target slots are the last slots of a language model's text, and all slots of a decoder's.
    theirs = out.logits.numpy()[:, -case.compared_BT.shape[1] :][case.compared_BT]
    ours = our_logits(both, case.batch)[case.compared_BT]
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    loss, _ = our_loss_and_gradient(both, case.batch)
    loss_error = abs(loss - float(out.loss)) / float(out.loss)
    print(f"logits: {error:.1e} loss: {loss_error:.1e}")
    assert error <= TOLERANCE
    assert loss_error <= TOLERANCE


@pytest.mark.parametrize(("name", "side", "input_slots"), CASES)
def test_gradients(peers, tmp_path, name, side, input_slots):
    both, case = peers(name), make_texts(name, side, input_slots)
    _, ours = our_loss_and_gradient(both, case.batch)
    theirs = their_gradient(both, case, tmp_path / "gradient")
    for leaf in ALWAYS_ZERO.get(name, ()):
        twin = np.linalg.norm(theirs["layers/attention/query_bias_HC"])
        assert max(np.linalg.norm(ours.pop(leaf)), np.linalg.norm(theirs.pop(leaf))) < TOLERANCE * twin
    assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "side", "input_slots"), CASES)
def test_one_step_of_adamw(peers, tmp_path, name, side, input_slots):
    both, case = peers(name), make_texts(name, side, input_slots)
    before = both.parameters()
    ours, theirs = our_step(both, case), their_step(both, case, tmp_path / "stepped")
    for leaf in ALWAYS_ZERO.get(name, ()):
        del before[leaf], ours[leaf], theirs[leaf]
    for leaf, value in before.items():
        # Large enough that a step wrong by a few percent fails.
        assert np.linalg.norm(theirs[leaf] - value) > 30 * TOLERANCE * np.linalg.norm(value), leaf
    assert_close(ours, theirs)


def our_step(peers: Peers, case: PaddedTexts) -> dict[str, np.ndarray]:
    """Our parameters after one training step."""
    model = peers.ours.model

    def at_rate(rate: Any) -> optax.GradientTransformation:
        return make_optimizer(OPTIMIZER, lambda _: rate, model.logical_axes)

    optimizer = at_rate(LEARNING_RATE)
    step = make_train_step(model, at_rate, execution=EXECUTION, z_loss=0.0, accumulation=1)
    state = TrainState(step=jnp.int32(0), params=peers.ours.params, opt_state=optimizer.init(peers.ours.params))
    numbers = Numbers(seed=np.uint32(0), learning_rate=np.float32(LEARNING_RATE))
    stepped, _ = jax.jit(step)(state, case.batch, numbers)
    return {leaf: np.asarray(x) for leaf, x in flatten(stepped.params, "/").items()}


def their_step(peers: Peers, case: PaddedTexts, folder: Path) -> dict[str, np.ndarray]:
    """Their parameters after one step, by our names; only matrices decay."""
    model = copy.deepcopy(peers.theirs)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (OPTIMIZER.b1, OPTIMIZER.b2)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=OPTIMIZER.epsilon)
    model.zero_grad()
    model(**case.arguments).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return as_ours(folder)
