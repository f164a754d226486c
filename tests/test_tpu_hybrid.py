"""The fused attention of a sparse layer for TPU, against the reference, in TPU interpret mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparse_layer_attention as op
from pallas_kernels.block_sparse_attention.tpu.op import LoopConfig, Options, make_plan
from pallas_kernels.sparse_layer_attention import reference
from pallas_kernels.sparse_layer_attention.tpu import op as mosaic_tpu
from tests import tpu_interpret
from tests.attention_inputs import normal, packed_segments, qkv, random_blocks
from tests.older import older
from tests.tolerances import assert_close
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

OPTIONS = Options(LoopConfig(2, 1, 2), LoopConfig(2, 1, 2), dense_forward=LoopConfig(2, 1, 1),
                  dense_backward=LoopConfig(2, 1, 1), interpret=tpu_interpret.INTERPRET)
NAMES = ("q", "k", "v", "k_local", "v_local", "gate_sparse", "gate_local",
         "sinks_sparse", "sinks_local")


@dataclasses.dataclass(frozen=True)
class Case:
  batch: int = 1
  tokens: int = 100
  kv_heads: int = 1
  group: int = 4
  head_dim: int = 64
  picks: int = 3
  block_size: int = 16
  window: int = 128
  dtype: str = "float32"
  gate_shape: str = "BTNE"       # axes the gates have; the others are 1
  sinks: bool = True
  segmented: bool = False
  options: Options = OPTIONS


CASES = {
  "window_over_programs": Case(tokens=150, group=8, head_dim=256, window=70),
  "gates_by_head_and_segments": Case(batch=2, kv_heads=2, group=1, gate_shape="BTN",
                                     segmented=True, window=20, options=dataclasses.replace(
                                       OPTIONS, interpret=tpu_interpret.TWO_CORES)),
  "wide_group": Case(group=16, head_dim=128, dtype="bfloat16", gate_shape="NE", window=30),
  "one_key_no_sinks": Case(tokens=60, group=3, head_dim=24, window=1, sinks=False),
  "dense_in_key_segments": Case(
    tokens=140, segmented=True, picks=5, gate_shape="BTN", window=30,
    options=dataclasses.replace(OPTIONS, dense=True, vmem_bytes=11900 << 10)),
}


def inputs(case):
  heads = case.kv_heads * case.group
  sizes = case.batch, case.tokens, heads, case.kv_heads, case.head_dim
  q, k, v = qkv(0, *sizes, dtype=case.dtype)
  _, k_local, v_local = qkv(10, *sizes, dtype=case.dtype)
  shape = [n if axis in case.gate_shape else 1 for n, axis in zip(q.shape, "BTNE")]
  gates = [jax.nn.sigmoid(normal(seed, *shape, dtype=case.dtype)) for seed in (20, 21)]
  sinks = [normal(22, heads), normal(23, heads)] if case.sinks else []
  picked = jnp.asarray(random_blocks(24, case.batch, case.kv_heads, case.tokens, case.picks,
                                     case.block_size))
  segments = None
  if case.segmented:
    segments = jnp.asarray(packed_segments(25, case.batch, case.tokens, padding=5))
  return ([q, k, v, k_local, v_local, *gates, *sinks], picked, segments,
          normal(26, *q.shape, dtype=case.dtype))


def bind(fn, case, picked, segments, **options):
  def attend(*arrays):
    given = dict(zip(NAMES, arrays))
    return fn(block_indices=picked, block_size=case.block_size, window=case.window,
              query_offset=0, local_query_offset=0, segment_ids=segments, kv_segment_ids=segments,
              local_kv_segment_ids=segments, scale=case.head_dim ** -0.5,
              **({"sinks_sparse": None, "sinks_local": None} | given), **options), None
  return attend


@pytest.mark.parametrize("name", older(
  CASES, "gates_by_head_and_segments", "dense_in_key_segments"))
def test_values_and_gradients_match_the_reference(name, monkeypatch):
  case = CASES[name]
  launched = []
  call = mosaic_tpu.schedule.call
  monkeypatch.setattr(mosaic_tpu.schedule, "call", lambda kernel, name, *args, **options: (
    launched.append(name), call(kernel, name, *args, **options))[1])
  arrays, picked, segments, cotangent = inputs(case)
  run = tpu_interpret.value_and_grads
  (out, _), grads = run(bind(mosaic_tpu.sparse_layer_attention, case, picked, segments,
                             options=case.options), arrays, cotangent)
  (want, _), expected = run(bind(reference.sparse_layer_attention, case, picked, segments),
                            tpu_interpret.as_float32(arrays), cotangent.astype(jnp.float32))
  launches = 2 if case.options.vmem_bytes else 1
  assert sum("forward" in x for x in launched) == launches
  tpu_interpret.assert_like_reference(out, want, case.dtype)
  for got, wanted, array, label in zip(grads, expected, arrays, NAMES):
    assert (got.dtype, got.shape) == (array.dtype, array.shape), label
    if case.dtype == "bfloat16" and label.startswith("sinks"):
      error = np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)
      assert_close(error, 0.0, "mxu_bf16_cancelled_norm")
    else:
      tpu_interpret.assert_like_reference(got, wanted, case.dtype, grad=True)
  if segments is not None:
    hidden = np.asarray(segments) == 0
    assert hidden.any() and not np.asarray(out)[hidden].any()          # exactly 0
    assert not np.asarray(grads[0])[hidden].any()


def test_without_gradients_and_with_a_given_plan():
  """The forward pass that saves nothing, with the plan a hybrid block would share."""
  case = Case(tokens=70)
  arrays, picked, segments, _ = inputs(case)
  plan = make_plan(picked, case.group, block_size=case.block_size)
  out, _ = jax.jit(bind(mosaic_tpu.sparse_layer_attention, case, picked, segments, plan=plan,
                        options=OPTIONS))(*arrays)
  want, _ = jax.jit(bind(reference.sparse_layer_attention, case, picked, segments))(*arrays)
  tpu_interpret.assert_like_reference(out, want, "float32")


@pytest.mark.parametrize("change, named", [
  (dict(dtype="float16"), "q dtype float16"), (dict(head_dim=272), "q head dim 272"),
  (dict(block_size=4), "block_size 4")])
def test_limits_are_named(change, named):
  case = dataclasses.replace(Case(tokens=32), **change)
  arrays, picked, segments, _ = inputs(case)
  with pytest.raises(NotImplementedError, match=f"sparse_layer_attention on TPU: got {named}"):
    bind(op, case, picked, segments, implementation="mosaic_tpu")(*arrays)
