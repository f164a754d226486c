"""Block-sparse attention on TPU: the plan, the launches that VMEM allows, the gradients.

    plan.py        once per hybrid block: union lists and membership
    forward.py     tiles of 128 rows against their lists
    backward.py    the same walk; gradients of keys and values stay in VMEM

K and V of one KV head have to be in VMEM, in the backward pass with their float32 gradients.
What does not fit is cut into equal segments of the sequence, one launch each.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.block_sparse_attention.tpu import backward as backward_kernel
from pallas_kernels.block_sparse_attention.tpu import forward as forward_kernel
from pallas_kernels.block_sparse_attention.tpu import plan as tpu_plan
from pallas_kernels.block_sparse_attention.tpu import schedule
from pallas_kernels.block_sparse_attention.tpu.schedule import LoopConfig
from pallas_kernels.causal_attention_tpu.tiles import sink_gradient
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.softmax import LN2, LOG2E

make_plan = tpu_plan.make_plan

_COMPILER_BYTES = 6 << 20      # of VMEM: spilled registers and the compiler's own scratch
_OP = "block_sparse_attention"

# Above this share of the causal blocks the unions are not worth their lists: bundles a (block, 128
# rows) of dense tiles over those of lists, by the final schedules. Only where the matrix unit is
# 256 wide do tiles of 512 rows gain anything (v6e 17.4 for 21.5; backward 41.0 for 46.3); on v5e
# and v5p they take 1.03 times as many.
_DENSE_SHARE = {"v6e": 0.85}

# Bundles a (block, tile of 128 rows), 128 head dims, by the final schedules. v5e: forward 37.3 for
# (8 blocks, 4 steps), 44 for (4, 8), 54 for (8, 1); backward 87.3 for (8, 2). The matrix units
# need 32 and 80. v6e's need 16 and 40, so that the ends of a body weigh more: forward 28.3 for
# (8, 4), 21.5 for (8, 12); backward 56.3 for (8, 2), 46.3 for (8, 8).
_LOOPS = {"forward": LoopConfig(8, 4, 16), "backward": LoopConfig(8, 2, 8),
          "dense_forward": LoopConfig(8, 1, 4), "dense_backward": LoopConfig(4, 1, 4)}
_LOOPS_OF = {
  "v6e": {"forward": LoopConfig(8, 12, 32, 6), "backward": LoopConfig(8, 8, 16, 1),
          "dense_forward": LoopConfig(8, 8, 4, 4), "dense_backward": LoopConfig(4, 4, 4, 1)}}


@dataclasses.dataclass(frozen=True)
class Options:
  """How the kernels run; the defaults are the best of the counts in experiments/LOG.md.

  forward, backward, dense_forward, dense_backward: the loops; None: the generation's.
  dense: whether every causal block is visited, in tiles of 512 rows; None: see `_DENSE_SHARE`.
  vmem_bytes: budget of a kernel; None asks the TPU.
  interpret: False, or `tpu.interpret_params()` to run on CPU.
  """

  forward: LoopConfig | None = None
  backward: LoopConfig | None = None
  dense_forward: LoopConfig | None = None
  dense_backward: LoopConfig | None = None
  dense: bool | None = None
  vmem_bytes: int | None = None
  interpret: Any = False

  def loops_of(self, generation):
    """These options with the loops that are None filled in for "v5e" and the like, or None."""
    loops = _LOOPS | _LOOPS_OF.get(generation, {})
    return dataclasses.replace(self, **{
      name: loop for name, loop in loops.items() if getattr(self, name) is None})


def check_support(op, arrays, block_size):
  """Raises NotCoveredError naming what the kernels cannot do.

  arrays: {name: array} of queries, keys and values.
  """
  q = arrays["q"]
  wanted = [("q dtype", jnp.dtype(q.dtype).name, ("bfloat16", "float32"))]
  wanted += [(f"{name} dtype", x.dtype, (q.dtype,)) for name, x in arrays.items()]
  for name, value, allowed in wanted:
    if value not in allowed:
      raise NotCoveredError(
        f"{op} on TPU: got {name} {value}, want {' or '.join(map(str, allowed))}")
  for name, x in arrays.items():
    if x.shape[-1] > 256:
      raise NotCoveredError(
        f"{op} on TPU: got {name} head dim {x.shape[-1]}, want at most 256")
  rows = 8 if q.dtype == jnp.float32 else 16
  if block_size % rows:
    raise NotCoveredError(
      f"{op} on TPU: got block_size {block_size}, want a multiple of {rows} for {q.dtype}")


def pick_plan(op, plan, block_indices, group, block_size, num_keys, query_offset):
  """`plan`, checked against the call, or a new one."""
  if plan is None:
    return make_plan(block_indices, group, block_size=block_size, num_keys=num_keys,
                     query_offset=query_offset)
  got = (plan.group, plan.block_size, plan.tokens, plan.num_keys, plan.query_offset)
  want = (tpu_plan.padded_group(group), block_size, block_indices.shape[2], num_keys,
          query_offset if isinstance(query_offset, int) else None)
  if got != want:
    raise ValueError(f"{op}: plan is for (G, block_size, T, S, query_offset) = {got}; wanted "
                     f"{want}; make another")
  return plan


def _wide(width):
  return -(-width // 128) * 128      # lanes that a row of VMEM takes


def segment_blocks(op, plan, key_bytes, program_bytes, options):
  """Blocks of keys to hold in VMEM: all of them, or equal segments that fit.

  key_bytes: of VMEM a key takes; program_bytes: what does not depend on the keys.
  """
  blocks = plan.num_blocks
  budget = options.vmem_bytes or tpu.vmem_limit()
  fit = (budget - program_bytes - _COMPILER_BYTES) // (key_bytes * plan.block_size)
  if fit < 1:
    raise NotCoveredError(
      f"{op} on TPU: a block of {plan.block_size} keys and {program_bytes >> 20} MiB of queries do "
      f"not fit {budget >> 20} MiB of VMEM; use a smaller block_size")
  return -(-blocks // -(-blocks // fit))


def choose(plan, options, run):
  """run(plan, options), on `plan.dense()` where its unions are wide; see `Options.dense`.

  The same blocks always give the same choice, so results stay the same bit for bit.
  """
  options = options.loops_of(tpu_generation())
  wide = dataclasses.replace(options, forward=options.dense_forward,
                             backward=options.dense_backward, dense=True)
  if options.dense is not None:
    return run(plan.dense(), wide) if options.dense else run(plan, options)
  share = _DENSE_SHARE.get(tpu_generation())
  if share is None:
    return run(plan, options)
  return lax.cond(plan.share() > share, lambda: run(plan.dense(), wide),
                  lambda: run(plan, options))


def tpu_generation():
  """"v5e" and the like; None off TPU."""
  try:
    return pltpu.get_tpu_info().chip_version.value
  except ValueError:                    # "Unsupported TPU device kind: cpu"
    return None


class Layout:
  """Arrays of one pass, padded to whole programs and whole segments of the keys."""

  def __init__(self, op, plan, config, options, q, k, v, segment_ids, *, backward=False, extra=0):
    self.batch, self.tokens = q.shape[:2]
    self.num_keys = k.shape[1]
    self.group = q.shape[2] // k.shape[2], plan.group
    self.config = config.fit(plan)
    self.segmented = segment_ids is not None
    rows, tiles = plan.tile_tokens * plan.group, self.config.tiles_per_program
    self.padded = -(-self.tokens // (plan.tile_tokens * tiles)) * plan.tile_tokens * tiles
    head, width, size = _wide(k.shape[-1]), _wide(v.shape[-1]), q.dtype.itemsize
    step = self.config.steps_per_body * self.config.blocks_per_step * plan.block_size * rows * 4
    # Queries, results and (cotangents or state) in two pipeline buffers, accumulators, a body's
    # scores.
    program = tiles * rows * (4 * max(head, width) * size + 4 * max(head, width) * 4
                              + _wide(k.shape[-1]) * 4) + step + extra
    key = (head + width) * size + (512 if self.segmented else 0)
    if backward:
      program += step + tiles * rows * 2 * width * size
      key += (head + width) * 4
    self.segment_blocks = segment_blocks(op, plan, key, program, options)
    segments = -(-plan.num_blocks // self.segment_blocks)
    self.key_tokens = segments * self.segment_blocks * plan.block_size
    self.sizes = schedule.Sizes.of(plan, 0, self.segment_blocks, 1, self.segmented)

  def rows(self, x):
    """[B,T,N,D] -> [B*K, T'*G', D]."""
    return schedule.to_rows(x, self.group, self.padded)

  def lanes(self, x):
    """[B,T,N] -> [B*K, C, tiles, R]."""
    return schedule.to_lanes(x, self.group, self.padded, self.config, self.sizes)

  def keys(self, x):
    """[B,T,K,D] -> [B*K, S, D]."""
    return schedule.to_rows(x, (1, 1), self.key_tokens)

  def queries(self, q, scale):
    """`rows` times scale * log2(e): the kernels' exponentials are powers of 2."""
    return self.rows((q.astype(jnp.float32) * (scale * LOG2E)).astype(q.dtype))

  def sinks(self, sinks):
    """f32 [N] -> f32 [K,G'] in log2."""
    if sinks is None:
      return None
    sinks = sinks.reshape(-1, self.group[0]) * LOG2E
    return jnp.pad(sinks, ((0, 0), (0, self.group[1] - self.group[0])))

  def to_tokens(self, x, width):
    """The inverse of `rows`."""
    return schedule.from_rows(x, self.batch, self.group, self.tokens, width)

  def to_numbers(self, x):
    """The inverse of `lanes`."""
    return schedule.from_lanes(x, self.batch, self.group, self.tokens)

  def to_keys(self, x, width):
    """The inverse of `keys`."""
    return schedule.from_rows(x, self.batch, (1, 1), self.num_keys, width)


def launch_forward(op, q, k, v, sinks, segment_ids, kv_segment_ids, scale, plan, options,
                   epilogue=None, extra=0):
  """The `Layout` and the results of the forward kernel; extra: VMEM bytes of the epilogue."""
  layout = Layout(op, plan, options.forward, options, q, k, v, segment_ids, extra=extra)
  return layout, forward_kernel.forward(
    layout.queries(q, scale), layout.keys(k), layout.keys(v), plan, layout.config,
    segment_blocks=layout.segment_blocks, sinks=layout.sinks(sinks), segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids, epilogue=epilogue, interpret=options.interpret,
    vmem_limit=options.vmem_bytes or tpu.vmem_limit())


def run_forward(q, k, v, sinks, segment_ids, kv_segment_ids, scale, plan, options):
  """-> (out [B,T,N,E], log-sum-exp f32 [B,T,N], natural, -inf in a row that sees nothing)."""
  layout, results = launch_forward(
    _OP, q, k, v, sinks, segment_ids, kv_segment_ids, scale, plan, options)
  return layout.to_tokens(results["out"], v.shape[-1]), layout.to_numbers(results["lse"])


def by_heads(fn, inputs, axes):
  """fn(inputs) -> {name: [B,T,n,...] or [n] or None}, for a part of the KV heads at a time.

  A backward pass holds some ten arrays of q's size, float32 ones among them: where q is more than
  a 64th of the memory, the KV heads go through in equal parts, one after the other.

  Args:
    inputs: {name: array, `TilePlan` or None}, with "q" and "k".
    axes: {name: the axis of heads}; what has none is given whole.
  """
  q, kv_heads = inputs["q"], inputs["k"].shape[2]
  parts = min(n for n in range(1, kv_heads + 1)
              if kv_heads % n == 0 and (q.size * q.dtype.itemsize <= n * part_bytes()
                                        or n == kv_heads))
  if parts == 1:
    return fn(inputs)

  def part(number):
    def some(x, axis):
      width = x.shape[axis] // parts
      return lax.dynamic_slice_in_dim(x, number * width, width, axis)
    return fn(inputs | {name: jax.tree.map(lambda x, axis=axis: some(x, axis), inputs[name])
                        for name, axis in axes.items()})

  def place(number, found):            # into the whole arrays, so that no second copy exists
    def put(whole, x):
      axis = min(x.ndim - 1, 2)
      return lax.dynamic_update_slice_in_dim(whole, x, number * x.shape[axis], axis)
    return jax.tree.map(put, found, part(number))

  def whole(x):
    axis = min(len(x.shape) - 1, 2)
    return jnp.zeros((*x.shape[:axis], parts * x.shape[axis], *x.shape[axis + 1:]), x.dtype)

  found = jax.tree.map(whole, jax.eval_shape(part, jnp.int32(0)))
  return lax.fori_loop(0, parts, place, found)


def part_bytes():
  """Bytes of q that `by_heads` works on at a time."""
  try:
    info = pltpu.get_tpu_info()
  except ValueError:                    # "Unsupported TPU device kind: cpu"
    return 1 << 30
  return info.hbm_capacity_bytes * info.num_cores // 64


def run_backward(op, inputs, scale, plan, options):
  """-> {"q", "k", "v": gradients in their dtypes, "sinks": f32 [N] or None}.

  inputs: {"q", "k", "v", "sinks", "segment_ids", "kv_segment_ids", "out", "lse", "dout"}; lse f32
    [B,T,N], natural.
  """
  q, k, v, sinks, dout, lse = (inputs[n] for n in ("q", "k", "v", "sinks", "dout", "lse"))
  segment_ids = inputs["segment_ids"]
  layout = Layout(op, plan, options.backward, options, q, k, v, segment_ids, backward=True)
  delta = (inputs["out"].astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
  dq, dk, dv = backward_kernel.backward(
    layout.queries(q, scale), layout.keys(k), layout.keys(v), layout.rows(dout.astype(q.dtype)),
    layout.lanes(schedule.log2_lse(lse)), layout.lanes(delta), plan, layout.config, scale=scale,
    segment_blocks=layout.segment_blocks, segment_ids=segment_ids,
    kv_segment_ids=inputs["kv_segment_ids"], interpret=options.interpret,
    vmem_limit=options.vmem_bytes or tpu.vmem_limit())
  dsinks = sink_gradient(sinks, lse.swapaxes(1, 2), delta.swapaxes(1, 2))
  return {"q": layout.to_tokens(dq, q.shape[-1]),
          "k": layout.to_keys((dk * LN2).astype(k.dtype), k.shape[-1]),
          "v": layout.to_keys(dv.astype(v.dtype), v.shape[-1]), "sinks": dsinks}


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, k, v, sinks, segment_ids, kv_segment_ids, plan, scale, options):
  return _attention_fwd(q, k, v, sinks, segment_ids, kv_segment_ids, plan, scale, options)[0]


def _attention_fwd(q, k, v, sinks, segment_ids, kv_segment_ids, plan, scale, options):
  with jax.named_scope(_OP):
    out, lse = choose(plan, options, functools.partial(
      run_forward, q, k, v, sinks, segment_ids, kv_segment_ids, scale))
  return out, (q, k, v, sinks, segment_ids, kv_segment_ids, plan, out, lse)


def _attention_bwd(scale, options, saved, dout):
  q, k, v, sinks, segment_ids, kv_segment_ids, plan, out, lse = saved
  inputs = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
  axes = dict.fromkeys(inputs, 2) | {"sinks": 0, "plan": 1}
  inputs |= {"sinks": sinks, "plan": plan, "segment_ids": segment_ids,
             "kv_segment_ids": kv_segment_ids}
  with jax.named_scope(_OP + "_backward"):
    found = by_heads(
      lambda some: choose(some["plan"], options, functools.partial(
        run_backward, _OP, some, scale)), inputs, axes)
  return found["q"], found["k"], found["v"], found["sinks"], None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def block_sparse_attention(q, k, v, block_indices, *, block_size=64, sinks=None, query_offset=0,
                           segment_ids=None, kv_segment_ids=None, scale=None, plan=None,
                           options=None):
  """The op of `api.py` on a TPU: v5e, v5p, v6e.

  Args:
    q, k, v, block_indices, block_size, sinks, query_offset, segment_ids, scale: as there.
    kv_segment_ids: i32 [B,S] or None; given with `segment_ids`.
    plan: `make_plan` of the same indices, sizes and offset, so that the layers that share a
      selection share its cost; None: made here.
    options: `Options`.

  Raises:
    NotCoveredError: dtypes other than bfloat16 and float32, head dims over 256, G over 128, a
      block_size that is no multiple of 16 (float32: 8).
    ValueError: a plan of another call.
  """
  check_support(_OP, {"q": q, "k": k, "v": v}, block_size)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  plan = pick_plan(_OP, plan, block_indices, q.shape[2] // k.shape[2], block_size, k.shape[1],
                   query_offset)
  return _attention(q, k, v, sinks, segment_ids, kv_segment_ids, plan, float(scale),
                    options or Options())
