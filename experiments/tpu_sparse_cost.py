"""What the block-sparse TPU kernels should cost, from their schedules: bundles times how often.

    rows = tpu_sparse_cost.rows("block_sparse_attention", "7b_32k", "v5e", "fwd")

Counts, not timings: no wait for HBM, for DMA or between grid steps is in them. How often the loop
runs depends on the picks, here on the mean union of a tile's tokens. A list is padded to whole
steps, so a tile of mean union U takes (U + (n - 1) / 2) / n of them.
"""

import functools
import shutil

import jax
import jax.numpy as jnp

from experiments import tpu_cases, tpu_static
from pallas_kernels import tpu
from pallas_kernels.block_sparse_attention import mosaic_tpu, tpu_plan
from pallas_kernels.named_shapes import PAPER

# Mean union of a tile of 32 tokens (G=4) and of 8 (G=16), picks of 16 blocks: of selections
# recorded from a trained model, and of a walk that replaces one block a token.
UNIONS = {"trace": {4: 71, 16: 40}, "walk r=1": {4: 42, 16: 22}}
_KERNELS = {"fwd": ("block_sparse_forward", 2), "bwd": ("block_sparse_backward", 5)}


def count(spans, shape, which, union, config, matmuls):
  """{bundles_per_step, steps, ...} of one kernel at one shape, all heads, all cores together.

  Args:
    spans: of `tpu_static.spans`, in address order.
    shape: `named_shapes.AttentionShape`.
    which: "fwd" or "bwd".
    union: mean blocks of a tile's list.
    config: the kernel's LoopConfig.
    matmuls: products of a (tile, block).
  """
  group = tpu_plan.padded_group(shape.num_heads // shape.num_kv_heads)
  rows, heads = 128, shape.batch * shape.num_kv_heads
  tiles = heads * -(-shape.tokens * group // rows)
  programs = tiles / config.tiles_per_program
  inner = [s for s in spans if s.depth > 1]
  body = max(inner, key=lambda s: s.units["MXU"])
  after = [s for s in spans if s.start > body.start]
  finish = max((s for s in after if s.depth > 1), key=lambda s: s.bundles, default=None)
  finished = 0 if finish is None else finish.bundles
  around = sum(s.bundles for s in spans if s.depth == 1 and s.units["MXU"] > 0)
  per_step = body.bundles / config.steps_per_body
  steps = tiles * (union + (config.blocks_per_step - 1) / 2) / config.blocks_per_step
  ragged = programs * (config.steps_per_body - 1) / 2          # steps past the last list's end
  bundles = (steps + ragged) * per_step + tiles * finished + programs * around
  flops = 2 * matmuls * config.blocks_per_step * shape.block_size * rows * shape.head_dim
  return {"bundles_per_step": per_step, "steps": round(steps), "flops_per_step": flops,
          "mxu_busy": body.share["MXU"], "bundles": bundles,
          "useful_flops": tiles * union / config.blocks_per_step * flops}


def _arrays(shape):
  """q, k, v, the result, its log-sum-exp and its cotangent, bfloat16."""
  array = lambda heads: jax.ShapeDtypeStruct(
    (shape.batch, shape.tokens, heads, shape.head_dim), jnp.bfloat16)
  q, k = array(shape.num_heads), array(shape.num_kv_heads)
  return q, k, k, q, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32), q


def _run(shape, which, q, k, v, out, lse, dout):
  """One pass by itself: under `jax.vjp` the compiler gives kernels other names."""
  _, plan = tpu_cases.picks(shape)
  scale, options = shape.head_dim ** -0.5, mosaic_tpu.Options(dense=False)
  if which == "fwd":
    return mosaic_tpu.run_forward(q, k, v, None, None, scale, plan, options)
  return mosaic_tpu.run_backward(
    "block_sparse_attention", {"q": q, "k": k, "v": v, "sinks": None, "segment_ids": None,
                               "out": out, "lse": lse, "dout": dout}, scale, plan, options)


def rows(op, shape_name, generation, which, unions=None):
  """Compiles the list kernel for one shape and generation and counts it, for several selections.

  Args:
    op: "block_sparse_attention", whose kernels "hybrid_sparse_attention" shares.
    shape_name: a key of `named_shapes.PAPER`.
    generation: a key of `tpu.GENERATIONS`.
    which: "fwd" or "bwd".
    unions: {selection: mean blocks of a tile's list}; None is `UNIONS` at the shape's group.

  Returns:
    A dict for each: op, shape, selection, generation, pass, impl, union, bundles_per_step, steps,
    mxu_floor_bundles (a step's FLOPs at the published peak), mxu_share (floor over bundles),
    mxu_busy (slots of the matrix units), whole_share (the union's FLOPs at peak over all bundles:
    padding, starts and ends included), bundles (of one core), estimated_ms, vmem_bytes, temp_bytes.

  Raises:
    ValueError: another op.
  """
  if op != "block_sparse_attention":
    raise ValueError(f"op: got {op!r}, want 'block_sparse_attention'")
  shape, facts = PAPER[shape_name], tpu.GENERATIONS[generation]
  if unions is None:
    group = shape.num_heads // shape.num_kv_heads
    unions = {name: mean[group] for name, mean in UNIONS.items()}
  kernel, matmuls = _KERNELS[which]
  directory, memory = tpu_static.dump(
    generation, functools.partial(_run, shape, which), *_arrays(shape))
  try:
    spans, vmem = tpu_static.spans(directory, kernel), tpu_static.vmem_bytes(directory, kernel)
  finally:
    shutil.rmtree(directory)
  options = mosaic_tpu.Options()
  config = options.forward if which == "fwd" else options.backward
  out = []
  for selection, union in unions.items():
    found = count(spans, shape, which, union, config, matmuls)
    floor = found["flops_per_step"] / facts.flops_per_bundle
    bundles = found["bundles"] / facts.cores
    out.append({
      "op": op, "shape": shape_name, "selection": selection, "generation": generation,
      "pass": which, "impl": "mosaic_tpu", "union": union,
      "bundles_per_step": round(found["bundles_per_step"]), "steps": found["steps"],
      "mxu_floor_bundles": round(floor), "mxu_share": round(floor / found["bundles_per_step"], 3),
      "mxu_busy": round(found["mxu_busy"], 3),
      "whole_share": round(found["useful_flops"] / facts.flops_per_bundle / found["bundles"], 3),
      "bundles": round(bundles), "estimated_ms": round(bundles / facts.clock_hz * 1e3, 3),
      "vmem_bytes": vmem, "temp_bytes": memory["temp_bytes"]})
  return out
