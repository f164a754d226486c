"""Exact selection of the P best key blocks of every (token, KV head), one GPU thread per token.

score(t, c) = max over the group's heads of (scale * block_max - lse): the logarithm of the block's
largest softmax weight. Logarithm is monotone, so the order is that of the weights. Each thread
walks the blocks in ascending order and keeps a sorted list of P (score, block) pairs in registers;
an insertion takes no branch: `v_i' = max(v_i, min(v_{i-1}, x))`, and the block ids move with it.
A new score must be strictly larger to pass an old one, so ties keep the lower block. `block_max`
is T minor, so a warp reads 32 neighbouring tokens in one 128-byte line.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.oracle_attention.gpu.tile_ranges import BEGIN, END, TILE
from pallas_kernels.softmax import EMPTY_LSE

TILE_BLOCKS = 2          # key blocks in a key tile, loaded together before their insertion
ABSENT = 1 << 30


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


def select(block_max, lse, key_ranges, q_start, *, kv_heads, num_blocks, scale, interpret):
  """Picks the best blocks from what `forward.forward` wrote for one launch of queries.

  Args:
    block_max: f32 [B, N, C, R], unscaled; -inf where a block has no visible key.
    lse: f32 [B, N, R], -inf for a row that sees no key.
    key_ranges: i32 [B, T'/128, 4], the key tiles that `block_max` is defined for.
    q_start: i32 [1], the first of the R query rows, a multiple of 128.
    kv_heads: K; N/K consecutive heads share one selection.
    num_blocks: P, a power of two.
    scale: multiplies the logits.
    interpret: GPU interpret mode parameters, or None to compile.

  Returns:
    i32 [B, K, P, R], ascending along P, -1 at the end where fewer blocks are visible.
  """
  B, N, _, R = block_max.shape
  P, K = num_blocks, kv_heads
  G = N // K
  num_tiles = R // TILE
  i32 = lambda x: jnp.asarray(x, jnp.int32)
  layout = plgpu.Layout.WG_STRIDED((TILE,), 1)
  splat = lambda x, dtype: compat.cast(jnp.full((TILE,), x, dtype), layout, interpret)

  def body(
    max_ref,      # f32 [B, N, C, R]
    lse_ref,      # f32 [B, N, R]
    ranges_ref,   # i32 [B, T'/128, 4]
    start_ref,    # i32 [1]
    out_ref,      # i32 [B, K, P, R]
  ):
    cta = lax.axis_index("cta")
    kv_head = lax.rem(cta, i32(K))
    b = lax.rem(lax.div(cta, i32(K)), i32(B))
    t = num_tiles - 1 - lax.div(cta, i32(K * B))  # long rows first
    tokens = pl.ds(t * TILE, TILE)
    q_tile = lax.div(start_ref[0], i32(TILE)) + t
    read = lambda ref: compat.load(ref, layout, interpret)

    def row_lse(head):
      """The row's lse, +inf where it sees no key: its scores are then -inf."""
      lse = read(lse_ref.at[b, head, tokens])
      return jnp.where(lse == EMPTY_LSE, jnp.inf, lse)

    lses = [row_lse(kv_head * G + g) for g in range(G)]

    def visit(tile, carry):
      values, blocks = carry
      scores = []
      for e in range(TILE_BLOCKS):
        c = tile * TILE_BLOCKS + e
        score = None
        for g in range(G):
          x = read(max_ref.at[b, kv_head * G + g, c, tokens]) * scale - lses[g]
          score = x if score is None else jnp.maximum(score, x)
        scores.append((c, score))
      for c, x in scores:
        passes = [x > v for v in values]
        c_all = compat.cast(lax.broadcast_in_dim(c, (TILE,), ()), layout, interpret)
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
    begin, end = ranges_ref[b, q_tile, BEGIN], ranges_ref[b, q_tile, END]
    _, blocks = lax.fori_loop(begin, end, visit, (values, blocks))
    for lo, hi in ascending_network(P):
      blocks[lo], blocks[hi] = (
        jnp.minimum(blocks[lo], blocks[hi]),
        jnp.maximum(blocks[lo], blocks[hi]),
      )
    for i, x in enumerate(blocks):
      out_ref[b, kv_head, i, tokens] = jnp.where(x == ABSENT, -1, x)

  kernel = compat.mosaic_gpu_kernel(
    body,
    out=jax.ShapeDtypeStruct((B, K, P, R), jnp.int32),
    scratch=[],
    grid=(B * K * num_tiles,),
    grid_names=("cta",),
    num_threads=1,
    thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
    interpret=interpret,
  )
  return kernel(block_max, lse, key_ranges, q_start)
