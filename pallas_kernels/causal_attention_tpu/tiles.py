"""Attention of any length, head dim and group size on TPU: tile sizes, padding, gradients.

`oracle_attention` and `sliding_window_attention` are both `attend`. Sizes are chosen from the VMEM
of the core that is compiled for; queries and keys are padded to whole tiles, whose padding is
masked, head dims to multiples of 128 with zeros.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu import backward as backward_kernel
from pallas_kernels.causal_attention_tpu import block_topk
from pallas_kernels.causal_attention_tpu import forward as forward_kernel
from pallas_kernels.causal_attention_tpu.backward import BackwardTiles
from pallas_kernels.causal_attention_tpu.forward import ForwardTiles
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.softmax import EMPTY_LSE

LARGEST_FORWARD = ForwardTiles(block_q=512, block_kv=1024, heads=4)
LARGEST_BACKWARD = BackwardTiles(block_q=512, block_kv=512, chunk=8192, heads=4)
MAX_HEAD_DIM = 256
MAX_KEYS = 2048               # per key tile


class Placement(NamedTuple):
  """Documents and positions of queries and keys; None where there are none.

  Attributes:
    segment_ids: i32 [B,T], the queries' documents.
    kv_segment_ids: i32 [B,S], the keys' documents.
    offsets: i32 [B], the key index of query 0 of each row; None: a Python int, passed apart.
  """

  segment_ids: jax.Array | None
  kv_segment_ids: jax.Array | None
  offsets: jax.Array | None

  @classmethod
  def of(cls, segment_ids, kv_segment_ids, query_offset):
    """(Placement, query_offset int or None) of the arguments of an op."""
    if isinstance(query_offset, int):
      return cls(segment_ids, kv_segment_ids, None), query_offset
    return cls(segment_ids, kv_segment_ids, query_offset), None


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


def forward_tiles(num_queries, num_keys, group, unit, *, block_size=64, num_blocks=0, window=None,
                  vmem_bytes=None):
  """`ForwardTiles` for a core.

  Args:
    num_queries: T.
    num_keys: S.
    group: G.
    unit: of `key_unit`.
    block_size: keys per block; num_blocks: P.
    window: tokens, or None.
    vmem_bytes: of the core; None is the one that is compiled for.
  """
  heads = largest_divisor(group, LARGEST_FORWARD.heads)
  block_q = min(LARGEST_FORWARD.block_q, tile_of(num_queries))
  block_kv = max(LARGEST_FORWARD.block_kv // unit, 1) * unit
  if window is not None:                      # about a band each way: more would be masked away
    block_q = min(block_q, max(256, tile_of(window)))
    block_kv = min(block_kv, tile_of(window))
  block_kv = min(block_kv, round_up(num_keys, unit))
  if num_blocks:
    rows = round_up(-(-num_keys // block_size), block_topk.ROWS)
    # The rest is for two of each tile and for spilled registers.
    budget = (vmem_bytes or tpu.vmem_bytes()) * 3 // 5
    size = lambda: 4 * rows * block_q * (heads + (heads < group))
    while size() > budget and heads > 1:
      heads = largest_divisor(group, heads - 1)
    while size() > budget and block_q > 128:
      block_q //= 2
    if size() > budget:
      raise NotCoveredError(
        f"oracle_attention mosaic_tpu: S={num_keys} has {rows} blocks of {block_size}, whose "
        f"scores take {size()} bytes of VMEM; wanted at most {budget}; use larger blocks")
  halves = block_kv % (2 * unit) == 0
  return ForwardTiles(block_q=block_q, block_kv=block_kv, heads=heads,
                      block_kv_compute=block_kv // 2 if halves else block_kv)


def backward_tiles(num_queries, num_keys, group, head_dim, dtype, window=None):
  """`BackwardTiles` for T queries and S keys of the largest head dim: a few equal chunks."""
  heads = largest_divisor(group, LARGEST_BACKWARD.heads)
  block_q, unroll = min(LARGEST_BACKWARD.block_q, tile_of(num_queries)), 1
  block_kv = min(LARGEST_BACKWARD.block_kv, tile_of(num_keys))
  if window is not None:
    block_q = min(block_q, max(256, tile_of(window)))
    block_kv, unroll = min(block_kv, tile_of(window)), heads
  # A chunk of 8192 keys of 128 bfloat16 takes 25 MB: K, V, dK, dV twice, and float32 sums.
  largest = LARGEST_BACKWARD.chunk // (round_up(head_dim, 128) // 128)
  if jnp.dtype(dtype) == jnp.float32:
    largest //= 2
  largest = max(largest, block_kv)
  # Whole query tiles too: without an offset the query tiles then begin with the chunk.
  whole = max(block_kv, min(block_q, tile_of(num_keys)))
  chunk = round_up(-(-num_keys // -(-num_keys // largest)), whole)
  return BackwardTiles(block_q=block_q, block_kv=block_kv, chunk=chunk, heads=heads, unroll=unroll)


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


def _padded(q, k, v, placement, query_offset, block_q, block_kv):
  """q, k and v of whole tiles and whole lanes, and the other arguments of the kernels."""
  num_queries, num_keys = q.shape[1], k.shape[1]
  padded_queries, padded_keys = round_up(num_queries, block_q), round_up(num_keys, block_kv)
  width = round_up(max(q.shape[-1], v.shape[-1]), tpu.LANES)
  offsets, segments = placement.offsets, {}
  if offsets is None:
    offsets = jnp.full((q.shape[0],), query_offset, jnp.int32)
  if placement.segment_ids is not None:
    segments = {"segment_ids": pad(placement.segment_ids, padded_queries),
                "kv_segment_ids": pad(placement.kv_segment_ids, padded_keys)}
  may_pass_end = query_offset is None or query_offset + num_queries > num_keys
  return (pad(q, padded_queries, width), pad(k, padded_keys, width), pad(v, padded_keys, width),
          segments | {"num_keys": num_keys, "query_offset": query_offset, "offsets": offsets,
                      "may_pass_end": may_pass_end})


class Options(NamedTuple):
  """Static options of one call.

  Attributes:
    op: name of the op, under which a profile shows it.
    query_offset: key index of query 0; None: `Placement.offsets` is given.
    scale: of the logits.
    window: tokens, or None.
    block_size: keys per block.
    num_blocks: P; 0 for attention alone.
    interpret: False, or `tpu.interpret_params()`.
  """

  op: str
  query_offset: int | None
  scale: float
  window: int | None = None
  block_size: int = 64
  num_blocks: int = 0
  interpret: Any = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q, k, v, placement, sinks, options):
  """Attention at any T, S, H and E, and the best key blocks of every query.

  Args:
    q: [B,T,N,H].
    k: [B,S,K,H].
    v: [B,S,K,E].
    placement: `Placement`.
    sinks: f32 [N] or None.
    options: `Options`.

  Returns:
    out [B,T,N,E], block_indices i32 [B,K,T,P].
  """
  return _forward(q, k, v, placement, sinks, options)[::2]


def _forward(q, k, v, placement, sinks, options):
  """out, lse f32 [B,N,T] (natural, -inf in a row that sees nothing), block_indices."""
  op, query_offset, scale, window, block_size, num_blocks, interpret = options
  (batch, tokens, heads, _), (num_keys, kv_heads), v_dim = q.shape, k.shape[1:3], v.shape[-1]
  tiles = forward_tiles(tokens, num_keys, heads // kv_heads, key_unit(op, block_size, num_blocks),
                        block_size=block_size, num_blocks=num_blocks, window=window)
  with jax.named_scope(op):
    q, k, v, known = _padded(q, k, v, placement, query_offset, tiles.block_q, tiles.block_kv)
    out, lse, picked = forward_kernel.forward(
      q, k, v, tiles=tiles, sinks=sinks, scale=scale, window=window, block_size=block_size,
      num_blocks=num_blocks, interpret=interpret, **known)
    picked = (jnp.zeros((batch, kv_heads, tokens, 0), jnp.int32) if picked is None else
              picked[..., :tokens].swapaxes(2, 3))
    return out[:, :tokens, :, :v_dim], lse[..., :tokens], picked


def _attend_fwd(q, k, v, placement, sinks, options):
  out, lse, picked = _forward(q, k, v, placement, sinks, options)
  if options.window is None:
    out, lse = checkpoint_name(out, "oracle_out"), checkpoint_name(lse, "oracle_lse")
    picked = checkpoint_name(picked, "oracle_block_indices")
  return (out, picked), (q, k, v, placement, sinks, out, lse)


def _attend_bwd(options, residuals, grads):
  with jax.named_scope(options.op + "_backward"):
    dq, dk, dv, dsinks = backward(*residuals, grads[0], query_offset=options.query_offset,
                                  scale=options.scale, window=options.window,
                                  interpret=options.interpret)
  return dq, dk, dv, None, dsinks


attend.defvjp(_attend_fwd, _attend_bwd)


def backward(q, k, v, placement, sinks, out, lse, grad_out, *, query_offset, window, **options):
  """(dq, dk, dv, dsinks) at any T, S, H and E.

  With the sinks in lse, p and delta are those of the softmax over keys and sink, so the keys need
  nothing else, and dsinks[n] = -sum_{b,t} exp(sink_n - lse) delta.

  Args:
    q, k, v, placement, sinks: as in `attend`.
    out: [B,T,N,E] of the forward pass; grad_out: its cotangent.
    lse: f32 [B,N,T] of the forward pass.
    query_offset, window: as in `Options`.
    **options: scale, interpret.
  """
  shapes = [x.shape for x in (q, k, v)]
  tokens = q.shape[1]
  tiles = backward_tiles(tokens, k.shape[1], q.shape[2] // k.shape[2],
                         max(q.shape[3], v.shape[3]), q.dtype, window=window)
  q, k, v, known = _padded(q, k, v, placement, query_offset, tiles.block_q, tiles.chunk)
  out, grad_out = (pad(x, q.shape[1], q.shape[-1]) for x in (out, grad_out))
  long_lse = jnp.pad(lse, ((0, 0), (0, 0), (0, q.shape[1] - tokens)))
  *grads, delta = backward_kernel.backward(
    q, k, v, out, long_lse, grad_out, tiles=tiles, window=window, **known, **options)
  dq, dk, dv = (x[:, :shape[1], :, :shape[3]] for x, shape in zip(grads, shapes))
  return dq, dk, dv, sink_gradient(sinks, lse, delta[..., :tokens])


def sink_gradient(sinks, lse, delta):
  """f32 [N] of sinks f32 [N], or None; lse f32 [B,N,T] and delta f32 [B,N,T] as in `backward`."""
  if sinks is None:
    return None
  share = jnp.where(lse == EMPTY_LSE, 0.0, jnp.exp(sinks[:, None] - lse))
  return -(share * delta).sum((0, 2))
