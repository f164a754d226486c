"""Every TPU kernel compiled for TPUs that are not there: what overflows VMEM or HBM fails here."""

import dataclasses
import importlib.util
import math
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from experiments.tpu_static import cases as tpu_cases
from pallas_kernels import tpu
from pallas_kernels.named_shapes import AttentionShape
from pallas_kernels.oracle_attention.tpu import op as mosaic_tpu
from pallas_kernels.paged_attention.shapes import SHAPES as PAGED
from tests.older import older

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not published for this platform")

HEADS = {"7b": (32, 8), "80b": (64, 4)}
# The older stack compiles for v5p alone, whose VMEM is the smallest.
GENERATIONS = ["v5e", "v5p", "v6e"] if sys.version_info >= (3, 12) else ["v5p"]
# Op: its kernels in the compiled program, and what it may take of HBM beyond arguments and results,
# in units of q's bytes: tile-order copies of q, out, dout and their kin, dq in float32. A [T, C]
# array of scores would be 16 units at 8k and 256 at 128k for heads of 128 in bfloat16.
OPS = {
  "oracle_attention": (("oracle_attention_forward", "attention_backward"), 8),
  "sliding_window_attention": (("attention_forward", "attention_backward"), 8),
  "block_sparse_attention": (("block_sparse_forward", "block_sparse_backward"), 13),
}


def nbytes(x):
  return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


# The kernels and their VMEM depend on the generation, the group and the tiles. From 8,192 tokens on
# every length has the same tiles, but the oracle's scores and the block-sparse keys in VMEM grow
# with the keys, to their largest at 131,072; under a gradient at 65,536 where VMEM is 128 MB. Where
# VMEM is the smallest, both groups, and one chunk of the keys and several; block-sparse on v6e too.
SIZES = {
  "oracle_attention": [("v5p", 8_192, "7b"), ("v5p", 131_072, "80b"), ("v5e", 131_072, "80b"),
                       ("v6e", 131_072, "7b")],
  "sliding_window_attention": [("v5p", 8_192, "7b"), ("v5p", 131_072, "80b"),
                               ("v5e", 8_192, "80b"), ("v6e", 8_192, "7b")],
  "block_sparse_attention": [("v5p", 8_192, "7b"), ("v5p", 131_072, "80b"),
                             ("v5e", 65_536, "80b"), ("v6e", 65_536, "7b"),
                             ("v6e", 131_072, "80b")],
}


@pytest.mark.parametrize("op, generation, tokens, heads", older(
  [(op, *size) for op, sizes in SIZES.items() for size in sizes if size[0] in GENERATIONS],
  *((op, "v5p", 131_072, "80b") for op in SIZES)))
def test_forward_and_backward_compile(op, generation, tokens, heads):
  num_heads, kv_heads = HEADS[heads]
  shape = AttentionShape(tokens=tokens, num_heads=num_heads, num_kv_heads=kv_heads, head_dim=128)
  fn, arrays = tpu_cases.case(op, shape, "fwd_bwd")
  lowered = tpu.lower_for(generation, fn, *arrays)
  kernels, units = OPS[op]
  text = lowered.as_text()
  for kernel in kernels:
    assert f'kernel_name = "{kernel}"' in text
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes <= units * nbytes(arrays[0])
  assert memory.peak_memory_in_bytes <= tpu.GENERATIONS[generation].hbm_bytes


@pytest.mark.parametrize("op", older([*OPS, "hybrid_sparse_attention_lists"],
                                     "hybrid_sparse_attention_lists"))
def test_a_range_of_queries_compiles(op):
  """2,048 queries a row, at traced offsets, over 32,768 keys: memory as for those queries."""
  shape = AttentionShape(batch=2, tokens=2_048, num_heads=32, num_kv_heads=8, head_dim=128)
  fn, arrays = tpu_cases.case(op, shape, "fwd_bwd", num_keys=32_768)
  lowered = tpu.lower_for("v5p", fn, *arrays)
  kernels, units = OPS.get(op, (("block_sparse_forward", "block_sparse_backward",
                                 "attention_backward"), 26))
  text = lowered.as_text()
  for kernel in kernels:
    assert f'kernel_name = "{kernel}"' in text
  memory = lowered.compile().memory_analysis()
  keys = sum(nbytes(x) for x in arrays if x.ndim == 4 and x.shape[1] == 32_768)
  # The keys' gradients, by chunk and joined, in float32 (the sparse ones) and in their dtype.
  assert memory.temp_size_in_bytes <= units * nbytes(arrays[0]) + 6 * keys


@pytest.mark.parametrize("generation", [g for g in GENERATIONS if g != "v6e"])
def test_sparse_layer_forward_compiles(generation):
  """As under a gradient, when the kernel writes both branches too. Its backward kernels are those
  of the ops above. Heads of 7B are compiled below, and for a range of the queries above; v6e below.
  """
  num_heads, kv_heads = HEADS["80b"]
  shape = AttentionShape(tokens=131_072, num_heads=num_heads, num_kv_heads=kv_heads, head_dim=128)
  fn, arrays = tpu_cases.case("hybrid_sparse_attention_lists", shape, "fwd")
  lowered = tpu.lower_for(generation, lambda *args: jax.vjp(fn, *args)[0], *arrays)
  assert 'kernel_name = "block_sparse_forward"' in lowered.as_text()
  memory = lowered.compile().memory_analysis()
  assert memory.peak_memory_in_bytes <= tpu.GENERATIONS[generation].hbm_bytes


@pytest.mark.skipif("v6e" not in GENERATIONS, reason="compiled on the newer stack alone")
@pytest.mark.parametrize("heads, tokens", [("7b", 8_192), ("80b", 131_072)])
def test_the_dense_form_compiles(heads, tokens):
  """v6e has one beside the lists, in one program with them."""
  num_heads, kv_heads = HEADS[heads]
  shape = AttentionShape(tokens=tokens, num_heads=num_heads, num_kv_heads=kv_heads, head_dim=128)
  fn, arrays = tpu_cases.case("hybrid_sparse_attention", shape, "fwd")
  lowered = tpu.lower_for("v6e", lambda *args: jax.vjp(fn, *args)[0], *arrays)
  assert lowered.as_text().count('kernel_name = "block_sparse_forward"') == 2
  memory = lowered.compile().memory_analysis()
  assert memory.peak_memory_in_bytes <= tpu.GENERATIONS["v6e"].hbm_bytes


def test_sparse_layer_compiles():
  """Its sparse branch is the block-sparse kernel; beside it the window, the gates, the sum.

  80B heads at 128k stay out: q, two gates, their gradients and dout alone take 15 GB of v5e's 16.
  """
  shape = AttentionShape(tokens=131_072, num_heads=32, num_kv_heads=8, head_dim=128)
  fn, arrays = tpu_cases.case("hybrid_sparse_attention", shape, "fwd_bwd")
  lowered = tpu.lower_for("v5e", fn, *arrays)
  text = lowered.as_text()
  for kernel in ("block_sparse_forward", "block_sparse_backward", "attention_backward"):
    assert f'kernel_name = "{kernel}"' in text
  memory = lowered.compile().memory_analysis()
  assert memory.peak_memory_in_bytes <= tpu.GENERATIONS["v5e"].hbm_bytes


def test_plan_compiles():
  shape = AttentionShape(tokens=131_072, num_heads=32, num_kv_heads=8, head_dim=128)
  fn, arrays = tpu_cases.case("block_sparse_plan", shape, "fwd")
  memory = tpu.compile_for("v5e", fn, *arrays).memory_analysis()
  assert memory.temp_size_in_bytes <= 9 * nbytes(arrays[0])      # keys, words, twice each


@pytest.mark.parametrize("generation", older(["v5p", "v6e"], "v5p"))
def test_a_million_tokens(generation):
  """q, k and v as a projection leaves them, heads side by side: v6e has no room for a copy of q."""
  def forward(q, k, v):
    q, k, v = (x.reshape(1, 2**20, -1, 128) for x in (q, k, v))
    out, picked = mosaic_tpu.oracle_attention(
      q, k, v, block_size=64, num_blocks=16, segment_ids=None, scale=0.1)
    return out.reshape(1, 2**20, -1), picked

  arrays = [jax.ShapeDtypeStruct((1, 2**20, heads * 128), jnp.bfloat16) for heads in (32, 8, 8)]
  memory = tpu.compile_for(generation, forward, *arrays).memory_analysis()
  assert memory.temp_size_in_bytes < nbytes(arrays[0])


@pytest.mark.parametrize("op, dtype, head_dim, group", older([
  ("oracle_attention", "float32", 256, 4), ("oracle_attention", "bfloat16", 256, 16),
  ("oracle_attention", "float32", 64, 1), ("sliding_window_attention", "float32", 256, 4),
  ("sliding_window_attention", "bfloat16", 64, 8)],
  ("oracle_attention", "float32", 64, 1), ("sliding_window_attention", "bfloat16", 64, 8)))
def test_other_dtypes_head_dims_and_groups_compile(op, dtype, head_dim, group):
  """On v5p, whose VMEM is the smallest, with segments; no array of scores in HBM."""
  shape = AttentionShape(batch=2, tokens=8_000, num_heads=2 * group, num_kv_heads=2,
                         head_dim=head_dim)
  fn, arrays = tpu_cases.case(op, shape, "fwd_bwd", dtype, segmented=True)
  memory = tpu.compile_for("v5p", fn, *arrays).memory_analysis()
  # Units of q as the kernels run it, in whole lanes; a head of 64 has copies of twice its size. A
  # [T, T] array of scores would be 60 units and more.
  padded = nbytes(arrays[0]) * max(128 // head_dim, 1)
  assert memory.temp_size_in_bytes <= 16 * padded


@pytest.mark.parametrize("op", ["paged_oracle_attention", "paged_sparse_layer_attention"])
@pytest.mark.parametrize("generation, name, dtype, change", [
  ("v5p", "80b", "bfloat16", {}), ("v5e", "80b", "float32", {}),
  ("v6e", "7b", "bfloat16", dict(batch=16)),
  ("v5p", "7b", "bfloat16", dict(batch=3, head_dim=256, value_head_dim=128, num_heads=2,
                                 num_kv_heads=2, block_size=16))])
def test_paged_ops_compile_and_copy_no_cache(op, generation, name, dtype, change):
  """At the paper models' heads and 131,072 tokens; other head dims, dtypes, pages and heads."""
  if generation not in GENERATIONS:
    pytest.skip("compiled on the newer stack alone")
  fn, arrays = tpu_cases.case(op, dataclasses.replace(PAGED[name], **change), "fwd", dtype)
  lowered = tpu.lower_for(generation, fn, *arrays)
  assert f'kernel_name = "{op}"' in lowered.as_text()
  # A row's keys are 128 MB or more; weights, lists and queries by KV head are some 100 kB a row.
  assert lowered.compile().memory_analysis().temp_size_in_bytes <= arrays[0].shape[0] << 19


def test_overflows_are_errors():
  def greedy(x):
    def body(x_ref, out_ref, scratch):
      step = pl.program_id(0)
      scratch[step] = x_ref[...]
      out_ref[...] = scratch[step ^ 1]
    return pl.pallas_call(
      body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(65_536,),
      scratch_shapes=[pltpu.VMEM((65_536, 8, 128), jnp.float32)],
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tpu.vmem_limit()))(x)

  x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  with pytest.raises(jax.errors.JaxRuntimeError, match="vmem|VMEM|Vmem"):
    tpu.compile_for("v5e", greedy, x)
  big = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
  with pytest.raises(jax.errors.JaxRuntimeError, match="hbm|HBM|Hbm"):
    tpu.compile_for("v5e", lambda x: x + 1, big)


def test_facts_are_jaxs_own():
  for name, facts in tpu.GENERATIONS.items():
    with jax.sharding.use_abstract_mesh(tpu.mesh(name).abstract_mesh):
      info = pltpu.get_tpu_info()
    assert (facts.vmem_bytes, facts.cores) == (info.vmem_capacity_bytes, info.num_cores)
    assert facts.hbm_bytes == info.hbm_capacity_bytes * info.num_cores
    assert facts.hbm_bytes_per_second == info.mem_bw_bytes_per_second * info.num_cores
    assert facts.clock_hz * facts.flops_per_bundle == pytest.approx(
      info.bf16_ops_per_second, rel=1e-3)


def test_without_libtpu_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match=r"^compiling for TPU needs libtpu; pip install .*txt$"):
    tpu.mesh("v5e")
