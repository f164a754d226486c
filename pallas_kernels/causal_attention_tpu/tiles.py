"""Attention of any length, head dim and group size on TPU: tile sizes, padding, gradients of sinks.

What `oracle_attention` and `sliding_window_attention` share. Sizes are chosen from the VMEM of the
core that is compiled for; T is padded to whole tiles with tokens that nobody sees, head dims to
multiples of 128 with zeros.
"""

import math

import jax.numpy as jnp

from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu import backward as tpu_attention_backward
from pallas_kernels.causal_attention_tpu import block_topk as tpu_block_picks
from pallas_kernels.causal_attention_tpu import forward as tpu_attention_forward
from pallas_kernels.causal_attention_tpu.backward import BackwardTiles
from pallas_kernels.causal_attention_tpu.forward import ForwardTiles
from pallas_kernels.checks import NotCoveredError

LARGEST_FORWARD = ForwardTiles(queries=512, keys=1024, heads=4)
LARGEST_BACKWARD = BackwardTiles(queries=512, keys=512, chunk=8192, heads=4)
MAX_HEAD_DIM = 256
MAX_KEYS = 2048               # per key tile


def round_up(n, multiple):
  """The smallest multiple that is at least n."""
  return -(-n // multiple) * multiple


def tile_of(tokens):
  """128, 256, 512, ...: the first that holds them all; such tiles divide one another."""
  return 128 << (-(-tokens // 128) - 1).bit_length()


def check(op, q, k, v):
  """Raises NotCoveredError for dtypes and head dims that the kernels do not take."""
  dtypes = sorted({jnp.dtype(x.dtype).name for x in (q, k, v)})
  if dtypes not in (["bfloat16"], ["float32"]):
    raise NotCoveredError(
      f"{op} mosaic_tpu: q, k, v are {', '.join(dtypes)}; wanted all bfloat16 or all float32; "
      "cast them")
  widest = max(q.shape[-1], v.shape[-1])
  if widest > MAX_HEAD_DIM:
    raise NotCoveredError(
      f"{op} mosaic_tpu: head dim {widest}; wanted at most {MAX_HEAD_DIM}; "
      'use implementation="reference"')


def key_unit(op, block_size, num_blocks):
  """Key tiles are multiples of this: whole lanes, and 8 block maxima at a time."""
  if not num_blocks:
    return 128
  unit = math.lcm(8 * block_size, 128)
  if block_size % 8 or unit > MAX_KEYS:
    raise NotCoveredError(
      f"{op} mosaic_tpu: block_size={block_size}; wanted a multiple of 8 with "
      f"lcm(8*block_size, 128) at most {MAX_KEYS}, such as 64; use implementation=\"reference\"")
  return unit


def forward_tiles(tokens, group, unit, *, block_size=64, num_blocks=0, window=None,
                  vmem_bytes=None):
  """`ForwardTiles` for a core.

  Args:
    tokens: T.
    group: G.
    unit: of `key_unit`.
    block_size: keys per block; num_blocks: P.
    window: tokens, or None.
    vmem_bytes: of the core; None is the one that is compiled for.
  """
  heads = largest_divisor(group, LARGEST_FORWARD.heads)
  queries = min(LARGEST_FORWARD.queries, tile_of(tokens))
  keys = max(LARGEST_FORWARD.keys // unit, 1) * unit
  if window is not None:                      # about a band each way: more would be masked away
    queries = min(queries, max(256, tile_of(window)))
    keys = min(keys, tile_of(window))
  keys = min(keys, round_up(tokens, math.lcm(unit, queries)))
  if num_blocks:
    rows = round_up(-(-tokens // block_size), tpu_block_picks.ROWS)
    # The rest is for two of each tile and for spilled registers.
    budget = (vmem_bytes or tpu.vmem_bytes()) * 3 // 5
    size = lambda: 4 * rows * queries * (heads + (heads < group))
    while size() > budget and heads > 1:
      heads = largest_divisor(group, heads - 1)
    while size() > budget and queries > 128:
      queries //= 2
    if size() > budget:
      raise NotCoveredError(
        f"oracle_attention mosaic_tpu: T={tokens} has {rows} blocks of {block_size}, whose scores "
        f"take {size()} bytes of VMEM; wanted at most {budget}; use larger blocks")
  halves = keys % (2 * unit) == 0
  return ForwardTiles(queries=queries, keys=keys, heads=heads, piece=keys // 2 if halves else keys)


def backward_tiles(tokens, group, head_dim, dtype, window=None):
  """`BackwardTiles` for T tokens of the largest head dim: a few chunks of equal size."""
  heads = largest_divisor(group, LARGEST_BACKWARD.heads)
  queries = min(LARGEST_BACKWARD.queries, tile_of(tokens))
  keys, unroll = min(LARGEST_BACKWARD.keys, queries), 1
  if window is not None:
    queries = min(queries, max(256, tile_of(window)))
    keys, unroll = min(queries, tile_of(window)), heads
  # A chunk of 8192 keys of 128 bfloat16 takes 25 MB: K, V, dK, dV twice, and float32 sums.
  largest = LARGEST_BACKWARD.chunk // (round_up(head_dim, 128) // 128)
  if jnp.dtype(dtype) == jnp.float32:
    largest //= 2
  largest = max(largest, queries)
  chunk = round_up(-(-tokens // -(-tokens // largest)), queries)
  return BackwardTiles(queries=queries, keys=keys, chunk=chunk, heads=heads, unroll=unroll)


def largest_divisor(n, limit):
  """The largest divisor of n that is at most `limit`."""
  return max(d for d in range(1, limit + 1) if n % d == 0)


def pad(x, tokens, width=None):
  """Zeros after axis 1 up to `tokens`, and after the last up to `width`."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, tokens - x.shape[1])
  if width is not None:
    widths[-1] = (0, width - x.shape[-1])
  return jnp.pad(x, widths) if any(after for _, after in widths) else x


def pad_all(q, k, v, segment_ids, multiple):
  """q, k, v and the segments with T a multiple of `multiple` and heads whole lanes."""
  tokens = round_up(q.shape[1], multiple)
  width = round_up(max(q.shape[-1], v.shape[-1]), tpu.LANES)
  segments = None if segment_ids is None else pad(segment_ids, tokens)
  return (*(pad(x, tokens, width) for x in (q, k, v)), segments)


def forward(q, k, v, segment_ids, sinks, *, tiles, **options):
  """`tpu_attention_forward.forward` at any T, H and E.

  Args:
    q: [B,T,N,H]. k: [B,T,K,H]. v: [B,T,K,E].
    segment_ids: i32 [B,T] or None.
    sinks: f32 [N] or None.
    tiles: `ForwardTiles`.
    **options: scale, window, block_size, num_blocks, interpret.

  Returns:
    out [B,T,N,E], lse f32 [B,N,T], picked i32 [B,K,T,P] or None.
  """
  tokens, v_dim = q.shape[1], v.shape[-1]
  multiple = math.lcm(tiles.queries, tiles.keys)
  q, k, v, segment_ids = pad_all(q, k, v, segment_ids, multiple)
  out, lse, picked = tpu_attention_forward.forward(
    q, k, v, tiles=tiles, segment_ids=segment_ids, sinks=sinks, **options)
  if picked is not None:
    picked = picked[..., :tokens].swapaxes(2, 3)
  return out[:, :tokens, :, :v_dim], lse[..., :tokens], picked


def backward(q, k, v, segment_ids, sinks, out, lse, grad_out, *, tiles, **options):
  """(dq, dk, dv, dsinks) at any T, H and E; see `forward`.

  With the sinks in lse, p and delta are those of the softmax over keys and sink, so the keys need
  nothing else, and dsinks[n] = -sum_{b,t} exp(sink_n - lse) delta.
  """
  tokens = q.shape[1]
  dims = q.shape[-1], k.shape[-1], v.shape[-1]
  q, k, v, segment_ids = pad_all(q, k, v, segment_ids, tiles.chunk)
  out, grad_out = (pad(x, q.shape[1], q.shape[-1]) for x in (out, grad_out))
  long_lse = jnp.pad(lse, ((0, 0), (0, 0), (0, q.shape[1] - tokens)))
  *grads, delta = tpu_attention_backward.backward(
    q, k, v, out, long_lse, grad_out, tiles=tiles, segment_ids=segment_ids, **options)
  dq, dk, dv = (x[:, :tokens, :, :dim] for x, dim in zip(grads, dims))
  dsinks = None
  if sinks is not None:
    dsinks = -(jnp.exp(sinks[:, None] - lse) * delta[..., :tokens]).sum((0, 2))
  return dq, dk, dv, dsinks
