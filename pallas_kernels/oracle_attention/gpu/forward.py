"""Causal attention on Hopper that also writes the largest logit of every 64-key block.

One CTA owns 128 query tokens of one head: two consumer warpgroups of 64 rows and one that issues
TMA copies. Keys come in tiles of 128 (two blocks), from the diagonal down to the first, so that
only the first tile needs a mask. The maximum over a 64-key block is the first half of the row
maximum that online softmax takes anyway; it is kept and stored straight from registers, T minor
(`block_max [B, N, C, T]`), 32 contiguous bytes per warp and store.

The consumers take turns on the tensor cores through two named barriers: while one computes its
softmax the other runs QK of this tile and PV of the last one.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, hopper

LOG2E = math.log2(math.e)
BLOCK = 64
TILE_T = 128
# Finite, so that a row whose keys are all masked keeps p = exp2(-inf - finite) = 0, never NaN.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
  """Tile sizes of the forward kernel.

  Attributes:
    keys: keys per step; 128 = two 64-key blocks, the widest S tile that leaves two 64x128 f32
      accumulators in 232 registers.
    stages: K/V tiles in flight; 2 x (32 + 32) KB beside the 32 KB of Q.
    overlap: issue QK of this tile together with PV of the previous one, so that the softmax of
      this tile runs while PV drains; otherwise QK, softmax, PV in turn.
    ping_pong: alternate the two warpgroups on the tensor cores.
  """

  keys: int = 128
  stages: int = 2
  overlap: bool = True
  ping_pong: bool = False

  def __post_init__(self):
    if self.keys != TILE_T:
      raise ValueError(f"keys: got {self.keys}, wanted {TILE_T}, the diagonal tile's width")
    if self.stages < 2:
      raise ValueError(f"stages: got {self.stages}, wanted at least 2")


def visible_tiles(segment_ids):
  """Bounds on the key tiles that a tile of 128 queries has to visit and to mask.

  Args:
    segment_ids: i32 [B, T], T a multiple of 128; 0 is padding.

  Returns:
    first i32 [B, T/128]: no key tile before it is visible to any of the tile's queries;
    plain i32 [B, T/128]: from it to the diagonal, exclusive, every key is visible to every query;
    last i32 [B, T/128]: no query tile after it sees any of this tile's keys.
  """
  B, T = segment_ids.shape
  ids = segment_ids.reshape(B, T // TILE_T, TILE_T)
  most = jnp.iinfo(jnp.int32).max
  low = jnp.where(ids == 0, most, ids).min(-1)
  high = jnp.where(ids == 0, -most, ids).max(-1)
  same = (ids == ids[..., :1]).all(-1) & (ids[..., 0] != 0)
  tile = jnp.arange(T // TILE_T, dtype=jnp.int32)
  queries, keys = (slice(None), slice(None), None), (slice(None), None, slice(None))
  causal = tile[:, None] >= tile
  meet = (low[keys] <= high[queries]) & (high[keys] >= low[queries]) & causal
  first = jnp.where(meet, tile, tile[:, None]).min(-1)
  last = jnp.where(meet, tile[:, None], tile).max(-2)
  plain = same[keys] & same[queries] & (low[keys] == low[queries])
  plain = jnp.where(plain | (tile >= tile[:, None]), 0, tile + 1).max(-1)
  return first, jnp.maximum(plain, first), last


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float,
  chunk: int,
  offset: jax.Array | None = None,
  segments: tuple[jax.Array, ...] | None = None,
  tiles: ForwardTiles = ForwardTiles(),
  maxima: bool = True,
  interpret=None,
):
  """Attends `chunk` query rows starting at `offset` (0 when None) to all earlier keys.

  Args:
    q: [B, T, N, H], bf16 or f16, T a multiple of 128.
    k: [B, T, K, H].
    v: [B, T, K, H].
    scale: multiplies the logits.
    chunk: query rows of this launch, a multiple of 128.
    offset: i32 [1], first query row, a multiple of 128.
    segments: (ids i32 [B, T], *bounds): segment ids, and `first` and `plain` as
      `visible_tiles` returns them.
    tiles: tile sizes.
    maxima: also write the block maxima (False measures what they cost).
    interpret: GPU interpret mode parameters, or None to compile.

  Returns:
    out [B, chunk, N, H], lse f32 [B, N, chunk] (natural log), block_max f32 [B, N, T/64, chunk]:
    unscaled logits, -inf where a block has no visible key, undefined for blocks that no tile of
    the row's 128 queries visits.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  keys, stages = tiles.keys, tiles.stages
  num_tiles = chunk // TILE_T
  dtype = q.dtype
  log2_scale = scale * LOG2E
  i32 = lambda x: jnp.asarray(x, jnp.int32)
  operands = [q, k, v]
  if offset is not None:
    operands.append(offset)
  if segments is not None:
    operands.extend(segments[:3])

  def body(*refs):
    q_ref, k_ref, v_ref, *rest = refs
    offset_ref = rest.pop(0) if offset is not None else None
    if segments is not None:
      ids_ref, first_ref, plain_ref, *rest = rest
    out_ref, lse_ref, max_ref, qs, ks, vs, q_bar, k_bar, v_bar, k_free, v_free = rest
    wg = lax.axis_index("wg")
    # Heads of a group side by side (they share K and V in L2), then heavy tiles first.
    cta = lax.axis_index("cta")
    g = lax.rem(cta, i32(G))
    t = num_tiles - 1 - lax.rem(lax.div(cta, i32(G)), i32(num_tiles))
    bk = lax.div(cta, i32(G * num_tiles))
    b, kv_head = lax.div(bk, i32(K)), lax.rem(bk, i32(K))
    head = kv_head * G + g
    diagonal = t if offset_ref is None else t + lax.div(offset_ref[0], i32(TILE_T))
    first = i32(0) if segments is None else first_ref[b, diagonal]
    steps = diagonal - first + 1

    def consumer():
      plgpu.set_max_registers(240, action="increase")
      local = t * TILE_T + wg * BLOCK
      base = diagonal * TILE_T + wg * BLOCK
      plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(base, BLOCK), head], qs.at[wg], q_bar.at[wg])
      shape = (BLOCK, keys)
      cast = lambda x, layout: compat.cast(x, layout, interpret)
      iota = lambda d: cast(lax.broadcasted_iota(jnp.int32, shape, d), hopper.TILE)
      if segments is not None:
        q_ids = compat.load(ids_ref.at[b, pl.ds(base, BLOCK)], hopper.ROWS, interpret)

      def token_wait():
        if tiles.ping_pong and not interpret:
          pl.when(wg == 0)(lambda: hopper.named_barrier_sync(8, 256))
          pl.when(wg == 1)(lambda: hopper.named_barrier_sync(9, 256))

      def token_pass():
        if tiles.ping_pong and not interpret:
          pl.when(wg == 0)(lambda: hopper.named_barrier_arrive(9, 256))
          pl.when(wg == 1)(lambda: hopper.named_barrier_arrive(8, 256))

      def mask(s, j):
        keep = iota(0) + base >= iota(1) + j * keys
        if segments is not None:
          k_ids = compat.load(ids_ref.at[b, pl.ds(j * keys, keys)], hopper.COLS, interpret)
          k_ids = lax.broadcast_in_dim(k_ids, shape, [1])
          ids = hopper.rows_to_tile(q_ids, shape)
          keep = keep & (k_ids == ids) & (ids != 0)
        return jnp.where(keep, s, -jnp.inf)

      def softmax(s, j, m, total, masked):
        """Returns p, the new (m, total) and exp2(m_old - m_new); m is unscaled."""
        if masked:
          s = mask(s, j)
        parts = [s[:, e * BLOCK : (e + 1) * BLOCK].max(axis=1) for e in range(keys // BLOCK)]
        if maxima:
          for e, part in enumerate(parts):
            max_ref[b, head, j * (keys // BLOCK) + e, pl.ds(local, BLOCK)] = part
        new = m
        for part in parts:
          new = jnp.maximum(new, part)
        alpha = jnp.exp2((m - new) * log2_scale)
        p = jnp.exp2(s * log2_scale - hopper.rows_to_tile(new * log2_scale, shape))
        return p, new, total * alpha + p.sum(axis=1), alpha

      # GPU interpret mode knows neither register operands nor accumulators that start from a
      # value, nor (0.10.2) transposed ones: there the products are plain dots on the same tiles.
      def add_pv(o, p, slot):
        """o + p V, waited for."""
        if interpret:
          return o + jnp.dot(p, vs[slot], preferred_element_type=jnp.float32)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, vs.at[slot]))(plgpu.ACC.init(o))

      def scores(slot, after=lambda: None):
        if interpret:
          after()
          return jnp.dot(qs[wg], ks[slot].T, preferred_element_type=jnp.float32)

        def product(ref):
          plgpu.wgmma(ref, qs.at[wg], ks.at[slot].transpose((1, 0)))
          after()
          return ref[...]

        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

      def step_in_turn(i, carry, masked):
        o, m, total = carry
        j, slot = diagonal - i, lax.rem(i, i32(stages))
        plgpu.barrier_wait(k_bar.at[slot])
        s = scores(slot, token_pass)
        plgpu.barrier_arrive(k_free.at[slot])
        p, m, total, alpha = softmax(s, j, m, total, masked)
        o = o * hopper.rows_to_tile(alpha, o.shape)
        p = p.astype(dtype)
        if not interpret:
          o, p, m, total = lax.optimization_barrier((o, p, m, total))
        plgpu.barrier_wait(v_bar.at[slot])
        token_wait()
        o = add_pv(o, p, slot)
        plgpu.barrier_arrive(v_free.at[slot])
        return o, m, total

      def step_overlapped(i, carry, masked):
        o, m, total, p = carry
        j, slot, last = diagonal - i, lax.rem(i, i32(stages)), lax.rem(i - 1, i32(stages))
        plgpu.barrier_wait(k_bar.at[slot])
        plgpu.barrier_wait(v_bar.at[last])
        token_wait()
        if interpret:
          s = scores(slot)
          o = add_pv(o, p, last)
          plgpu.barrier_arrive(k_free.at[slot])
          p, m, total, alpha = softmax(s, j, m, total, masked)
        else:

          def both(refs):
            o_ref, m_ref, l_ref, alpha_ref, p_ref = refs

            def product(s_ref):
              plgpu.wgmma(s_ref, qs.at[wg], ks.at[slot].transpose((1, 0)))
              plgpu.wgmma(o_ref, p, vs.at[last])
              token_pass()
              return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

            s = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            p_new, m_ref[...], l_ref[...], alpha_ref[...] = softmax(
              s, j, m_ref[...], l_ref[...], masked
            )
            p_ref[...] = p_new

          state = (plgpu.ACC.init(o), m, total, total, jnp.zeros(shape, jnp.float32))
          state = (*state[:4], cast(state[4], hopper.TILE))
          o, m, total, alpha, p = pl.run_state(both)(state)
        plgpu.barrier_arrive(v_free.at[last])
        o = o * hopper.rows_to_tile(alpha, o.shape)
        return o, m, total, p.astype(dtype)

      o = cast(jnp.zeros((BLOCK, H), jnp.float32), hopper.TILE)
      m = cast(jnp.full((BLOCK,), LOWEST, jnp.float32), hopper.ROWS)
      total = cast(jnp.zeros((BLOCK,), jnp.float32), hopper.ROWS)
      # Tiles i = 0 (the diagonal), 1, ... count downwards in key position.
      plain_end = steps if segments is None else diagonal - plain_ref[b, diagonal] + 1
      plgpu.barrier_wait(q_bar.at[wg])
      if tiles.overlap:
        pl.when(wg == 1)(token_pass)
        plgpu.barrier_wait(k_bar.at[0])
        token_wait()
        s = scores(i32(0), token_pass)
        plgpu.barrier_arrive(k_free.at[0])
        p, m, total, _ = softmax(s, diagonal, m, total, True)
        carry = (o, m, total, p.astype(dtype))
        step = step_overlapped
      else:
        pl.when(wg == 1)(token_wait)
        carry = step_in_turn(i32(0), (o, m, total), True)
        step = step_in_turn
      carry = lax.fori_loop(1, plain_end, lambda i, c: step(i, c, False), carry)
      if segments is not None:
        start = jnp.maximum(plain_end, 1)
        carry = lax.fori_loop(start, steps, lambda i, c: step(i, c, True), carry)
      if tiles.overlap:
        o, m, total, p = carry
        last = lax.rem(steps - 1, i32(stages))
        plgpu.barrier_wait(v_bar.at[last])
        o = add_pv(o, p, last)
        plgpu.barrier_arrive(v_free.at[last])
        pl.when(wg == 0)(token_wait)
      else:
        o, m, total = carry
        pl.when(wg == 0)(token_pass)
      if segments is None:
        inverse = 1.0 / total
        lse = m * scale + jnp.log(total)
      else:
        seen = total > 0.0
        safe = jnp.where(seen, total, 1.0)
        inverse = jnp.where(seen, 1.0 / safe, 0.0)
        lse = jnp.where(seen, m * scale + jnp.log(safe), jnp.inf)
      lse_ref[b, head, pl.ds(local, BLOCK)] = lse
      qs[wg] = (o * hopper.rows_to_tile(inverse, o.shape)).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(qs.at[wg], out_ref.at[b, pl.ds(local, BLOCK), head])
      plgpu.wait_smem_to_gmem(0)

    def producer():
      plgpu.set_max_registers(24, action="decrease")

      def load(i, _):
        slot = lax.rem(i, i32(stages))
        rows = pl.ds((diagonal - i) * keys, keys)

        @pl.when(i >= stages)
        def _():
          plgpu.barrier_wait(k_free.at[slot])

        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], ks.at[slot], k_bar.at[slot])

        @pl.when(i >= stages)
        def _():
          plgpu.barrier_wait(v_free.at[slot])

        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], vs.at[slot], v_bar.at[slot])

      def drain(i, _):
        plgpu.barrier_wait(k_free.at[lax.rem(i, i32(stages))])
        plgpu.barrier_wait(v_free.at[lax.rem(i, i32(stages))])

      lax.fori_loop(0, steps, lambda i, c: (load(i, c), c)[1], ())
      lax.fori_loop(jnp.maximum(steps - stages, 0), steps, lambda i, c: (drain(i, c), c)[1], ())

    pl.when(wg < 2)(consumer)
    pl.when(wg == 2)(producer)

  free = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
  full = plgpu.Barrier(num_barriers=stages)
  return compat.mosaic_gpu_kernel(
    body,
    out=[
      jax.ShapeDtypeStruct((B, chunk, N, H), dtype),
      jax.ShapeDtypeStruct((B, N, chunk), jnp.float32),
      jax.ShapeDtypeStruct((B, N, T // BLOCK, chunk) if maxima else (1, 1, 1, 128), jnp.float32),
    ],
    scratch=[
      hopper.swizzled((2, BLOCK, H), dtype, interpret),
      hopper.swizzled((stages, keys, H), dtype, interpret),
      hopper.swizzled((stages, keys, H), dtype, interpret),
      plgpu.Barrier(num_barriers=2),
      full,
      full,
      free,
      free,
    ],
    grid=(B * N * num_tiles,),
    grid_names=("cta",),
    num_threads=3,
    thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
    interpret=interpret,
  )(*operands)
