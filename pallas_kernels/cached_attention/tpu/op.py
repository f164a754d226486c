"""Decode (T=1) attention over a cache on TPU: all slots, or the selected blocks.

The cache stays where it is. A TPU lays [S,K,H] out as S*K rows of H lanes, so [S*K,H] is the same
bytes, while [S,K*H] would be a copy of the whole cache; and with `layer` a stacked cache is read
without cutting the layer out. So the kernel takes slots with all their KV heads: pieces of L slots
are copied to VMEM, and the N query heads of a row meet the L*K rows of a piece in one matmul, in
which a query head keeps the columns of its own KV head. The matrix units do K times the needed
work, which costs less time than the copies.

    scores [N,R] = q [N,H] x piece [R,H]^T      row r of a piece is slot r // K, KV head r % K

One program per sequence: a loop over the steps that its position needs, copies one step ahead.
Blocks that several KV heads selected are read once (`_union`). What a query may not see is masked;
of slots up to its position the kernel asks that the other KV heads' keys and values be finite.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu.tiles import check, round_up
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.reference.block_selection import select_blocks
from pallas_kernels.softmax import INITIAL_MAX, MASKED
from pallas_kernels.tpu import dot

PIECE_BYTES = 1 << 20     # of keys in one oracle step, at most: some 1 us of HBM
GROUP_BYTES = 1 << 19     # of keys in one block-sparse step
MAX_PIECES = 8            # blocks of one block-sparse step
MAX_KV_HEADS = 32         # a bit each
# K, besides multiples of 8, for which a TPU has [S,K,H] and [S*K,H] in the same order, by H and
# dtype; a test compiles them.
FREE_KV_HEADS = {(128, "bfloat16"): (1, 2, 4), (128, "float32"): (1, 2, 4), (256, "bfloat16"): (1,)}


@dataclasses.dataclass(frozen=True)
class Pieces:
  """How a cache is cut.

  Attributes:
    slots: S.
    length: L, slots per piece; the last piece of the cache may be shorter.
    together: pieces per step.
    kv_heads: K.
    block_size: slots per block whose maxima are wanted, a power of two of them to a piece; or None.
  """

  slots: int
  length: int
  together: int
  kv_heads: int
  block_size: int | None = None

  @property
  def rows(self):
    """R: of a piece in VMEM."""
    return self.length * self.kv_heads

  @property
  def tail(self):
    """Rows of the cache's last piece if it is shorter, else 0."""
    return self.slots % self.length * self.kv_heads


def cached_oracle_attention(q, k, v, query_positions, *, block_size, num_blocks, scale, layer=None,
                            interpret=False):
  """See `api.py`.

  Args:
    q: [B,1,N,H] bfloat16 or float32, H 128 or 256.
    k: [B,S,K,H], or [C,B,S,K,H] with `layer`; S*K a multiple of 8.
    v: the same of E, 128 or 256.
    query_positions: i32 [B,1].
    block_size: a multiple of 8 with `num_blocks`.
    num_blocks: P; 0 for plain attention.
    scale: multiplies the logits.
    layer: i32 [] or None.
    interpret: `tpu.interpret_params()`, or False to compile.

  Raises:
    NotCoveredError: values that this implementation does not cover.
  """
  op = "cached_oracle_attention"
  k, v, layer = _stacked(k, v, layer)
  _check(op, q, k, v, block_size if num_blocks else None)
  batch, _, heads, _ = q.shape
  slots, kv_heads, width = k.shape[2:]
  unit = block_size if num_blocks else 64
  # Powers of two, so that the blocks of a piece fall into one 128-lane tile of maxima.
  length, widest = unit, max(width, v.shape[-1]) * kv_heads * k.dtype.itemsize
  while length // unit < 32 and length < slots and 2 * length * widest <= PIECE_BYTES:
    length *= 2
  pieces = Pieces(slots, length, 1, kv_heads, block_size if num_blocks else None)
  out, lse, maxima = _attend(q, k, v, query_positions, layer, pieces=pieces, scale=scale,
                             interpret=interpret)
  if not num_blocks:
    return out, jnp.zeros((batch, kv_heads, 1, 0), jnp.int32)
  weights = maxima[:, :, :heads] - lse[:, None, :heads, :1]              # [B,tiles,N,128]
  weights = weights.reshape(batch, -1, kv_heads, heads // kv_heads, 128).max(axis=3)
  weights = weights.transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1)
  first_slots = jnp.arange(-(-slots // block_size), dtype=jnp.int32) * block_size
  candidate = first_slots <= query_positions[:, :, None]                # [B,1,C]
  weights = jnp.where(candidate, weights[..., :first_slots.size], -jnp.inf)
  return out, select_blocks(weights, num_blocks)[:, :, None]


def cached_block_sparse_attention(q, k, v, block_indices, query_positions, *, block_size, sinks,
                                  scale, layer=None, interpret=False):
  """See `api.py`; arguments as in `cached_oracle_attention`.

  Args:
    block_indices: i32 [B,K,1,P].
    sinks: f32 [N] or None.

  Raises:
    NotCoveredError: values that this implementation does not cover.
  """
  op = "cached_block_sparse_attention"
  k, v, layer = _stacked(k, v, layer)
  _check(op, q, k, v, block_size)
  slots, kv_heads, width = k.shape[2:]
  if kv_heads > MAX_KV_HEADS:
    raise NotCoveredError(f"{op} mosaic_tpu: K={kv_heads}; wanted at most {MAX_KV_HEADS}; "
                          'use implementation="reference"')
  if not block_indices.shape[3]:
    return jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
  block_bytes = block_size * kv_heads * max(width, v.shape[-1]) * k.dtype.itemsize
  together = max(1, min(MAX_PIECES, GROUP_BYTES // block_bytes))
  chosen = _union(block_indices[:, :, 0], query_positions, -(-slots // block_size), block_size,
                  together)
  pieces = Pieces(slots, block_size, together, kv_heads)
  return _attend(q, k, v, query_positions, layer, chosen, sinks, pieces=pieces, scale=scale,
                 interpret=interpret)[0]


def _stacked(k, v, layer):
  if layer is None:
    return k[None], v[None], jnp.zeros((), jnp.int32)
  return k, v, layer


def _check(op, q, k, v, block_size):
  """Raises NotCoveredError for what the kernel does not take."""
  check(op, q, k, v)
  refuse = lambda found, wanted: NotCoveredError(
    f'{op} mosaic_tpu: {found}; wanted {wanted}; use implementation="reference"')
  if q.shape[1] != 1:
    raise refuse(f"T={q.shape[1]}", "T=1: prefill has no TPU kernel")
  slots, kv_heads = k.shape[2:4]
  for width in (q.shape[3], v.shape[-1]):
    if width % 128:
      raise refuse(f"head dim {width}", "128 or 256")
    free = FREE_KV_HEADS.get((width, jnp.dtype(k.dtype).name), ())
    if kv_heads % 8 and kv_heads not in free:
      raise refuse(f"K={kv_heads} of head dim {width}",
                   "".join(f"{n}, " for n in free) + "a multiple of 8: for others [S*K,H] "
                   "would be a copy of the cache")
  if slots * kv_heads % 8:
    raise refuse(f"S*K={slots * kv_heads}", "a multiple of 8")
  if block_size is not None and (block_size % 8 or block_size > 256):
    raise refuse(f"block_size={block_size}", "a multiple of 8 up to 256")


def _union(blocks, position, total, block_size, together):
  """The blocks that any KV head of a row selected, each once, and which heads selected them.

  Args:
    blocks: i32 [B,K,P]; what is no visible block counts as none.
    position: i32 [B,1].
    total: C, blocks of the cache.
    block_size: slots per block.
    together: U is a multiple of this.

  Returns:
    i32 [B,1,2*U], blocks in ascending order, then the bits of their KV heads (past the last block:
    that block again, and no bits), and their number i32 [B].
  """
  batch, kv_heads, picks = blocks.shape
  visible = (blocks >= 0) & (blocks < total) & (blocks * block_size <= position[:, :, None])
  blocks = jnp.where(visible, blocks, total).reshape(batch, -1)
  ordered = jnp.sort(blocks, axis=1)
  new = (ordered < total) & (ordered != jnp.pad(ordered, ((0, 0), (1, 0)),
                                                constant_values=-1)[:, :-1])
  count = new.sum(axis=1, dtype=jnp.int32)
  size = round_up(min(kv_heads * picks, total), together)
  place = jnp.where(new, jnp.cumsum(new, axis=1) - 1, -1)
  entries = jnp.arange(size, dtype=jnp.int32)
  here = place[:, None, :] == jnp.minimum(entries, count[:, None] - 1)[..., None]   # [B,U,K*P]
  union = jnp.where(here, ordered[:, None], 0).max(axis=2)
  wanted = (union[:, :, None] == blocks[:, None]).reshape(batch, size, kv_heads, picks).any(axis=3)
  wanted &= (entries < count[:, None])[..., None]
  bits = (wanted.astype(jnp.int32) << jnp.arange(kv_heads, dtype=jnp.int32)).sum(axis=2)
  return jnp.concatenate([union, bits], axis=1)[:, None], count


# jit, because a pallas_call by itself is never dropped when its results are not used.
@functools.partial(jax.jit, static_argnames=("pieces", "scale", "interpret"))
def _attend(q, k, v, position, layer, chosen=None, sinks=None, *, pieces, scale, interpret):
  """Attention of one query per row.

  Args:
    q: [B,1,N,H].
    k: [C,B,S,K,H]; v: [C,B,S,K,E].
    position: i32 [B,1].
    layer: i32 [].
    chosen: of `_union`, or None: every piece up to the position, seen by all heads.
    sinks: f32 [N] or None.
    pieces: `Pieces`.
    scale: of the logits.

  Returns:
    out [B,1,N,E]; with `pieces.block_size` also lse f32 [B,N',128] (every lane the same) and block
    maxima of the logits f32 [B,tiles,N',128], block c in lane c % 128 of tile c // 128 (blocks
    without a visible slot hold anything), N' >= N; else None, None.
  """
  layers, batch, slots, kv_heads, width = k.shape
  position = jnp.minimum(position, slots - 1)       # a full cache: no copy beyond its end
  heads, v_width = q.shape[2], v.shape[-1]
  padded = round_up(heads, 16)
  q = jnp.pad(q[:, 0], ((0, 0), (0, padded - heads), (0, 0)))
  k, v = (x.reshape(layers, batch, slots * kv_heads, -1) for x in (k, v))
  column_heads = (jnp.arange(pieces.rows, dtype=jnp.int32) % kv_heads)[None]
  row_heads = jnp.arange(padded, dtype=jnp.int32)[:, None] // (heads // kv_heads)
  row = lambda *shape: pl.BlockSpec((1, *shape), lambda b, *_: (b,) + (0,) * len(shape))
  whole = lambda *shape: pl.BlockSpec(shape, lambda b, *_: (0,) * len(shape))
  operands = {"q": (q, row(padded, width)),
              "k": (k, pl.BlockSpec(memory_space=pl.ANY)),
              "v": (v, pl.BlockSpec(memory_space=pl.ANY)),
              "column_heads": (column_heads, whole(1, pieces.rows)),
              "row_heads": (row_heads, whole(padded, 1))}
  if chosen is None:
    count = lax.div(position[:, 0], jnp.int32(pieces.length)) + 1
  else:
    entries, count = chosen
    operands["entries"] = entries, pl.BlockSpec((1, 1, entries.shape[2]), lambda b, *_: (b, 0, 0),
                                                memory_space=pltpu.SMEM)
  if sinks is not None:
    sinks = jnp.pad(sinks, (0, padded - heads))[:, None]
    operands["sinks"] = sinks, whole(padded, 1)
  outputs = {"out": (jax.ShapeDtypeStruct((batch, padded, v_width), q.dtype),
                     row(padded, v_width))}
  if pieces.block_size is not None:
    tiles = -(-slots // (128 * pieces.block_size))
    outputs["lse"] = (jax.ShapeDtypeStruct((batch, padded, 128), jnp.float32), row(padded, 128))
    outputs["maxima"] = (jax.ShapeDtypeStruct((batch, tiles, padded, 128), jnp.float32),
                         row(tiles, padded, 128))
  buffer = (2, pieces.together, pieces.rows)
  scratch = {"k_buffer": pltpu.VMEM((*buffer, width), k.dtype),
             "v_buffer": pltpu.VMEM((*buffer, v_width), v.dtype),
             "semaphores": pltpu.SemaphoreType.DMA((2, 2)),
             "m": pltpu.VMEM((padded, 128), jnp.float32),
             "l": pltpu.VMEM((padded, 128), jnp.float32),
             "acc": pltpu.VMEM((padded, v_width), jnp.float32)}
  names = ("positions", "counts", "layer", *operands, *outputs, *scratch)
  arrays, in_specs = zip(*operands.values())
  shapes, out_specs = zip(*outputs.values())
  results = pl.pallas_call(
    lambda *refs: _kernel(dict(zip(names, refs)), pieces, scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3, grid=(batch,), in_specs=in_specs, out_specs=out_specs,
      scratch_shapes=list(scratch.values())),
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=tpu.vmem_limit()),
    interpret=interpret,
    name="cached_oracle_attention" if chosen is None else "cached_block_sparse_attention",
  )(position[:, 0], count, layer[None], *arrays)
  found = dict(zip(outputs, results))
  return found["out"][:, None, :heads], found.get("lse"), found.get("maxima")


def _kernel(refs, pieces, scale):
  b = pl.program_id(0)
  position, layer = refs["positions"][b], refs["layer"][0]
  together, rows = pieces.together, pieces.rows
  steps = pl.cdiv(refs["counts"][b], together)
  m_ref, l_ref, acc_ref = refs["m"], refs["l"], refs["acc"]
  entries = refs.get("entries")
  size = None if entries is None else entries.shape[2] // 2

  def piece_of(step, n):
    return step if entries is None else entries[0, 0, step * together + n]

  def each_copy(step, act):
    """Starts or awaits the copies of a step."""
    slot = lax.rem(step, 2)
    for n in range(together):
      piece = piece_of(step, n)

      def copy(count, n=n, piece=piece):
        at = pl.ds(pl.multiple_of(piece * rows, math.gcd(rows, 1024)), count)
        for i, name in enumerate("kv"):
          act(pltpu.make_async_copy(
            refs[name].at[layer, b, at], refs[f"{name}_buffer"].at[slot, n, pl.ds(0, count)],
            refs["semaphores"].at[slot, i]))

      if pieces.tail:
        last = pieces.slots // pieces.length
        pl.when(piece < last)(functools.partial(copy, rows))
        pl.when(piece == last)(functools.partial(copy, pieces.tail))
      else:
        copy(rows)

  if "sinks" in refs:
    m_ref[...] = jnp.broadcast_to(refs["sinks"][...], m_ref.shape)
    l_ref[...] = jnp.ones_like(l_ref)
  else:
    m_ref[...] = jnp.full_like(m_ref, INITIAL_MAX)
    l_ref[...] = jnp.zeros_like(l_ref)
  acc_ref[...] = jnp.zeros_like(acc_ref)
  if pieces.block_size is not None:
    refs["maxima"][...] = jnp.full_like(refs["maxima"], MASKED)

  def attend(step):
    slot = lax.rem(step, 2)
    scores, maxima = [], []
    for n in range(together):
      piece = piece_of(step, n)
      # Rows of the piece that the query may see. The others may hold NaN, which a score of theirs
      # keeps to itself, but 0 * NaN would spoil a sum over values.
      seen = (position + 1) * pieces.kv_heads - piece * rows
      v_ref = refs["v_buffer"].at[slot, n]

      @pl.when(seen < rows)
      def _(v_ref=v_ref, seen=seen):
        row = lax.broadcasted_iota(jnp.int32, v_ref.shape, 0)
        v_ref[...] = jnp.where(row < seen, v_ref[...].astype(jnp.float32), 0.0).astype(v_ref.dtype)

      wants = refs["row_heads"][...]                                       # [N',1]
      if entries is not None:
        bits = entries[0, 0, size + step * together + n]
        wants = jnp.where((lax.shift_right_logical(bits, wants) & 1) == 1, wants, -1)
      column = lax.broadcasted_iota(jnp.int32, (1, rows), 1)
      offers = jnp.where(column < seen, refs["column_heads"][...], -2)     # [1,R]
      s = dot(refs["q"][0], refs["k_buffer"][slot, n], (1, 1)) * scale     # [N',R]
      s = jnp.where(wants == offers, s, MASKED)
      scores.append(s)
      if pieces.block_size is None:
        maxima.append(s.max(axis=1, keepdims=True))
      else:
        maxima += _block_maxima(refs["maxima"], s, piece, pieces)
    m_before = m_ref[...]                                                # [N',128]
    m = functools.reduce(jnp.maximum, maxima, m_before)
    m_ref[...] = m
    alpha = jnp.exp(m_before - m)
    l_new, acc = l_ref[...] * alpha, acc_ref[...] * alpha[:, :1]
    for n, s in enumerate(scores):
      p = jnp.exp(s - m[:, :1])
      l_new += p.sum(axis=1, keepdims=True)
      acc += dot(p.astype(refs["v_buffer"].dtype), refs["v_buffer"][slot, n], (1, 0))
    l_ref[...] = l_new
    acc_ref[...] = acc

  pl.when(steps > 0)(lambda: each_copy(jnp.int32(0), lambda copy: copy.start()))

  def body(step, _):
    pl.when(step + 1 < steps)(lambda: each_copy(step + 1, lambda copy: copy.start()))
    each_copy(step, lambda copy: copy.wait())
    attend(step)
    return 0

  lax.fori_loop(0, steps, body, 0)
  l_last = jnp.where(l_ref[...] > 0, l_ref[...], 1.0)
  refs["out"][0] = (acc_ref[...] / l_last[:, :1]).astype(refs["out"].dtype)
  if pieces.block_size is not None:      # a query sees its own slot: no row is empty
    refs["lse"][0] = m_ref[...] + jnp.log(l_last)


def _block_maxima(maxima_ref, scores, piece, pieces):
  """Puts the maxima of a piece's blocks into their lanes and returns them, f32 [N',1] each."""
  blocks = pieces.length // pieces.block_size
  columns = pieces.block_size * pieces.kv_heads
  first = piece * blocks
  tile, lane = lax.div(first, 128), lax.rem(first, 128)
  found = [scores[:, a:a + columns].max(axis=1, keepdims=True)
           for a in range(0, blocks * columns, columns)]
  kept = maxima_ref[0, tile]
  lanes = lax.broadcasted_iota(jnp.int32, kept.shape, 1)
  for i, block in enumerate(found):
    kept = jnp.where(lanes == lane + i, block, kept)
  maxima_ref[0, tile] = kept
  return found
