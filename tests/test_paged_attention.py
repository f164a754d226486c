"""The paged ops: references against float64 loops and the oracle; kernels compile for CUDA."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.paged_attention.shapes import SHAPES
from tests import float64_loops as loops
from tests.attention_inputs import jitted, normal
from tests.paged_inputs import paged, picks, ring
from tests.tolerances import assert_close

oracle = jitted(pallas_kernels.paged_oracle_attention)
sparse_layer = jitted(pallas_kernels.paged_sparse_layer_attention)
LENGTHS = {"small": [400, 65, 1], "wide_values": [64, 200]}


def inputs(name, seed):
  s = SHAPES[name]
  return s, paged(seed, LENGTHS[name], s.num_heads, s.num_kv_heads, s.head_dim, s.v_dim)


def last(lengths):
  """i32 [B,1]: the last token's position."""
  return np.asarray(lengths)[:, None] - 1


@pytest.mark.parametrize("name", ["small", "wide_values"])
def test_oracle_is_float64_loops(name):
  s, x = inputs(name, 1)
  out, indices = oracle(x.q, *x.cache, *x.where, layer=x.layer, num_blocks=s.num_blocks)
  visible = loops.visible_keys(1, positions=last(x.lengths), num_keys=x.k.shape[1])
  want, log_weights = loops.attention(x.q[:, None], x.k, x.v, visible)
  scores = loops.block_scores(log_weights, (len(x.lengths), 1, s.num_heads),
                              s.num_heads // s.num_kv_heads, 64)
  want_indices, gap = loops.select(scores, (len(x.lengths), 1), s.num_kv_heads, s.num_blocks)
  assert gap > 2e-6
  assert_close(out, want[:, 0], "attention_f32")
  np.testing.assert_array_equal(indices, want_indices[:, :, 0])


@pytest.mark.parametrize("name", ["small", "wide_values"])
def test_any_permutation_of_pages_is_the_contiguous_cache(name):
  s, x = inputs(name, 2)
  out, indices = oracle(x.q, *x.cache, *x.where, layer=x.layer, num_blocks=s.num_blocks)
  want, want_indices = pallas_kernels.oracle_attention(
    x.q[:, None], x.k, x.v, query_offset=x.lengths - 1, num_blocks=s.num_blocks)
  assert_close(out, want[:, 0], "attention_routes_f32")
  np.testing.assert_array_equal(indices, want_indices[:, :, 0])


@pytest.mark.parametrize("branches", ["both", "sparse", "local"])
@pytest.mark.parametrize("name", ["small", "wide_values"])
def test_sparse_layer_is_float64_loops(name, branches):
  s, x = inputs(name, 3)
  lengths, heads = LENGTHS[name], s.num_heads
  k_local, v_local = (normal(i, *kv.shape) for i, kv in ((7, x.k), (8, x.v)))
  blocks = picks(4, lengths, s.num_kv_heads, s.num_blocks)
  gates = [jax.nn.sigmoid(normal(5, len(lengths), heads, s.v_dim)),
           jax.nn.sigmoid(normal(6, len(lengths), heads, 1))]
  sinks = [normal(9, heads), normal(10, heads)]
  visible = functools.partial(loops.visible_keys, 1, positions=last(lengths),
                              num_keys=x.k.shape[1])
  want = 0
  pages = rings = (None,) * 3
  if branches != "local":
    pages = (*x.cache, blocks)
    o, _ = loops.attention(x.q[:, None], x.k, x.v,
                           visible(blocks=np.asarray(blocks)[:, :, None]), sinks[0])
    want = want + np.asarray(gates[0], np.float64) * o[:, 0]
  if branches != "sparse":
    rings = (*(ring(y, lengths, s.window) for y in (k_local, v_local)), jnp.int32(1))
    o, _ = loops.attention(x.q[:, None], k_local, v_local, visible(window=s.window), sinks[1])
    want = want + np.asarray(gates[1], np.float64) * o[:, 0]
  mine = {"both": slice(2), "sparse": slice(1), "local": slice(1, 2)}[branches]
  only = lambda pair: [y if i in range(2)[mine] else None for i, y in enumerate(pair)]
  out = sparse_layer(
    x.q, *pages, x.page_table if pages[0] is not None else None, x.lengths, *rings[:2],
    *only(gates), *only(sinks), layer=x.layer if pages[0] is not None else None,
    ring_layer=rings[2])
  assert_close(out, want, "attention_f32")


def test_idle_rows_are_zero_and_select_nothing():
  x = paged(5, [70, 0], 4, 2, 16)
  out, indices = oracle(x.q, *x.cache, *x.where, layer=x.layer, num_blocks=2)
  assert not np.asarray(out[1]).any() and (np.asarray(indices[1]) == -1).all()
  local = [ring(y, [70, 0], 8) for y in (x.k, x.v)]
  out = sparse_layer(x.q, *x.cache, indices, *x.where, *local, layer=x.layer,
                     ring_layer=jnp.int32(1))
  assert not np.asarray(out[1]).any() and np.isfinite(out).all()


def test_kernels_compile_for_hopper():
  """In a process of its own: once interpreted, Triton's language cannot be compiled."""
  environment = dict(os.environ, TRITON_INTERPRET="0")
  found = subprocess.run([sys.executable, "-m", "tests.compile_paged"], env=environment,
                         capture_output=True, text=True, check=False, timeout=300)
  assert found.returncode == 0, found.stderr
  assert found.stdout.count("tensor cores, copies of 16 bytes") == 4, found.stdout


@pytest.mark.parametrize("dtype,head_dim,message", [
  ("float32", 64, "q float32; wanted bfloat16 or float16"),
  ("float16", 32, "head dim 32 of q; wanted 64, 128 or 256")])
def test_what_the_kernels_do_not_take_is_named(dtype, head_dim, message):
  x = paged(1, [65], 2, 1, head_dim, dtype=dtype)
  with pytest.raises(NotCoveredError, match=message):
    pallas_kernels.paged_oracle_attention(x.q, *x.cache, *x.where, layer=x.layer,
                                          implementation="triton")


@pytest.mark.parametrize("op,change,message", [
  ("oracle", dict(k_pages=jnp.zeros((1, 2, 2, 32, 4))),
   "v_pages has shape [1, 2, 2, 64, 4]; wanted [C=1,R=2,K=2,S=32,E]"),
  ("oracle", dict(lengths=jnp.zeros(2)), "lengths is float32; wanted int32"),
  ("sparse_layer", dict(v_ring=None), "give k_ring, v_ring, ring_layer together"),
  ("sparse_layer", dict(gate_sparse=jnp.zeros((2, 4, 3))),
   "gate_sparse has shape [2, 4, 3]; wanted [B=2,N=4,E=4]"),
])
def test_bad_input_is_one_clear_line(op, change, message):
  i32 = lambda *shape: jnp.zeros(shape, jnp.int32)
  arguments = dict(q=jnp.zeros((2, 4, 4)), k_pages=jnp.zeros((1, 2, 2, 64, 4)),
                   v_pages=jnp.zeros((1, 2, 2, 64, 4)), page_table=i32(2, 3), lengths=i32(2),
                   layer=i32())
  if op == "sparse_layer":
    arguments |= dict(block_indices=i32(2, 2, 3), k_ring=jnp.zeros((1, 2, 2, 8, 4)),
                      v_ring=jnp.zeros((1, 2, 2, 8, 4)), ring_layer=i32())
  with pytest.raises(ValueError) as error:
    getattr(pallas_kernels, f"paged_{op}_attention")(**arguments | change)
  assert message in str(error.value) and "\n" not in str(error.value)
