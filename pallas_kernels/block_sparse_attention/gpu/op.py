"""Block-sparse attention on NVIDIA GPUs: the plan, the forwards, their sum, the backward.

    plan      (index_plan.py)        once per hybrid block: which picks are hot, which are rare
    union     (mosaic_gpu.py)        hot picks, G <= 8: whole query tiles times blocks, masked
    split     (mosaic_gpu_split.py)  hot picks, G = 16: the subtiles of a tile that picked a block
    key-major (triton.py)            rare picks: the tokens of one block, packed; all the backward
    combine   (triton.py)            one softmax of both, with the sinks
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.block_sparse_attention.gpu import forward as mosaic_gpu
from pallas_kernels.block_sparse_attention.gpu import forward_split as mosaic_gpu_split
from pallas_kernels.block_sparse_attention.gpu import plan as index_plan
from pallas_kernels.checks import NotCoveredError

# Tokens of a tile that must share a block for the union or split kernel to take it. On an H200 a
# union kernel's tile x block product takes the whole chip 6.5 ns, and a packed token of 4 heads,
# with the sum of its part, 0.84 ns (LOG.md): break-even at 7.7 tokens.
HOT_THRESHOLD = {4: 8, 8: 4, 16: 2}
# At G = 16 a pick that no other token of the tile shares costs 4.2 ns in the split kernel and 3.8
# to 5 packed (LOG.md), while a head's keys and values stay in the L2 cache: up to this many tokens
# nothing is packed. Longer rows pack such picks, but not in tiles that list at most 48 blocks.
SPLIT_ALL_TOKENS, SPLIT_DENSE_TILE = 32768, 0.33
_LOG2E = 1.4426950408889634


def padded_group(group):
  """Query heads to a KV head that the kernels run with: 4, 8 or 16."""
  for size in (4, 8, 16):
    if group <= size:
      return size
  raise NotCoveredError(f"block_sparse_attention on GPU: got G={group}, want at most 16")


def make_plan(block_indices, group, hot_threshold=None):
  """block_indices i32 [B,K,T,P] -> IndexPlan for `group` = N // K; T is padded to blocks.

  `hot_threshold`: None for the measured default, 1 for the union or split kernel alone, 1000 for
  the key-major kernel alone.
  """
  group = padded_group(group)
  split = group == 16
  tokens = mosaic_gpu_split.tile_tokens(group) if split else mosaic_gpu.tile_tokens(group)
  if hot_threshold is None:
    whole = split and block_indices.shape[2] <= SPLIT_ALL_TOKENS
    hot_threshold = 1 if whole else HOT_THRESHOLD[group]
  threshold = min(hot_threshold, tokens + 1)
  pad = -block_indices.shape[2] % 64
  block_indices = jnp.pad(block_indices, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=-1)
  config = index_plan.PlanConfig(
    tile_tokens=tokens, hot_threshold=threshold, longest_first=tokens == 32,
    list_multiple=1 if split else mosaic_gpu.UnionConfig().blocks_per_step,
    **(dict(dense_tile=SPLIT_DENSE_TILE, scattered=True) if split else {}))
  return index_plan.build_plan(block_indices, block_indices.shape[2] // 64, config)


def is_split(plan, group):
  """Whether the plan's tiles are those of the split kernel."""
  return group == 16 and plan.config.tile_tokens == mosaic_gpu_split.tile_tokens(group)


def hot_forward(q, k, v, plan, **options):
  """The hot picks of a plan with some: (out, lse); `options` as of `mosaic_gpu.union_forward`."""
  if is_split(plan, q.shape[2] // k.shape[2]):
    return mosaic_gpu_split.split_forward(q, k, v, plan, **options)
  return mosaic_gpu.union_forward(q, k, v, plan, **options)


def forward(q, k, v, sinks, segment_ids, plan, scale, window):
  """All picks of a plan, padded sizes: out [B,T,N,H] and its base-2 log-sum-exp f32 [B,T,N]."""
  config = plan.config
  options = dict(scale=scale, segment_ids=segment_ids)
  union = None
  if config.has_hot:
    limit = {} if window is None else dict(window=window)
    union = hot_forward(q, k, v, plan, sinks=sinks, **limit, **options)
    if not config.has_rare:
      return union
  from pallas_kernels.block_sparse_attention.gpu import backward as triton

  return triton.forward(
    q, k, v, plan, union=union, sinks=sinks if union is None else None, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, sinks, segment_ids, plan, scale, window):
  return forward(q, k, v, sinks, segment_ids, plan, scale, window)[0]


def _attention_fwd(q, k, v, sinks, segment_ids, plan, scale, window):
  out, lse = forward(q, k, v, sinks, segment_ids, plan, scale, window)
  return out, (q, k, v, sinks, segment_ids, plan, out, lse)


def _attention_bwd(scale, window, saved, dout):
  from pallas_kernels.block_sparse_attention.gpu import backward as triton

  q, k, v, sinks, segment_ids, plan, out, lse = saved
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
  dq, dk, dv = triton.backward(
    q, k, v, dout, lse, delta, plan, scale=scale, segment_ids=segment_ids, window=window)
  dsinks = None
  if sinks is not None:
    dsinks = -(jnp.exp2(sinks * _LOG2E - lse) * delta).sum((0, 1))
  return dq, dk, dv, dsinks, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def check_sizes(op, q, *keys_values):
  """Raises NotCoveredError for head dims and dtypes that the kernels do not take."""
  h = q.shape[-1]
  wanted = [("H", h, (64, 128)), ("q dtype", jnp.dtype(q.dtype).name, ("bfloat16", "float16"))]
  for k, v in keys_values:
    wanted += [("v head dim", v.shape[-1], (h,)), ("k dtype", k.dtype, (q.dtype,)),
               ("v dtype", v.dtype, (q.dtype,))]
  for name, value, allowed in wanted:
    if value not in allowed:
      raise NotCoveredError(
        f"{op} on GPU: got {name} {value}, want {' or '.join(map(str, allowed))}")


@dataclasses.dataclass(frozen=True)
class Padding:
  """Rounds T up to whole blocks and G up to 4, 8 or 16, and back."""

  tokens: int
  kv_heads: int
  group: int

  @property
  def padded(self):
    """Tokens and query heads to a KV head after padding."""
    return self.tokens + -self.tokens % 64, padded_group(self.group)

  def tail(self, x):
    """[B,T,...] -> padded in T with zeros; None stays None."""
    if x is None or self.padded[0] == self.tokens:
      return x
    return jnp.pad(x, ((0, 0), (0, self.padded[0] - self.tokens)) + ((0, 0),) * (x.ndim - 2))

  def heads(self, x):
    """[B,T,N,H] -> padded in T and G with zeros."""
    x, spare = self.tail(x), self.padded[1] - self.group
    if not spare:
      return x
    b, t, _, h = x.shape
    x = x.reshape(b, t, self.kv_heads, self.group, h)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, spare), (0, 0))).reshape(b, t, -1, h)

  def sinks(self, x):
    """[N] -> padded in G; None stays None."""
    spare = self.padded[1] - self.group
    if x is None or not spare:
      return x
    return jnp.pad(x.reshape(self.kv_heads, self.group), ((0, 0), (0, spare))).reshape(-1)

  def cut(self, x):
    """The inverse of `heads`."""
    if self.padded[1] != self.group:
      b, t, _, h = x.shape
      x = x.reshape(b, t, self.kv_heads, -1, h)[:, :, :, :self.group]
      x = x.reshape(b, t, self.kv_heads * self.group, h)
    return x[:, :self.tokens]


def attend(op, q, k, v, make_plan, *, sinks, segment_ids, scale, window=None):
  """Pads T to blocks and G to 4, 8 or 16, and runs the kernels.

  make_plan(tokens, group): the plan at the padded sizes.

  Raises:
    NotCoveredError: sizes or dtypes the kernels do not take, named after `op`.
  """
  check_sizes(op, q, (k, v))
  pad = Padding(q.shape[1], k.shape[2], q.shape[2] // k.shape[2])
  out = _attention(
    pad.heads(q), pad.tail(k), pad.tail(v), pad.sinks(sinks), pad.tail(segment_ids),
    make_plan(*pad.padded), float(scale), window)
  return pad.cut(out)


def check_picks(op, block_indices, block_size):
  """Raises NotCoveredError for blocks and picks that the kernels do not take."""
  if block_size != 64:
    raise NotCoveredError(f"{op} on GPU: got block_size {block_size}, want 64")
  if not 1 <= block_indices.shape[-1] <= 16:
    raise NotCoveredError(f"{op} on GPU: got {block_indices.shape[-1]} picks, want 1 to 16")


def block_sparse_attention(q, k, v, block_indices, *, block_size=64, sinks=None, query_offset=0,
                           segment_ids=None, kv_segment_ids=None, scale=None,
                           plan=None, hot_threshold=None):
  """The op of `api.py` on an NVIDIA GPU of compute capability 9.0.

  `plan`: `make_plan(block_indices, N // K)`, so that the layers that share picks share its cost;
  made here without one, with `hot_threshold` as in `make_plan` (with 1000 any GPU that Triton
  compiles for will do).

  Raises:
    NotCoveredError: block_size other than 64, more than 16 picks, H other than 64 or 128, a
      v head dim other than H, dtypes other than bfloat16 and float16, G over 16.
  """
  checks.queries_are_keys("block_sparse_attention", query_offset, segment_ids, kv_segment_ids,
                          (q.shape[1], k.shape[1]))
  op = "block_sparse_attention"
  check_picks(op, block_indices, block_size)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return attend(op, q, k, v,
                lambda _, group: plan or make_plan(block_indices, group, hot_threshold),
                sinks=sinks, segment_ids=segment_ids, scale=scale)
