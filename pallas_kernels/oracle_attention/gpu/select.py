"""Exact selection of the P best key blocks of every (token, KV head), one GPU thread per token.

score(t, c) = max over the group's heads of (scale * block_max - lse): the logarithm of the block's
largest softmax weight. Logarithm is monotone, so the order is that of the weights. Each thread
walks the blocks in ascending order and keeps a sorted list of P (score, block) pairs in registers;
an insertion takes no branch: `v_i' = max(v_i, min(v_{i-1}, x))`, and the block ids move with it.
A new score must be strictly larger to pass an old one, so ties keep the lower block. `block_max`
is T minor, so a warp reads 32 neighbouring tokens in one 128-byte line.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

BLOCK = 64
TILE_T = 128
ABSENT = 1 << 30


@dataclasses.dataclass(frozen=True)
class SelectTiles:
  """Work per CTA of the selection kernel.

  Attributes:
    blocks: key blocks loaded ahead of their insertion, an even number (a 128-token tile always
      ends on one): more loads in flight.
  """

  blocks: int = 2

  def __post_init__(self):
    if self.blocks != 2:
      raise ValueError(f"blocks: got {self.blocks}, wanted 2")


def ascending_network(n: int):
  """Batcher's odd-even merge sort for n = 2^m values: the comparator pairs, in order."""
  p = 1
  while p < n:
    k = p
    while k >= 1:
      for j in range(k % p, n - k, 2 * k):
        for i in range(min(k, n - j - k)):
          if (i + j) // (2 * p) == (i + j + k) // (2 * p):
            yield i + j, i + j + k
      k //= 2
    p *= 2


def select(
  block_max: jax.Array,
  lse: jax.Array,
  *,
  kv_heads: int,
  num_blocks: int,
  scale: float,
  offset: jax.Array | None = None,
  first: jax.Array | None = None,
  tiles: SelectTiles = SelectTiles(),
  interpret=None,
):
  """Picks the best blocks from what `mosaic_gpu_forward.forward` wrote for one chunk of queries.

  Args:
    block_max: f32 [B, N, C, T], unscaled; -inf where a block has no visible key.
    lse: f32 [B, N, T].
    kv_heads: K; N/K consecutive heads share one selection.
    num_blocks: P, a power of two.
    scale: what the logits are multiplied by.
    offset: i32 [1], position of the first query; None is 0.
    first: i32 [B, tiles]: first 128-key tile that any query of a 128-query tile visits; None is 0.
    tiles: work per CTA.
    interpret: GPU interpret mode parameters, or None to compile.

  Returns:
    i32 [B, K, P, T], ascending along P, -1 at the end where fewer blocks are visible.
  """
  B, N, _, T = block_max.shape
  P, K = num_blocks, kv_heads
  G = N // K
  num_tiles = T // TILE_T
  i32 = lambda x: jnp.asarray(x, jnp.int32)
  layout = plgpu.Layout.WG_STRIDED((TILE_T,), 1)
  splat = lambda x, dtype: compat.cast(jnp.full((TILE_T,), x, dtype), layout, interpret)
  operands = [block_max, lse]
  operands += [x for x in (offset, first) if x is not None]

  def body(*refs):
    max_ref, lse_ref, *rest = refs
    offset_ref = rest.pop(0) if offset is not None else None
    first_ref = rest.pop(0) if first is not None else None
    (out_ref,) = rest
    cta = lax.axis_index("cta")
    kv_head = lax.rem(cta, i32(K))
    b = lax.rem(lax.div(cta, i32(K)), i32(B))
    t = num_tiles - 1 - lax.div(cta, i32(K * B))  # long rows first
    tokens = pl.ds(t * TILE_T, TILE_T)
    diagonal = t if offset_ref is None else t + lax.div(offset_ref[0], i32(TILE_T))
    start = i32(0) if first_ref is None else first_ref[b, diagonal]
    read = lambda ref: compat.load(ref, layout, interpret)
    lses = [read(lse_ref.at[b, kv_head * G + g, tokens]) for g in range(G)]

    def visit(i, carry):
      values, blocks = carry
      scores = []
      for e in range(tiles.blocks):
        c = i * tiles.blocks + e
        score = None
        for g in range(G):
          x = read(max_ref.at[b, kv_head * G + g, c, tokens]) * scale - lses[g]
          score = x if score is None else jnp.maximum(score, x)
        scores.append((c, score))
      for c, x in scores:
        passes = [x > v for v in values]
        c_all = lax.broadcast_in_dim(c, (TILE_T,), ())
        c_all = compat.cast(c_all, layout, interpret)
        new_values = [jnp.maximum(values[0], x)]
        new_blocks = [jnp.where(passes[0], c_all, blocks[0])]
        for i in range(1, P):
          new_values.append(jnp.maximum(values[i], jnp.minimum(values[i - 1], x)))
          moved = jnp.where(passes[i - 1], blocks[i - 1], c_all)
          new_blocks.append(jnp.where(passes[i], moved, blocks[i]))
        values, blocks = new_values, new_blocks
      return values, blocks

    values = [splat(-jnp.inf, jnp.float32) for _ in range(P)]
    blocks = [splat(ABSENT, jnp.int32) for _ in range(P)]
    _, blocks = lax.fori_loop(start, diagonal + 1, visit, (values, blocks))
    for lo, hi in ascending_network(P):
      blocks[lo], blocks[hi] = (
        jnp.minimum(blocks[lo], blocks[hi]),
        jnp.maximum(blocks[lo], blocks[hi]),
      )
    for i, x in enumerate(blocks):
      out_ref[b, kv_head, i, tokens] = jnp.where(x == ABSENT, -1, x)

  return compat.mosaic_gpu_kernel(
    body,
    out=jax.ShapeDtypeStruct((B, K, P, T), jnp.int32),
    scratch=[],
    grid=(B * K * num_tiles,),
    grid_names=("cta",),
    num_threads=1,
    thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
    interpret=interpret,
  )(*operands)
