"""Checks the FLOPs and bytes of programs, counted in their text."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from common.compute.hlo import Program, parse, parse_lowered
from common.compute.traffic import memory_traffic, product_flops
from common.recipe import Execution
from common.train.programs import lower_step, make_programs
from experiments.run import Run
from experiments.running.pipeline import make_setup
from t5like.config import RUNGS
from tests.experiments.tiny_study import tiny_run, with_train


@pytest.mark.parametrize(("remat", "passes"), [(False, 3), (True, 4)])
@pytest.mark.parametrize("layers", [2, 5])
def test_training_computes_each_layer_three_times_and_with_remat_four(layers, remat, passes) -> None:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(jnp.tanh(x @ w) @ w.T), None

    def loss(ws: jax.Array, x: jax.Array) -> jax.Array:
        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.square(jax.lax.scan(body, x, ws)[0]).sum()

    arguments = jnp.ones((layers, 16, 32)), jnp.ones((8, 16))
    program = parse(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text())
    assert product_flops(program) == passes * layers * 2 * (2 * 8 * 16 * 32)


def three_layers(folder: Path, name: str) -> Run:
    """A run with three layers per stack; `layerwise` is the ladder's last rung."""
    run = tiny_run(folder, "gpt" if name == "gpt" else "t5like")
    stacks = ("num_layers",) if name == "gpt" else ("encoder_layers", "decoder_layers")
    switches = RUNGS[4] if name == "layerwise" else {}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **dict.fromkeys(stacks, 3), **switches))


def lowered(run: Run, **execution: Any) -> Program:
    """The step as it is lowered, with all attention logits at once."""
    chosen = dataclasses.replace(run.train.execution, attention="plain", **execution)
    setup = make_setup(with_train(run, execution=chosen))
    return parse_lowered(lower_step(setup, make_programs(setup)))


@pytest.mark.parametrize(
    ("remat", "mlp_chunk"),
    [("none", None), ("none", 8), ("dots", None), ("attention", None), ("full", None), ("full", 8)],
)
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt", "t5like")), "layerwise"]
)
def test_the_ledger_counts_recomputation(name: str, remat: Any, mlp_chunk: int | None, tmp_path: Path) -> None:
    run = three_layers(tmp_path, name)
    expected = run.model.flops(run.data.length_sums).train_hardware(
        Execution(attention="plain", remat=remat, mlp_chunk=mlp_chunk)
    )
    assert product_flops(lowered(run, scan_layers=True, remat=remat, mlp_chunk=mlp_chunk)) == expected


WINDOWED = """
%condition (carry: (f32[8,8], u32[])) -> pred[] {
  %carry = (f32[8,8], u32[]) parameter(0)
  %turn = u32[] get-tuple-element(%carry), index=1
  %number = u32[] constant(LIMIT)
  %limit = u32[] copy(%number)
  ROOT %test = pred[] compare(%turn, %limit), direction=LT
}

%body (carry.1: (f32[8,8], u32[])) -> (f32[8,8], u32[]) {
  %carry.1 = (f32[8,8], u32[]) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%carry.1), index=0
  %turn.1 = u32[] get-tuple-element(%carry.1), index=1
  %one = u32[] constant(1)
  %next = u32[] add(%turn.1, %one)
  %after = u32[] add(%one, %next)
  %product = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (f32[8,8], u32[]) tuple(%product, %after)
}

ENTRY %main (y: f32[8,8]) -> f32[8,8] {
  %y = f32[8,8]{1,0} parameter(0)
  %begin = u32[] constant(BEGIN)
  %start = (f32[8,8], u32[]) tuple(%y, %begin)
  %loop = (f32[8,8], u32[]) while(%start), condition=%condition, body=%body
  ROOT %z = f32[8,8]{1,0} get-tuple-element(%loop), index=0
}
"""


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize(("begin", "limit", "turns"), [(0, 6, 3), (0, 5, 3), (2, 6, 2), (6, 6, 0)])
def test_a_loop_may_start_late_and_count_by_two(begin: int, limit: int, turns: int, hashes: bool) -> None:
    """Programs write elements of a tuple as instructions or as `tuple#1`."""
    text = WINDOWED.replace("BEGIN", str(begin)).replace("LIMIT", str(limit))
    if hashes:
        lines = [line for line in text.splitlines() if "get-tuple-element(%carry" not in line]
        text = "\n".join(lines).replace("(%turn,", "(%carry#1,").replace("%turn.1", "%carry.1#1")
        text = text.replace("dot(%x, %x)", "dot(%carry.1#0, %carry.1#0)")
    assert product_flops(parse(text)) == turns * 2 * 8**3


def test_a_loop_without_a_constant_bound_is_an_error() -> None:
    def until(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y.sum() < 100, lambda y: y * 2, x)

    program = parse(jax.jit(until).lower(jnp.ones(3)).compile().as_text())
    with pytest.raises(ValueError, match="is not a constant"):
        program.runs()


FUSION = """
%fused (p0: f32[24,64,128], p1: s32[], p2: f32[64,128]) -> f32[24,64,128] {
  %p0 = f32[24,64,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %shaped = f32[1,64,128]{2,1,0} reshape(%p2)
  %sum = f32[1,64,128]{2,1,0} add(%old, %shaped)
  ROOT %new = f32[24,64,128]{2,1,0} WRITE
}

ENTRY %main (a: f32[24,64,128], i: s32[], b: f32[64,128]) -> f32[24,64,128] {
  %a = f32[24,64,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %b = f32[64,128]{1,0:T(8,128)MEMORY} parameter(2)
  ROOT %out = f32[24,64,128]{2,1,0:T(8,128)} fusion(%a, %i, %b), kind=kLoop, calls=%fused
}
"""
LAYER = 64 * 128 * 4


@pytest.mark.parametrize(
    ("write", "memory", "layers"),
    [
        ("broadcast(%sum), dimensions={0,1,2}", "", 1 + 1 + 24),
        ("broadcast(%sum), dimensions={0,1,2}", "S(1)", 1 + 24),
    ],
)
def test_a_fusion_that_slices_a_stack_reads_one_layer(write: str, memory: str, layers: int) -> None:
    """It also writes its whole result, and reads the other operand unless that is in faster memory."""
    program = parse(FUSION.replace("WRITE", write).replace("MEMORY", memory))
    assert memory_traffic(program) == layers * LAYER


NESTED = """
%inner (q0: bf16[24,64,128], q1: s32[], q2: bf16[64,128]) -> bf16[64,128] {
  %q0 = bf16[24,64,128]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = bf16[64,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %cast = bf16[24,64,128]{2,1,0} bitcast(%q0)
  %one = bf16[1,64,128]{2,1,0} dynamic-slice(%cast, %q1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %shaped = bf16[64,128]{1,0} bitcast(%one)
  ROOT %product = bf16[64,128]{1,0} multiply(%shaped, %q2)
}

%written (r0: bf16[24,64,128], r1: bf16[64,128], r2: s32[]) -> bf16[24,64,128] {
  %r0 = bf16[24,64,128]{2,1,0} parameter(0)
  %r1 = bf16[64,128]{1,0} parameter(1)
  %r2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[1,64,128]{2,1,0} bitcast(%r1)
  ROOT %new = bf16[24,64,128]{2,1,0} dynamic-update-slice(%r0, %row, %r2, %zero, %zero)
}

%outer (p0: bf16[24,64,128], p1: s32[], p2: bf16[64,128], p3: bf16[24,64,128]) -> (bf16[24,64,128], bf16[64,128]) {
  %p0 = bf16[24,64,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[64,128]{1,0} parameter(2)
  %p3 = bf16[24,64,128]{2,1,0} parameter(3)
  %x = bf16[64,128]{1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%inner
  %stack = bf16[24,64,128]{2,1,0} fusion(%p3, %x, %p1), kind=kLoop, calls=%written
  %same = bf16[24,64,128]{2,1,0} bitcast(%stack)
  ROOT %both = (bf16[24,64,128]{2,1,0}, bf16[64,128]{1,0}) tuple(%same, %x)
}

ENTRY %main (a: bf16[24,64,128], i: s32[], b: bf16[64,128], c: bf16[24,64,128]) -> (bf16[24,64,128], bf16[64,128]) {
  %a = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %b = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %c = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} parameter(3)
  ROOT %o = (bf16[24,64,128]{2,1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) fusion(%a, %i, %b, %c), calls=%outer
}
"""


def test_fusions_inside_a_fusion_may_slice_and_update() -> None:
    """TPU's compiler nests them. This one reads a layer and `b`, and writes a layer and its second result."""
    assert memory_traffic(parse(NESTED)) == 4 * LAYER // 2


UPDATE = """
%fused (p0: f32[24,64,128], p1: f32[1,64,128], p2: s32[]) -> f32[24,64,128] {
  %p0 = f32[24,64,128]{2,1,0} parameter(0)
  %p1 = f32[1,64,128]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %new = f32[24,64,128]{2,1,0} dynamic-update-slice(%p0, %p1, %p2, %p2, %p2)
}

ENTRY %main (a: f32[24,64,128], b: f32[1,64,128], i: s32[]) -> f32[24,64,128] {
  %a = f32[24,64,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[1,64,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  ROOT %out = f32[24,64,128]{2,1,0:T(8,128)} fusion(%a, %b, %i), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_that_updates_a_stack_writes_one_layer() -> None:
    assert memory_traffic(parse(UPDATE)) == 2 * LAYER


def test_an_allocation_moves_nothing() -> None:
    text = """
ENTRY %main () -> f32[8,128] {
  ROOT %a = f32[8,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
}
"""
    assert memory_traffic(parse(text)) == 0


def test_an_asynchronous_computation_reads_and_writes_once() -> None:
    """TPU7x's compiler runs sums on another core like this."""
    text = """
%sum (p0: f32[8,128]) -> f32[8,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce = f32[8,128]{1,0:T(8,128)} all-reduce(%p0), to_apply=%add
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %begun = ((), (), (s32[4096]{0:T(1024)S(8)})) async-start(), calls=%sum
  %given = ((f32[8,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}, (s32[4096]{0:T(1024)})) async-update(%begun, %a)
  ROOT %done = f32[8,128]{1,0:T(8,128)} async-done(%given)
}
"""
    assert memory_traffic(parse(text)) == 2 * 8 * 128 * 4


def test_narrow_arrays_move_their_padding() -> None:
    text = """
ENTRY %main (a: f32[512,32]) -> f32[512,32] {
  %a = f32[512,32]{1,0:T(8,128)} parameter(0)
  ROOT %b = f32[512,32]{0,1:T(8,128)} copy(%a)
}
"""
    assert memory_traffic(parse(text)) == 512 * 128 * 4 + 512 * 32 * 4
