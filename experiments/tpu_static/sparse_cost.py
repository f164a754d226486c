"""What the block-sparse TPU kernels should cost, from their schedules: bundles times how often.

    rows = tpu_sparse_cost.rows("block_sparse_attention", "7b_32k", "v5e", "fwd")

Counts, not timings: no wait for HBM, for DMA or between grid steps is in them. How often the loop
runs depends on the selection, here on the mean union of a tile's tokens. A list is padded to whole
steps, so a tile of mean union U takes (U + (n - 1) / 2) / n of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tpu
from pallas_kernels.block_sparse_attention.tpu import op as mosaic_tpu
from pallas_kernels.block_sparse_attention.tpu import plan as tpu_plan
from pallas_kernels.named_shapes import PAPER
from pallas_kernels.sparse_layer_attention.tpu import op as layer_tpu

from ..bench import selections
from . import cases as tpu_cases
from . import count as tpu_static

_KERNELS = {"fwd": ("block_sparse_forward", 2), "bwd": ("block_sparse_backward", 5)}


@functools.cache
def mean_union(selection, shape):
  """Mean number of blocks that the tokens of a tile selected together."""
  tile = tpu_plan.ROWS // tpu_plan.padded_group(shape.num_heads // shape.num_kv_heads)
  picks = selections.selection(selection, shape.num_kv_heads, shape.tokens)
  picks = np.sort(picks.reshape(shape.num_kv_heads, -1, tile * picks.shape[-1]), axis=-1)
  new = np.diff(picks, axis=-1, prepend=-1) > 0          # pads are -1
  return float(new.sum(-1).mean())


def count(spans, shape, union, config, matmuls, together=1):
  """{bundles_per_step, steps, ...} of one launch at one shape, all heads, all cores together.

  Args:
    spans: of `tpu_static.spans`, in address order.
    shape: `named_shapes.AttentionShape`.
    union: mean blocks of a tile's list that are in the launch's segment of the keys.
    config: the kernel's LoopConfig.
    matmuls: products of a (tile, block).
    together: tiles whose ends are scheduled together.
  """
  group = tpu_plan.padded_group(shape.num_heads // shape.num_kv_heads)
  heads = shape.batch * shape.num_kv_heads
  tiles = heads * -(-shape.tokens * group // tpu_plan.ROWS)
  programs = tiles / config.tiles_per_program
  inner = [s for s in spans if s.depth > 1]
  body = max(inner, key=lambda s: s.units["MXU"])
  after = [s for s in spans if s.start > body.start]
  finish = max((s for s in after if s.depth > 1), key=lambda s: s.bundles, default=None)
  finished = 0 if finish is None else finish.bundles / together
  # Stores alone: the gradients of a head's keys and values set to 0. The rest is every program's.
  straight = [s for s in spans if s.depth == 1]
  clear = sum(s.bundles for s in straight if s.units["MXU"] == 0 and s.share["VSTORE"] > 0.9)
  around = sum(s.bundles for s in straight) - clear
  per_step = body.bundles / config.steps_per_body
  steps = tiles * (union + (config.blocks_per_step - 1) / 2) / config.blocks_per_step
  ragged = programs * (config.steps_per_body - 1) / 2          # steps past the last list's end
  bundles = (steps + ragged) * per_step + tiles * finished + programs * around + heads * clear
  flops = 2 * matmuls * config.blocks_per_step * shape.block_size * tpu_plan.ROWS * shape.head_dim
  return {"bundles_per_step": per_step, "steps": steps, "flops_per_step": flops,
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
  _, plan = tpu_cases.selected(shape)
  scale = shape.head_dim ** -0.5
  options = mosaic_tpu.Options(dense=False).loops_of(mosaic_tpu.tpu_generation())
  if which == "fwd":
    return mosaic_tpu.run_forward(q, k, v, None, None, None, scale, plan, options)
  arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
  inputs = arrays | dict.fromkeys(("sinks", "segment_ids", "kv_segment_ids")) | {"plan": plan}
  found = mosaic_tpu.by_heads(
    lambda some: mosaic_tpu.run_backward(
      "block_sparse_attention", some, scale, some["plan"], options),
    inputs, dict.fromkeys(arrays, 2) | {"plan": 1})
  return found["q"], found["k"], found["v"]


def rows(op, shape_name, generation, which, names=None):
  """Compiles the list kernel for one shape and generation and counts it, for several selections.

  Args:
    op: "block_sparse_attention", or "hybrid_sparse_attention", whose forward is the same kernel
      with both branches' ends (its backward is this op's kernel and the sliding window's).
    shape_name: a key of `named_shapes.PAPER`.
    generation: a key of `tpu.GENERATIONS`.
    which: "fwd" or "bwd".
    names: selections; None is `trace`, where it is recorded, and `walk r=1`.

  Returns:
    A dict for each: op, shape, selection, generation, pass, impl, union, launches (segments of the
    keys), bundles_per_step, steps, mxu_floor_bundles (a step's FLOPs at the published peak),
    mxu_share (floor over bundles), mxu_busy (slots of the matrix units), whole_share (FLOPs of the
    union, and of the window, at peak over all bundles: padding, starts and ends included), bundles
    (of one core), estimated_ms, vmem_bytes, temp_bytes.

  Raises:
    ValueError: another op or pass.
  """
  layer = op == "hybrid_sparse_attention"
  if not layer and op != "block_sparse_attention":
    raise ValueError(f"op: got {op!r}, want 'block_sparse_attention' or 'hybrid_sparse_attention'")
  if layer and which != "fwd":
    raise ValueError("hybrid_sparse_attention: only its forward pass is one kernel")
  shape, facts = PAPER[shape_name], tpu.GENERATIONS[generation]
  if names is None:
    names = ("trace", "walk r=1") if shape.tokens == 32_768 else ("walk r=1",)
  options = mosaic_tpu.Options().loops_of(generation)
  config = options.forward if which == "fwd" else options.backward
  together = math.gcd(config.tiles_per_program, layer_tpu.WindowEpilogue.together) if layer else 1
  kernel, matmuls = _KERNELS[which]
  if layer:
    case = tpu_cases.case("hybrid_sparse_attention_lists", shape, "fwd")
  else:
    case = functools.partial(_run, shape, which), _arrays(shape)
  with tpu_static.dump(generation, case[0], *case[1]) as (directory, memory):
    launches = tpu_static.launches(directory, kernel)
    spans = [tpu_static.spans(directory, name) for name in launches]
    vmem = max(tpu_static.vmem_bytes(directory, name) for name in launches)
  out = []
  for selection in names:
    union = mean_union(selection, shape)
    found = [count(each, shape, union / len(spans), config, matmuls, together) for each in spans]
    total = lambda field, found=found: sum(each[field] for each in found)
    per_step = total("bundles_per_step") / len(found)
    floor = found[0]["flops_per_step"] / facts.flops_per_bundle
    bundles = total("bundles") / facts.cores
    useful = total("useful_flops") * (1 + layer * shape.window / shape.block_size / union)
    out.append({
      "op": op, "shape": shape_name, "selection": selection, "generation": generation,
      "pass": which, "impl": "mosaic_tpu", "union": round(union, 1), "launches": len(found),
      "bundles_per_step": round(per_step), "steps": round(total("steps")),
      "mxu_floor_bundles": round(floor), "mxu_share": round(floor / per_step, 3),
      "mxu_busy": round(total("mxu_busy") / len(found), 3),
      "whole_share": round(useful / facts.flops_per_bundle / total("bundles"), 3),
      "bundles": round(bundles), "estimated_ms": round(bundles / facts.clock_hz * 1e3, 3),
      "vmem_bytes": vmem, "temp_bytes": memory["temp_bytes"]})
  return out
