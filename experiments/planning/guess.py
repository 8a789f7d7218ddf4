"""A simple model of one device's memory and time in a training step, to rank many meshes in a moment.

It counts what every implementation must hold and move: parameters, gradients, activations, collectives. Padding, copies
and the compiler's own choices are not in it, so a compiled program decides between the best candidates. Parameters are
stored in float32; what is computed and sent is bf16.
"""

import dataclasses
import math

from common.compute.ledger import attention_parameters, mlp_parameters
from common.compute.roofline import Estimate
from common.compute.topology import Topology
from common.sharding.shape import MeshShape
from common.train.config import AdamW, TrainConfig
from experiments.families import ModelConfig, Stack, family_of
from experiments.run import Run

BF16, FLOAT32 = 2, 4
"""Bytes of one number in each format."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """The simple model's answer for one run and one device."""

    bytes: float
    time: Estimate


def guess(run: Run, topology: Topology) -> Guess:
    """Estimates the memory and seconds of one step, on the run's mesh."""
    step, chip = _step(run), topology.chip_spec
    flops = step.model.flops(run.data.length_sums).of_slowest(step.mesh.context).train_hardware(step.train.execution)
    return Guess(
        bytes=sum(_memory(step).values()),
        time=Estimate(
            compute=flops / topology.devices / chip.flops_per_second,
            memory=sum(_hbm_traffic(step).values()) / chip.hbm_bytes_per_second,
            links=sum(_link_traffic(step, topology).values()) * chip.devices_per_chip / chip.link_bytes_per_second,
            data_centre=_slice_traffic(step, topology) * chip.devices_per_chip / chip.dcn_bytes_per_second,
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """Quantities of one step on one device, from which memory and traffic follow."""

    model: ModelConfig
    train: TrainConfig
    rows: float
    """Rows of one micro-batch on one device."""
    inputs: int
    targets: int
    stacks: tuple[Stack, ...]

    @property
    def mesh(self) -> MeshShape:
        return self.train.mesh

    @property
    def accumulation(self) -> int:
        return self.train.accumulation

    @property
    def recompute(self) -> int:
        """1 where the backward pass runs every layer's forward pass again, else 0."""
        return 0 if self.train.execution.remat in ("none", "dots") else 1

    @property
    def passes(self) -> int:
        """Passes over the weights: forward, backward and perhaps forward again, for each micro-batch."""
        return self.accumulation * (2 + self.recompute)

    @property
    def parameters(self) -> float:
        """Parameters of the device's tensor shard, gathered along fsdp."""
        return self.model.param_count() / self.mesh.tensor

    @property
    def layer_tokens(self) -> float:
        """Tokens of a micro-batch on this device, counted once for each layer they pass through."""
        return self.rows * sum(stack.layers * stack.slots for stack in self.stacks) / self.mesh.context

    @property
    def state_bytes(self) -> int:
        """Bytes of training state for each parameter.

        The parameter, AdamW's two moments (Adafactor's are small), a gradient, and with accumulation another gradient
        to sum up in; all float32.
        """
        moments = 2 * FLOAT32 if isinstance(self.train.optimizer, AdamW) else 0
        gradients = FLOAT32 * (1 + (self.accumulation > 1))
        return FLOAT32 + moments + gradients

    @property
    def stream_bytes(self) -> int:
        """Bytes of one token of the residual stream."""
        return BF16 * self.model.d_model

    @property
    def product_bytes(self) -> int:
        """Bytes of the results of all matrix products in one layer, for one token.

        Queries, keys, values and weighted values are `head_dim` wide for each head; the MLP is `d_ff` wide, twice if
        gated. These are sharded along tensor. Three are as wide as the stream: the output of attention and of the MLP,
        and the stream itself.
        """
        model = self.model
        heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        mlp = (2 if model.recipe.gated_mlp else 1) * model.d_ff
        return BF16 * (3 * model.d_model + (heads + mlp) // self.mesh.tensor)

    @property
    def key_value_bytes(self) -> float:
        """Bytes of one token's key and value in one layer: two vectors for each key-value head."""
        return 2 * BF16 * self.model.num_kv_heads * self.model.head_dim / self.mesh.tensor


def _step(run: Run) -> _Step:
    model, train = run.model, run.train
    rows, inputs, targets = run.row_slots
    return _Step(
        model=model,
        train=train,
        rows=rows / train.mesh.row_parts / train.accumulation,
        inputs=inputs,
        targets=targets,
        stacks=family_of(model).stacks(model, inputs, targets),
    )


def _memory(step: _Step) -> dict[str, float]:
    """Bytes of one device's memory, by what they are for."""
    return {
        "state": step.state_bytes * step.parameters / step.mesh.fsdp,
        "kept": _kept_activations(step),
        "work": _working_memory(step),
        # The head's weights are gathered, and their gradient is as large: 2 + 2 bytes.
        "head": 2 * BF16 * (step.model.d_model * step.model.vocab_size / step.mesh.tensor),
    }


def _kept_activations(step: _Step) -> float:
    """Bytes of activations that all layers keep for the backward pass, by the remat policy."""
    bytes_per_token = {
        "none": 3 * step.product_bytes,  # results of products, and about twice as much from norms, activations, casts
        "dots": step.product_bytes,  # results of products alone
        "attention": 2 * step.stream_bytes,  # each layer's input, and attention's output, about as wide
        "full": step.stream_bytes,  # each layer's input
        "offload": 0,  # each layer's input, in the host's memory
    }
    return step.layer_tokens * bytes_per_token[step.train.execution.remat]


def _working_memory(step: _Step) -> float:
    """Bytes that computing one layer, or the loss, needs besides what is kept."""
    model, mesh, execution = step.model, step.mesh, step.train.execution
    layer = (attention_parameters(model) + mlp_parameters(model)) / mesh.tensor
    queries = min(execution.attention_block, step.inputs / mesh.context)
    scores = step.rows * model.num_heads / mesh.tensor * queries * (step.inputs + step.targets)
    loss_tokens = min(execution.loss_chunk, step.rows * step.targets / mesh.context)
    logits = loss_tokens * model.vocab_size / mesh.tensor
    longest = max(stack.slots for stack in step.stacks)
    return (
        2 * BF16 * layer  # the layer's weights, gathered, and their gradient
        + 2 * FLOAT32 * scores  # attention scores of one block of queries, and their gradient
        + 2 * FLOAT32 * logits  # logits of one chunk of the loss, and their gradient
        + step.rows * longest * step.key_value_bytes  # keys and values of whole rows, gathered along context
    )


def _hbm_traffic(step: _Step) -> dict[str, float]:
    """Bytes that one device reads from and writes to its main memory."""
    # The forward pass writes and reads each product's result (2). The backward pass reads it again for the gradient of
    # the weights, reads its gradient twice, for those of weights and input, and writes that of the input (4). A second
    # forward pass writes and reads it once more (2).
    times = 6 + 2 * step.recompute
    return {
        # Gathered weights are written once and read once in each pass.
        "weights": 2 * BF16 * step.parameters * step.passes,
        "activations": times * step.accumulation * step.layer_tokens * step.product_bytes,
        # The optimizer reads and writes all of the state once.
        "state": 2 * step.state_bytes * step.parameters / step.mesh.fsdp,
    }


def _link_traffic(step: _Step, topology: Topology) -> dict[str, float]:
    """Bytes that one device sends within its slice, over one link; a group's links share its traffic evenly.

    In a ring of n devices, an all-gather or a reduce-scatter of a whole array sends (n - 1) / n of it, and an
    all-reduce, which is one of each, twice that.
    """
    mesh = step.mesh

    def ring(array_bytes: float, size: int) -> float:
        return array_bytes * (size - 1) / size / _links(size, topology)

    gradients = 2 * BF16 * step.parameters / mesh.fsdp  # all-reduced: sent twice
    # The stream is all-reduced after attention and after the MLP: twice forward, twice backward, twice if recomputed.
    stream_sums = (4 + 2 * step.recompute) * step.accumulation * step.layer_tokens * step.model.d_model * BF16
    return {
        # All-gathers of weights in every pass, and a reduce-scatter of gradients for each micro-batch.
        "weights along fsdp": ring(BF16 * step.parameters * (step.passes + step.accumulation), mesh.fsdp),
        "gradients along data": ring(gradients, mesh.data),
        "gradients along context": ring(gradients, mesh.context),
        # Every device gets the keys and values of all others in its row, in every pass.
        "keys and values along context": (
            step.passes * step.layer_tokens * step.key_value_bytes * (mesh.context - 1) / _links(mesh.context, topology)
        ),
        "stream along tensor": ring(2 * stream_sums, mesh.tensor),
    }


def _slice_traffic(step: _Step, topology: Topology) -> float:
    """Bytes that one device sends to other slices: its gradients, all-reduced once per step."""
    return 2 * BF16 * step.parameters / step.mesh.fsdp * (topology.slices - 1) / topology.slices


def _links(size: int, topology: Topology) -> float:
    """Returns how many links carry a ring of `size` devices: two for each direction of the slice that it spans.

    It fills the shortest directions first: a ring of 8 chips in a grid of 4x4x8 spans two directions, so 4 links.
    """
    chips = math.ceil(size / topology.chip_spec.devices_per_chip)
    directions = 0
    for side in sorted(topology.grid):
        if chips > 1:
            chips, directions = math.ceil(chips / side), directions + 1
    return 2.0 * max(directions, 1)
