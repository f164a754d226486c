"""Block-sparse attention on NVIDIA GPUs: the plan, the two forwards, their sum, the backward.

    plan      (index_plan.py)   once per hybrid block: which picks are hot, which are rare
    union     (mosaic_gpu.py)   hot picks: whole query tiles times blocks, masked by membership
    key-major (triton.py)       rare picks: the tokens of one block, packed; all of the backward
    combine   (triton.py)       one softmax of both, with the sinks
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import index_plan, mosaic_gpu
from pallas_kernels.checks import NotCoveredError

# Tokens of a tile that must share a block for the union kernel to take it. On an H200 a tile x
# block product takes the whole chip 6.5 ns; a packed token of 4 heads, with the sum of its part,
# 0.84 ns, and one of 16 heads 3.2 ns (LOG.md): break-even at 7.7 and 2.1 tokens.
HOT_THRESHOLD = {4: 8, 8: 4, 16: 2}
_LOG2E = 1.4426950408889634


def padded_group(group):
  """Query heads to a KV head that the kernels run with: 4, 8 or 16."""
  for size in (4, 8, 16):
    if group <= size:
      return size
  raise NotCoveredError(f"block_sparse_attention on GPU: got G={group}, want at most 16")


def check_picks(op, block_indices, block_size):
  """Raises NotCoveredError, naming `op`, for blocks or picks that the kernels do not take."""
  if block_size != 64:
    raise NotCoveredError(f"{op} on GPU: got block_size {block_size}, want 64")
  if not 1 <= block_indices.shape[-1] <= 16:
    raise NotCoveredError(f"{op} on GPU: got {block_indices.shape[-1]} picks, want 1 to 16")


def make_plan(block_indices, group, hot_threshold=None):
  """block_indices i32 [B,K,T,P] -> IndexPlan for `group` = N // K; T is padded to blocks.

  `hot_threshold`: None for the measured default, 1 for the union kernel alone, 1000 for the
  key-major kernel alone.
  """
  group = padded_group(group)
  tokens = mosaic_gpu.tile_tokens(group)
  threshold = HOT_THRESHOLD[group] if hot_threshold is None else min(hot_threshold, tokens + 1)
  pad = -block_indices.shape[2] % 64
  block_indices = jnp.pad(block_indices, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=-1)
  return index_plan.build_plan(
    block_indices, block_indices.shape[2] // 64,
    index_plan.PlanConfig(tile_tokens=tokens, hot_threshold=threshold,
                          list_multiple=mosaic_gpu.UnionConfig().blocks_per_step,
                          longest_first=tokens == 32))


def _forward(q, k, v, sinks, segment_ids, plan, scale, window):
  config = plan.config
  union = None
  if config.has_hot:
    union = mosaic_gpu.union_forward(
      q, k, v, plan, scale=scale, sinks=sinks, segment_ids=segment_ids, window=window)
    if not config.has_rare:
      return union
  from pallas_kernels.block_sparse_attention import triton

  return triton.forward(q, k, v, plan, scale=scale, union=union,
                        sinks=sinks if union is None else None, segment_ids=segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, sinks, segment_ids, plan, scale, window):
  return _forward(q, k, v, sinks, segment_ids, plan, scale, window)[0]


def _attention_fwd(q, k, v, sinks, segment_ids, plan, scale, window):
  out, lse = _forward(q, k, v, sinks, segment_ids, plan, scale, window)
  return out, (q, k, v, sinks, segment_ids, plan, out, lse)


def _attention_bwd(scale, window, saved, dout):
  from pallas_kernels.block_sparse_attention import triton

  q, k, v, sinks, segment_ids, plan, out, lse = saved
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
  dq, dk, dv = triton.backward(
    q, k, v, dout, lse, delta, plan, scale=scale, segment_ids=segment_ids, window=window)
  dsinks = None
  if sinks is not None:
    dsinks = -(jnp.exp2(sinks * _LOG2E - lse) * delta).sum((0, 1))
  return dq, dk, dv, dsinks, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def attend(op, q, k, v, make_plan, *, sinks, segment_ids, scale, window=None):
  """Pads T to blocks and G to 4, 8 or 16, and runs the kernels.

  make_plan(tokens, group): the plan at the padded sizes.

  Raises:
    NotCoveredError: sizes or dtypes the kernels do not take, named after `op`.
  """
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  wanted = (("H", h, (64, 128)), ("v head dim", v.shape[-1], (h,)),
            ("q dtype", jnp.dtype(q.dtype).name, ("bfloat16", "float16")),
            ("k dtype", k.dtype, (q.dtype,)), ("v dtype", v.dtype, (q.dtype,)))
  for name, value, allowed in wanted:
    if value not in allowed:
      raise NotCoveredError(
        f"{op} on GPU: got {name} {value}, want {' or '.join(map(str, allowed))}")
  group = n // kv_heads
  padded = padded_group(group)
  tail, heads = -t % 64, padded - group
  if tail:
    q, k, v = (jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0))) for x in (q, k, v))
    if segment_ids is not None:
      segment_ids = jnp.pad(segment_ids, ((0, 0), (0, tail)))
  if heads:
    q = jnp.pad(q.reshape(b, t + tail, kv_heads, group, h),
                ((0, 0), (0, 0), (0, 0), (0, heads), (0, 0))).reshape(b, t + tail, -1, h)
    if sinks is not None:
      sinks = jnp.pad(sinks.reshape(kv_heads, group), ((0, 0), (0, heads))).reshape(-1)
  out = _attention(q, k, v, sinks, segment_ids, make_plan(t + tail, padded), float(scale), window)
  if heads:
    out = out.reshape(b, t + tail, kv_heads, -1, h)[:, :, :, :group].reshape(b, t + tail, n, h)
  return out[:, :t]


def block_sparse_attention(q, k, v, block_indices, *, block_size=64, sinks=None, segment_ids=None,
                           scale=None, plan=None, hot_threshold=None):
  """The op of `api.py` on an NVIDIA GPU of compute capability 9.0.

  `plan`: `make_plan(block_indices, N // K)`, so that the layers that share picks share its cost;
  made here without one, with `hot_threshold`: 1 for the union kernel alone, 1000 for the
  key-major kernels alone (then any GPU that Triton compiles for will do).

  Raises:
    NotCoveredError: block_size other than 64, more than 16 picks, H other than 64 or 128, a
      v head dim other than H, dtypes other than bfloat16 and float16, G over 16.
  """
  op = "block_sparse_attention"
  check_picks(op, block_indices, block_size)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return attend(op, q, k, v,
                lambda _, group: plan or make_plan(block_indices, group, hot_threshold),
                sinks=sinks, segment_ids=segment_ids, scale=scale)
