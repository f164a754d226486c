"""The attention of a sparse layer on TPU, in one forward kernel.

`mosaic_tpu_forward` runs the sparse branch; when a tile of it is done, `WindowEpilogue` adds the
local branch for the same queries (the window's keys stand next to each other), each branch with
its own sinks, gates both and writes the sum. The queries are read once and the result written once.
The backward pass is three parts: XLA for the gates, the block-sparse kernel, the banded kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks, tpu
from pallas_kernels.block_sparse_attention.tpu import forward as mosaic_tpu_forward
from pallas_kernels.block_sparse_attention.tpu import op as sparse
from pallas_kernels.block_sparse_attention.tpu import schedule
from pallas_kernels.block_sparse_attention.tpu.op import Options
from pallas_kernels.block_sparse_attention.tpu.schedule import EMPTY, LOG2E, MASKED, dot
from pallas_kernels.causal_attention_tpu import tiles as tpu_attention

OP = "sparse_layer_attention"
_ALIGN = 16                      # rows of a packed bfloat16 tile
_FINISH_TOGETHER = 4             # tiles whose window branches are scheduled together


class WindowEpilogue:
  """Finishes a tile of the sparse branch: local branch, sinks, gates, sum.

  A program copies the keys its tiles can see, its own tokens' and the `window - 1` before, next to
  each other; a tile then slices `span` of them and masks key by key.
  """

  together = _FINISH_TOGETHER

  def __init__(self, layout, arrays, window, residuals):
    """arrays: {name: array} of the call; residuals: whether the backward pass will need them."""
    self.layout, self.arrays, self.window, self.residuals = layout, arrays, window, residuals
    tile, tiles = layout.sizes.tile_tokens, layout.config.tiles_per_program
    self.tokens = tile * tiles                               # of a program
    self.back = -(-(window - 1) // self.tokens)              # programs before it that it looks at
    self.span = -(-(window - 1 + tile + _ALIGN - 1) // _ALIGN) * _ALIGN
    self.held = -(-((self.back + 1) * self.tokens) // _ALIGN) * _ALIGN + 2 * _ALIGN
    self.by_head = arrays["gate_sparse"].shape[-1] == 1
    self.copied = ["k_local", "v_local"] + (["ids_local"] if layout.segmented else [])

  def _local(self, name):
    layout = self.layout
    if name == "ids_local":
      ids = jnp.pad(self.arrays["segment_ids"], ((0, 0), (0, layout.padded - layout.tokens)))
      return jnp.broadcast_to(ids[:, :, None], (*ids.shape, 128))
    return schedule.to_rows(self.arrays[name], (1, 1), layout.padded)

  def operands(self, config, sizes):
    """{name: (array, spec)} beside those of the sparse branch."""
    layout, arrays, found = self.layout, self.arrays, {}
    kv_heads = arrays["k_local"].shape[2]
    for name in self.copied:
      array = self._local(name)
      heads = kv_heads if name == "ids_local" else 1
      for back in range(self.back + 1):
        spec = pl.BlockSpec(
          (1, self.tokens, array.shape[-1]),
          lambda h, c, back=back, heads=heads: (h // heads, jnp.maximum(c - back, 0), 0))
        found[f"{name}_{back}"] = array, spec
    if arrays["sinks_local"] is not None:
      lanes = jnp.tile(layout.sinks(arrays["sinks_local"]), (1, sizes.tile_tokens))[:, None]
      spec = pl.BlockSpec((1, 1, sizes.rows), lambda h, c: (h % kv_heads, 0, 0))
      found["sinks_local"] = lanes, spec
    for name in ("gate_sparse", "gate_local"):
      if self.by_head:
        gate = layout.lanes(arrays[name][..., 0].astype(jnp.float32))
        found[name] = gate, schedule.program_lanes(config, sizes)
      else:
        gate = layout.rows(arrays[name])
        found[name] = gate, schedule.program_rows(config, sizes, gate.shape[-1])
    return found

  def outputs(self, config, sizes):
    """{name: (shape, spec)}: the sum, and for the backward pass the branches by themselves."""
    layout, q, v = self.layout, self.arrays["q"], self.arrays["v_local"]
    heads, width = q.shape[0] * v.shape[2], schedule.padded_width(v.shape[-1])
    rows = jax.ShapeDtypeStruct((heads, layout.padded * layout.group[1], width), q.dtype)
    found = {"out": (rows, schedule.program_rows(config, sizes, width))}
    if self.residuals:
      found |= {"out_sparse": found["out"], "out_local": found["out"]}
      programs = layout.padded // self.tokens
      found["lse_local"] = (
        schedule.f32(heads, programs, config.tiles_per_program, sizes.rows),
        schedule.program_lanes(config, sizes))
    return found

  def scratch(self, config, sizes):
    """{name: scratch}: the keys of a program's windows."""
    del config, sizes
    dtype = self.arrays["k_local"].dtype
    widths = {"k_local": schedule.padded_width(self.arrays["k_local"].shape[-1]),
              "v_local": schedule.padded_width(self.arrays["v_local"].shape[-1])}
    found = {f"{name}_held": pltpu.VMEM((self.held, width), dtype)
             for name, width in widths.items()}
    if "ids_local" in self.copied:
      found["ids_local_held"] = pltpu.VMEM((self.held, 128), jnp.int32)
    return found

  def vmem_bytes(self):
    """VMEM of the operands, results and scratch."""
    layout = self.layout
    width = max(128, schedule.padded_width(self.arrays["k_local"].shape[-1]),
                schedule.padded_width(self.arrays["v_local"].shape[-1]))
    size = self.arrays["q"].dtype.itemsize
    rows = layout.config.tiles_per_program * layout.sizes.rows
    keys = (2 * (self.back + 1) * self.tokens + self.held) * (2 * width * size + 512)
    return keys + 2 * rows * width * (2 * 4 + 2 * size)

  def start(self, refs):
    """Puts the keys of the program's windows next to each other."""
    for name in self.copied:
      held = getattr(refs, f"{name}_held")
      for back in range(self.back + 1):
        at = (self.back - back) * self.tokens
        held[at:at + self.tokens, :] = getattr(refs, f"{name}_{back}")[0]
      filled = (self.back + 1) * self.tokens
      held[filled:, :] = jnp.zeros_like(held[filled:, :])

  def _attend(self, refs, walk, tile, at):
    """The local branch of a tile: (its result [E,R], log2-sum-exp [1,R])."""
    sizes, dtype = walk.sizes, refs.k_local_held.dtype
    first = self.back * self.tokens - (self.window - 1) + tile * sizes.tile_tokens
    first = pl.multiple_of(first // _ALIGN * _ALIGN, _ALIGN)
    here = pl.ds(first, self.span)
    scores = dot(refs.k_local_held[here, :], refs.q[0, at, :], (1, 1), dtype)     # [span,R]
    begin = pl.program_id(1) * self.tokens                                   # of the program
    key = begin - self.back * self.tokens + first + lax.broadcasted_iota(
      jnp.int32, scores.shape, 0)
    query = begin + tile * sizes.tile_tokens + lax.broadcasted_iota(
      jnp.int32, scores.shape, 1) // sizes.group
    visible = (key <= query) & (key > query - self.window) & (key >= 0)
    if sizes.segmented:
      ids = refs.ids_local_held[here, :]
      ids = jnp.concatenate([ids] * (sizes.rows // 128), axis=1)
      visible &= ids == walk.lanes(refs.q_segments, tile)
    scores = jnp.where(visible, scores, MASKED)
    top = jnp.maximum(scores.max(0, keepdims=True), EMPTY)
    if hasattr(refs, "sinks_local"):
      top = jnp.maximum(top, refs.sinks_local[0])
    weights = jnp.exp2(scores - top)
    total = weights.sum(0, keepdims=True)
    if hasattr(refs, "sinks_local"):
      total += jnp.exp2(refs.sinks_local[0] - top)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    values = dot(refs.v_local_held[here, :], weights.astype(dtype), (0, 0), dtype)
    return (values * jnp.where(seen, 1.0 / total, 0.0),
            jnp.where(seen, top + jnp.log2(total), EMPTY))

  def finish(self, refs, walk, tile, at, out_sparse):
    """Writes the tile's results; out_sparse: [E,R] of the sparse branch."""
    out_local, lse = self._attend(refs, walk, tile, at)
    if self.by_head:
      gated = (out_sparse * walk.lanes(refs.gate_sparse, tile)
               + out_local * walk.lanes(refs.gate_local, tile)).T
    if self.residuals or not self.by_head:
      out_sparse, out_local = out_sparse.T, out_local.T
    if not self.by_head:
      gated = (out_sparse * refs.gate_sparse[0, at, :].astype(jnp.float32)
               + out_local * refs.gate_local[0, at, :].astype(jnp.float32))
    refs.out[0, at, :] = gated.astype(refs.out.dtype)
    if self.residuals:
      refs.out_sparse[0, at, :] = out_sparse.astype(refs.out.dtype)
      refs.out_local[0, at, :] = out_local.astype(refs.out.dtype)
      refs.lse_local[0, 0, pl.ds(tile, 1), :] = lse


def _forward(window, scale, residuals, inputs, plan, options):
  """{"out": [B,T,N,E]} and, as residuals, both branches' results and log2-sum-exp f32 [B,T,N]."""
  q, k, v, segment_ids = (inputs[name] for name in ("q", "k", "v", "segment_ids"))
  make = functools.partial(sparse.Layout, OP, plan, options.forward, options, q, k, v, segment_ids)
  epilogue = WindowEpilogue(make(), inputs, window, residuals)
  layout = make(extra=epilogue.vmem_bytes())
  results = mosaic_tpu_forward.forward(
    layout.queries(q, scale), layout.keys(k), layout.keys(v), plan, layout.config,
    segment_blocks=layout.segment_blocks, sinks=layout.sinks(inputs["sinks_sparse"]),
    segment_ids=segment_ids, epilogue=epilogue, interpret=options.interpret,
    vmem_limit=options.vmem_bytes or tpu.vmem_limit())
  width = v.shape[-1]
  found = {"out": layout.to_tokens(results["out"], width)}
  if residuals:
    found |= {name: layout.to_tokens(results[name], width) for name in ("out_sparse", "out_local")}
    found["lse_sparse"] = layout.to_numbers(results["lse"])
    found["lse_local"] = layout.to_numbers(results["lse_local"])
  return found


def _by_heads(run, inputs, plan, options):
  """run(inputs, plan, options) for some KV heads at a time, on the plan that suits their picks."""
  axes = {name: 0 if name.startswith("sinks") else 2 for name in inputs if name != "segment_ids"}
  return sparse.by_heads(
    lambda some: sparse.choose(sparse.plan_of(plan, some), options, functools.partial(run, some)),
    inputs | sparse.plan_arrays(plan), axes | sparse.PLAN_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attention(inputs, plan, window, scale, options):
  return _by_heads(functools.partial(_forward, window, scale, False), inputs, plan, options)["out"]


def _attention_fwd(inputs, plan, window, scale, options):
  found = _by_heads(functools.partial(_forward, window, scale, True), inputs, plan, options)
  return found.pop("out"), (inputs, plan, found)


def _attention_bwd(window, scale, options, saved, dout):
  inputs, plan, found = saved
  grads = _by_heads(functools.partial(_backward, window, scale), inputs | found | {"dout": dout},
                    plan, options)
  return grads | {"segment_ids": None}, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward(window, scale, inputs, plan, options):
  """{name: gradient} of every float array of the call."""
  q, segment_ids, grads = inputs["q"], inputs["segment_ids"], {}
  dout = inputs["dout"].astype(jnp.float32)
  branch = {}
  for name in ("sparse", "local"):
    gate = inputs[f"gate_{name}"]
    branch[name] = dout * gate.astype(jnp.float32)     # rounded for the matrix unit only
    dgate = dout * inputs[f"out_{name}"].astype(jnp.float32)
    if gate.shape[-1] == 1:
      dgate = dgate.sum(-1, keepdims=True)
    grads[f"gate_{name}"] = dgate.astype(gate.dtype)
  shared = sparse.run_backward(
    OP, {"q": q, "k": inputs["k"], "v": inputs["v"], "sinks": inputs["sinks_sparse"],
         "segment_ids": segment_ids, "out": inputs["out_sparse"], "lse": inputs["lse_sparse"],
         "dout": branch["sparse"]}, scale, plan, options)
  grads |= {"k": shared["k"], "v": shared["v"], "sinks_sparse": shared["sinks"]}
  tiles = tpu_attention.backward_tiles(
    q.shape[1], q.shape[2] // inputs["k"].shape[2], max(q.shape[3], inputs["v"].shape[3]), q.dtype,
    window=window)
  lse = inputs["lse_local"].transpose(0, 2, 1) / LOG2E
  lse = jnp.where(lse > EMPTY / 2, lse, 0.0)           # as that kernel marks a row that saw nothing
  dq, grads["k_local"], grads["v_local"], grads["sinks_local"] = tpu_attention.backward(
    q, inputs["k_local"], inputs["v_local"], segment_ids, inputs["sinks_local"],
    inputs["out_local"], lse, branch["local"], tiles=tiles, scale=scale, window=window,
    interpret=options.interpret)
  grads["q"] = (shared["q"].astype(jnp.float32) + dq.astype(jnp.float32)).astype(q.dtype)
  return grads


def sparse_layer_attention(q, k_shared, v_shared, block_indices, k_local, v_local, gate_sparse,
                            gate_local, *, sinks_sparse=None, sinks_local=None, block_size=64,
                            window=128, query_offset=0, local_query_offset=0, segment_ids=None,
    kv_segment_ids=None, local_kv_segment_ids=None, scale=None,
    plan=None, options=None):
  """The op of `api.py` on a TPU; `plan` as in `block_sparse_attention`.

  Raises:
    NotImplementedError: what `block_sparse_attention` and `sliding_window_attention` do not take.
  """
  if any(x is None for x in (k_shared, k_local, gate_sparse, gate_local)):
    raise checks.NotCoveredError("sparse_layer_attention: got an absent branch or gate")
  checks.queries_are_keys("sparse_layer_attention", query_offset, segment_ids, kv_segment_ids,
                          (q.shape[1], k_shared.shape[1]))
  checks.queries_are_keys("sparse_layer_attention", local_query_offset, segment_ids,
                          local_kv_segment_ids,
                          (q.shape[1], k_local.shape[1]))
  sparse.check_support(OP, {"q": q, "k_shared": k_shared, "v_shared": v_shared,
                            "k_local": k_local, "v_local": v_local}, block_size)
  group, width = q.shape[2] // k_shared.shape[2], v_shared.shape[-1]
  plan = sparse.pick_plan(OP, plan, block_indices, group, block_size)
  last = 1 if gate_sparse.shape[-1] == gate_local.shape[-1] == 1 else width

  def spread(gate):                 # one that is shared adds up its gradient in float32
    shape = (*q.shape[:3], last)
    return gate if gate.shape == shape else jnp.broadcast_to(gate.astype(jnp.float32), shape)

  inputs = {"q": q, "k": k_shared, "v": v_shared, "k_local": k_local, "v_local": v_local,
            "gate_sparse": spread(gate_sparse), "gate_local": spread(gate_local),
            "sinks_sparse": sinks_sparse, "sinks_local": sinks_local, "segment_ids": segment_ids}
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return _attention(inputs, plan, min(window, q.shape[1]), float(scale), options or Options())
