"""The attention of a sparse layer on TPU, in one forward kernel.

The block-sparse kernel runs the sparse branch; when a tile of it is done, `WindowEpilogue` adds the
local branch for the same queries (the window's keys are adjacent), each branch with
its own sinks, gates both and writes the sum. The queries are read once and the result written once.
The backward pass is three parts: XLA for the gates, the block-sparse kernel, the window kernel.

A layer with one branch runs that branch's op and multiplies by the gate.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.tpu import forward as sparse_forward
from pallas_kernels.block_sparse_attention.tpu import op as sparse
from pallas_kernels.block_sparse_attention.tpu import schedule
from pallas_kernels.block_sparse_attention.tpu.op import Options
from pallas_kernels.causal_attention_tpu import tiles as tpu_attention
from pallas_kernels.causal_attention_tpu.tiles import Placement
from pallas_kernels.sliding_window_attention.tpu.op import sliding_window_attention
from pallas_kernels.softmax import INITIAL_MAX, MASKED
from pallas_kernels.sparse_layer_attention.reference import gated
from pallas_kernels.tpu import dot

OP = "sparse_layer_attention"
_ALIGN = 16                      # rows of a packed bfloat16 tile
_FINISH_TOGETHER = 4             # tiles whose window branches are scheduled together
_WITHOUT_HEADS = ("segment_ids", "kv_segment_ids", "local_kv_segment_ids", "local_offsets")


class WindowEpilogue:
  """Finishes a tile of the sparse branch: local branch, sinks, gates, sum.

  A program copies the keys its tiles can see, its own tokens' and the `window - 1` before, next to
  each other; a tile then slices `span` of them and masks key by key.
  """

  together = _FINISH_TOGETHER

  def __init__(self, layout, arrays, window, query_offset, residuals):
    """The epilogue of one call.

    Args:
      layout: `Layout` of the sparse branch.
      arrays: {name: array or None} of the call.
      window: tokens.
      query_offset: index of query 0 among the local keys; None: `arrays["local_offsets"]`.
      residuals: whether the backward pass will need the branches by themselves.
    """
    self.layout, self.arrays, self.window, self.residuals = layout, arrays, window, residuals
    self.query_offset, self.num_keys = query_offset, arrays["k_local"].shape[1]
    tile, tiles = layout.sizes.tile_tokens, layout.config.tiles_per_program
    self.tokens = tile * tiles                               # of a program
    self.back = -(-(window - 1) // self.tokens)              # programs before it that it looks at
    self.span = -(-(window - 1 + tile + _ALIGN - 1) // _ALIGN) * _ALIGN
    self.held = -(-((self.back + 1) * self.tokens) // _ALIGN) * _ALIGN + 2 * _ALIGN
    self.gates = [n for n in ("gate_sparse", "gate_local") if arrays[n] is not None]
    self.by_head = all(arrays[name].shape[-1] == 1 for name in self.gates)
    self.copied = ["k_local", "v_local"] + (["ids_local"] if layout.segmented else [])

  def _local(self, name):
    """The local keys that the queries can see, row r at key index offset + r - `_reach`."""
    if name == "ids_local":
      ids = self._aligned(self.arrays["local_kv_segment_ids"])
      return jnp.broadcast_to(ids[:, :, None], (*ids.shape, 128))
    rows = self._aligned(self.arrays[name])
    return schedule.to_rows(rows, (1, 1), rows.shape[1])

  @property
  def _reach(self):
    """Rows before the first query's own key: whole programs, at least window - 1."""
    return self.back * self.tokens

  def _aligned(self, x):
    """[B,L,...] -> [B, reach + T', ...]; zeros where there is no key."""
    count, rest = self._reach + self.layout.padded, ((0, 0),) * (x.ndim - 2)
    if self.query_offset is not None:
      front = self._reach - self.query_offset                       # negative: cut
      x = x[:, max(-front, 0):max(count - front, 0)]
      front = min(max(front, 0), count)
      return jnp.pad(x, ((0, 0), (front, count - front - x.shape[1]), *rest))
    x = jnp.pad(x, ((0, 0), (self._reach, count), *rest))
    # Further behind the last key than the window reaches, nothing but zeros is seen.
    start = jnp.clip(self.arrays["local_offsets"], 0, self.num_keys + self._reach)
    return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, count))(x, start)

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
          lambda h, c, back=back, heads=heads: (h // heads, c + self.back - back, 0))
        found[f"{name}_{back}"] = array, spec
    if self.query_offset is None:
      found["local_offsets"] = (arrays["local_offsets"],
                                pl.BlockSpec(memory_space=pltpu.SMEM))
    if arrays["sinks_local"] is not None:
      lanes = jnp.tile(layout.sinks(arrays["sinks_local"]), (1, sizes.tile_tokens))[:, None]
      spec = pl.BlockSpec((1, 1, sizes.rows), lambda h, c: (h % kv_heads, 0, 0))
      found["sinks_local"] = lanes, spec
    for name in self.gates:
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
    """The local branch of a tile: (its result [E,R], natural log-sum-exp [1,R])."""
    sizes, dtype = walk.sizes, refs.k_local_held.dtype
    first = self.back * self.tokens - (self.window - 1) + tile * sizes.tile_tokens
    first = pl.multiple_of(first // _ALIGN * _ALIGN, _ALIGN)
    here = pl.ds(first, self.span)
    scores = dot(refs.k_local_held[here, :], refs.q[0, at, :], (1, 1))            # [span,R]
    offset = self.query_offset
    if offset is None:
      kv_heads = self.arrays["k_local"].shape[2]
      offset = refs.local_offsets[lax.div(pl.program_id(0), kv_heads)]
    begin = offset + pl.program_id(1) * self.tokens                          # of the program
    key = begin - self.back * self.tokens + first + lax.broadcasted_iota(
      jnp.int32, scores.shape, 0)
    query = begin + tile * sizes.tile_tokens + lax.broadcasted_iota(
      jnp.int32, scores.shape, 1) // sizes.group
    visible = (key <= query) & (key > query - self.window) & (key >= 0)
    if self.query_offset is None or self.query_offset + self.layout.tokens > self.num_keys:
      visible &= key < self.num_keys
    if sizes.segmented:
      ids = refs.ids_local_held[here, :]
      ids = jnp.concatenate([ids] * (sizes.rows // 128), axis=1)
      visible &= ids == walk.lanes(refs.q_segments, tile)
    scores = jnp.where(visible, scores, MASKED)
    m = jnp.maximum(scores.max(0, keepdims=True), INITIAL_MAX)
    if hasattr(refs, "sinks_local"):
      m = jnp.maximum(m, refs.sinks_local[0])
    weights = jnp.exp2(scores - m)
    row_sum = weights.sum(0, keepdims=True)
    if hasattr(refs, "sinks_local"):
      row_sum += jnp.exp2(refs.sinks_local[0] - m)
    values = dot(refs.v_local_held[here, :], weights.astype(dtype), (0, 0))
    return sparse_forward.normalized(values, m, row_sum)

  def finish(self, refs, walk, tile, at, out_sparse):
    """Writes the tile's results; out_sparse: [E,R] of the sparse branch."""
    out_local, lse = self._attend(refs, walk, tile, at)

    def gated(name, x, gate):
      return x * gate(getattr(refs, name)) if name in self.gates else x

    if self.by_head:
      lanes = lambda ref: walk.lanes(ref, tile)
      total = (gated("gate_sparse", out_sparse, lanes) + gated("gate_local", out_local, lanes)).T
    if self.residuals or not self.by_head:
      out_sparse, out_local = out_sparse.T, out_local.T
    if not self.by_head:
      rows = lambda ref: ref[0, at, :].astype(jnp.float32)
      total = gated("gate_sparse", out_sparse, rows) + gated("gate_local", out_local, rows)
    refs.out[0, at, :] = total.astype(refs.out.dtype)
    if self.residuals:
      refs.out_sparse[0, at, :] = out_sparse.astype(refs.out.dtype)
      refs.out_local[0, at, :] = out_local.astype(refs.out.dtype)
      refs.lse_local[0, 0, pl.ds(tile, 1), :] = lse


def _forward(window, query_offset, scale, residuals, inputs, plan, options):
  """{"out": [B,T,N,E]} and, as residuals, both branches' results and log-sum-exp f32 [B,T,N]."""
  q, k, v, segment_ids = (inputs[name] for name in ("q", "k", "v", "segment_ids"))
  layout = sparse.Layout(OP, plan, options.forward, options, q, k, v, segment_ids)
  epilogue = WindowEpilogue(layout, inputs, window, query_offset, residuals)
  layout, results = sparse.launch_forward(
    OP, q, k, v, inputs["sinks_sparse"], segment_ids, inputs["kv_segment_ids"], scale, plan,
    options, epilogue, epilogue.vmem_bytes())
  width = v.shape[-1]
  found = {"out": layout.to_tokens(results["out"], width)}
  if residuals:
    found |= {name: layout.to_tokens(results[name], width) for name in ("out_sparse", "out_local")}
    found["lse_sparse"] = layout.to_numbers(results["lse"])
    found["lse_local"] = layout.to_numbers(results["lse_local"])
  return found


def _by_heads(run, inputs, plan, options):
  """run(inputs, plan, options) for some KV heads at a time, on the plan that suits their blocks."""
  axes = {name: 0 if name.startswith("sinks") else 2 for name in inputs
          if name not in _WITHOUT_HEADS}
  return sparse.by_heads(
    lambda some: sparse.choose(some["plan"], options, functools.partial(run, some)),
    inputs | {"plan": plan}, axes | {"plan": 1})


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _attention(inputs, plan, window, query_offset, scale, options):
  run = functools.partial(_forward, window, query_offset, scale, False)
  with jax.named_scope(OP):
    return _by_heads(run, inputs, plan, options)["out"]


def _attention_fwd(inputs, plan, window, query_offset, scale, options):
  run = functools.partial(_forward, window, query_offset, scale, True)
  with jax.named_scope(OP):
    found = _by_heads(run, inputs, plan, options)
  return found.pop("out"), (inputs, plan, found)


def _attention_bwd(window, query_offset, scale, options, saved, dout):
  inputs, plan, found = saved
  run = functools.partial(_backward, window, query_offset, scale)
  with jax.named_scope(OP + "_backward"):
    grads = _by_heads(run, inputs | found | {"dout": dout}, plan, options)
  return grads | dict.fromkeys(_WITHOUT_HEADS), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward(window, query_offset, scale, inputs, plan, options):
  """{name: gradient} of every float array of the call."""
  q, segment_ids, grads = inputs["q"], inputs["segment_ids"], {}
  dout = inputs["dout"].astype(jnp.float32)
  branch = {}
  for name in ("sparse", "local"):
    gate = inputs[f"gate_{name}"]
    if gate is None:
      branch[name], grads[f"gate_{name}"] = dout, None
      continue
    branch[name] = dout * gate.astype(jnp.float32)     # rounded for the matrix unit only
    dgate = dout * inputs[f"out_{name}"].astype(jnp.float32)
    if gate.shape[-1] == 1:
      dgate = dgate.sum(-1, keepdims=True)
    grads[f"gate_{name}"] = dgate.astype(gate.dtype)
  shared = sparse.run_backward(
    OP, {"q": q, "k": inputs["k"], "v": inputs["v"], "sinks": inputs["sinks_sparse"],
         "segment_ids": segment_ids, "kv_segment_ids": inputs["kv_segment_ids"],
         "out": inputs["out_sparse"], "lse": inputs["lse_sparse"], "dout": branch["sparse"]},
    scale, plan, options)
  grads |= {"k": shared["k"], "v": shared["v"], "sinks_sparse": shared["sinks"]}
  k_local, v_local = inputs["k_local"], inputs["v_local"]
  placement = Placement(segment_ids, inputs["local_kv_segment_ids"], inputs["local_offsets"])
  dq, grads["k_local"], grads["v_local"], grads["sinks_local"] = tpu_attention.backward(
    q, k_local, v_local, placement, inputs["sinks_local"], inputs["out_local"],
    inputs["lse_local"].swapaxes(1, 2), branch["local"], query_offset=query_offset,
    scale=scale, window=window, interpret=options.interpret)
  grads["q"] = (shared["q"].astype(jnp.float32) + dq.astype(jnp.float32)).astype(q.dtype)
  return grads


def sparse_layer_attention(q, k, v, block_indices, k_local, v_local, gate_sparse, gate_local, *,
                           sinks_sparse=None, sinks_local=None, block_size=64, window=128,
                           query_offset=0, local_query_offset=0, segment_ids=None,
                           kv_segment_ids=None, local_kv_segment_ids=None, scale=None, plan=None,
                           options=None):
  """The op of `api.py` on a TPU; `plan` and `options` as in `block_sparse_attention`.

  Raises:
    NotCoveredError: what `block_sparse_attention` and `sliding_window_attention` do not take.
  """
  options = options or Options()
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if k is None:
    out = sliding_window_attention(
      q, k_local, v_local, window=window, sinks=sinks_local, query_offset=local_query_offset,
      segment_ids=segment_ids, kv_segment_ids=local_kv_segment_ids, scale=scale,
      interpret=options.interpret)
    return gated(gate_local, out.astype(jnp.float32)).astype(q.dtype)
  if k_local is None:
    out = sparse.block_sparse_attention(
      q, k, v, block_indices, block_size=block_size, sinks=sinks_sparse, query_offset=query_offset,
      segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, scale=scale, plan=plan,
      options=options)
    return gated(gate_sparse, out.astype(jnp.float32)).astype(q.dtype)
  sparse.check_support(OP, {"q": q, "k": k, "v": v, "k_local": k_local, "v_local": v_local},
                       block_size)
  plan = sparse.pick_plan(OP, plan, block_indices, q.shape[2] // k.shape[2], block_size,
                          k.shape[1], query_offset)
  by_head = all(gate is None or gate.shape[-1] == 1 for gate in (gate_sparse, gate_local))
  shape = (*q.shape[:3], 1 if by_head else v.shape[-1])

  def spread(gate):                 # one that is shared adds up its gradient in float32
    if gate is None or gate.shape == shape:
      return gate
    return jnp.broadcast_to(gate.astype(jnp.float32), shape)

  placement, local_query_offset = Placement.of(segment_ids, local_kv_segment_ids,
                                               local_query_offset)
  if local_query_offset is not None:           # no query has more keys before it
    window = min(window, local_query_offset + q.shape[1])
  inputs = {"q": q, "k": k, "v": v, "k_local": k_local, "v_local": v_local,
            "gate_sparse": spread(gate_sparse), "gate_local": spread(gate_local),
            "sinks_sparse": sinks_sparse, "sinks_local": sinks_local, "segment_ids": segment_ids,
            "kv_segment_ids": kv_segment_ids, "local_kv_segment_ids": local_kv_segment_ids,
            "local_offsets": placement.offsets}
  return _attention(inputs, plan, window, local_query_offset, float(scale), options)
