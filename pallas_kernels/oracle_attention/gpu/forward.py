"""Causal attention on Hopper that also writes the largest logit of every 64-key block.

One CTA owns 128 queries of one head: two consumer warpgroups of 64 rows and a third that issues
TMA copies. Key tiles of 128 (two blocks) come from the last visible one down to the first, so that
the mask of causality is mostly needed in the first step only; the ranges of `tile_ranges` say
which steps need a mask of segments. The maximum over a 64-key block is the first half of the row
maximum that online softmax takes anyway. It is stored straight from registers, T minor
(`block_max [B, N, C, T]`): 32 contiguous bytes per warp and store.

Each step issues its QK^T together with PV of the step before and computes its softmax while PV
drains.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, hopper
from pallas_kernels.oracle_attention.gpu.tile_ranges import TILE, Visibility
from pallas_kernels.softmax import EMPTY_LSE, LOG2E, MASKED

BLOCK = 64          # keys per block, and rows of one warpgroup
# K/V tiles in flight: 2 x (32 + 32) KB beside the 32 KB of Q at H = 128.
NUM_STAGES = 2


def forward(q, k, v, *, visible: Visibility, q_start, num_rows, scale, maxima, interpret):
  """Attends `num_rows` queries from row `q_start` on to the keys they see.

  Args:
    q: [B, T', N, H], bf16 or f16, T' a multiple of 128.
    k: [B, S', K, H], S' a multiple of 128.
    v: [B, S', K, H].
    visible: offsets, segments and tile ranges of the call.
    q_start: i32 [1], the first query row of this launch, a multiple of 128.
    num_rows: R, query rows of this launch, a multiple of 128.
    scale: multiplies the logits.
    maxima: whether to write the block maxima.
    interpret: GPU interpret mode parameters, or None to compile.

  Returns:
    out [B, R, N, H]; lse f32 [B, N, R], natural log, -inf for a row that sees no key; block_max f32
    [B, N, S'/64, R]: unscaled logits, -inf where a block has no visible key, undefined outside of
    the row's key tiles [BEGIN, END). Without `maxima` block_max is an undefined [1, 1, 1, 128].
  """
  B, _, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  num_tiles = num_rows // TILE
  dtype = q.dtype
  log2_scale = scale * LOG2E
  shape = (BLOCK, TILE)      # of a warpgroup's scores
  i32 = lambda x: jnp.asarray(x, jnp.int32)

  def body(
    q_ref,        # [B, T', N, H]
    k_ref,        # [B, S', K, H]
    v_ref,        # [B, S', K, H]
    start_ref,    # i32 [1]
    offset_ref,   # i32 [B]
    ranges_ref,   # i32 [B, T'/128, 4]
    *refs,
  ):
    if visible.segmented:
      ids_ref, kv_ids_ref, *refs = refs      # i32 [B, T'], i32 [B, S']
    (
      out_ref,    # [B, R, N, H]
      lse_ref,    # f32 [B, N, R]
      max_ref,    # f32 [B, N, S'/64, R]
      qs,         # [2, 64, H], one per warpgroup; the result at the end
      ks, vs,     # [stages, 128, H]
      q_bar, k_bar, v_bar, k_free, v_free,
    ) = refs      # fmt: skip
    wg = lax.axis_index("wg")
    # Heads of a group side by side (they share K and V in L2), then heavy tiles first.
    cta = lax.axis_index("cta")
    g = lax.rem(cta, i32(G))
    t = num_tiles - 1 - lax.rem(lax.div(cta, i32(G)), i32(num_tiles))
    bk = lax.div(cta, i32(G * num_tiles))
    b, kv_head = lax.div(bk, i32(K)), lax.rem(bk, i32(K))
    head = kv_head * G + g
    q_tile = lax.div(start_ref[0], i32(TILE)) + t
    begin, plain_begin, plain_end, end = (ranges_ref[b, q_tile, i] for i in range(4))
    steps = end - begin      # step i visits key tile end - 1 - i

    def consumer():
      plgpu.set_max_registers(240, action="increase")
      local = pl.ds(t * TILE + wg * BLOCK, BLOCK)      # rows in this launch's results
      row = q_tile * TILE + wg * BLOCK
      rows = pl.ds(row, BLOCK)
      plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], qs.at[wg], q_bar.at[wg])
      first_position = offset_ref[b] + row
      if visible.segmented:
        ids = compat.load(ids_ref.at[b, rows], hopper.ROWS, interpret)

      def mask(s, j):
        # Queries after the last key see all S keys, and none of the padding after those.
        position = jnp.minimum(hopper.iota(shape, 0, interpret) + first_position,
                               visible.num_keys - 1)
        keep = position >= hopper.iota(shape, 1, interpret) + j * TILE
        if visible.segmented:
          keys = pl.ds(j * TILE, TILE)
          kv_ids = compat.load(kv_ids_ref.at[b, keys], hopper.COLS, interpret)
          row_ids = hopper.rows_to_tile(ids, shape)
          keep &= (hopper.cols_to_tile(kv_ids, shape) == row_ids) & (row_ids != 0)
        return jnp.where(keep, s, -jnp.inf)

      def softmax(s, j, m, l, masked):
        """Returns p and the new (m, l, alpha); m is unscaled, p = 2^(log2_scale (s - m))."""
        if masked:
          s = mask(s, j)
        parts = [s[:, e * BLOCK:(e + 1) * BLOCK].max(axis=1) for e in range(TILE // BLOCK)]
        if maxima:
          for e, part in enumerate(parts):
            max_ref[b, head, j * (TILE // BLOCK) + e, local] = part
        m_new = m
        for part in parts:
          m_new = jnp.maximum(m_new, part)
        alpha = jnp.exp2((m - m_new) * log2_scale)
        p = jnp.exp2(s * log2_scale - hopper.rows_to_tile(m_new * log2_scale, shape))
        return p, m_new, l * alpha + p.sum(axis=1), alpha

      def add_pv(acc, p, slot):
        (acc,) = hopper.products([(p, vs.at[slot])], interpret, accs=[acc])
        return acc

      def scores(slot):
        (s,) = hopper.products([(qs.at[wg], ks.at[slot])], interpret, transposed=True)
        return s

      def step(i, carry, masked):
        acc, m, l, p = carry
        j, slot, last = end - 1 - i, lax.rem(i, i32(NUM_STAGES)), lax.rem(i - 1, i32(NUM_STAGES))
        plgpu.barrier_wait(k_bar.at[slot])
        plgpu.barrier_wait(v_bar.at[last])
        if interpret:
          s = scores(slot)
          acc = add_pv(acc, p, last)
          plgpu.barrier_arrive(k_free.at[slot])
          p, m, l, alpha = softmax(s, j, m, l, masked)
        else:

          def both(refs):
            acc_ref, m_ref, l_ref, alpha_ref, p_ref = refs

            def product(s_ref):
              plgpu.wgmma(s_ref, qs.at[wg], ks.at[slot].transpose((1, 0)))
              plgpu.wgmma(acc_ref, p, vs.at[last])
              return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

            s = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            p_ref[...], m_ref[...], l_ref[...], alpha_ref[...] = softmax(
              s, j, m_ref[...], l_ref[...], masked)

          acc, m, l, alpha, p = pl.run_state(both)(
            (plgpu.ACC.init(acc), m, l, l, hopper.zeros(shape, hopper.TILE, interpret)))
        plgpu.barrier_arrive(v_free.at[last])
        return acc * hopper.rows_to_tile(alpha, acc.shape), m, l, p.astype(dtype)

      acc = hopper.zeros((BLOCK, H), hopper.TILE, interpret)
      l = hopper.zeros((BLOCK,), hopper.ROWS, interpret)
      m = compat.cast(jnp.full((BLOCK,), MASKED, jnp.float32), hopper.ROWS, interpret)
      plgpu.barrier_wait(q_bar.at[wg])
      plgpu.barrier_wait(k_bar.at[0])
      s = scores(i32(0))
      plgpu.barrier_arrive(k_free.at[0])
      p, m, l, _ = softmax(s, end - 1, m, l, True)
      carry = (acc, m, l, p.astype(dtype))
      plain_from = i32(1)
      if not visible.aligned:      # causality cuts through two key tiles
        plain_from = jnp.maximum(end - plain_end, 1)
        carry = lax.fori_loop(1, plain_from, lambda i, c: step(i, c, True), carry)
      plain_to = steps
      if visible.segmented:
        plain_to = jnp.maximum(end - plain_begin, plain_from)
      carry = lax.fori_loop(plain_from, plain_to, lambda i, c: step(i, c, False), carry)
      if visible.segmented:
        carry = lax.fori_loop(plain_to, steps, lambda i, c: step(i, c, True), carry)
      acc, m, l, p = carry
      last = lax.rem(steps - 1, i32(NUM_STAGES))
      plgpu.barrier_wait(v_bar.at[last])
      acc = add_pv(acc, p, last)
      plgpu.barrier_arrive(v_free.at[last])
      seen = l > 0.0
      safe = jnp.where(seen, l, 1.0)
      lse_ref[b, head, local] = jnp.where(seen, m * scale + jnp.log(safe), EMPTY_LSE)
      inverse = jnp.where(seen, 1.0 / safe, 0.0)
      qs[wg] = (acc * hopper.rows_to_tile(inverse, acc.shape)).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(qs.at[wg], out_ref.at[b, local, head])
      plgpu.wait_smem_to_gmem(0)

    def producer():
      plgpu.set_max_registers(24, action="decrease")

      def load(i, _):
        slot = lax.rem(i, i32(NUM_STAGES))
        keys = pl.ds((end - 1 - i) * TILE, TILE)
        pl.when(i >= NUM_STAGES)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[b, keys, kv_head], ks.at[slot], k_bar.at[slot])
        pl.when(i >= NUM_STAGES)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], vs.at[slot], v_bar.at[slot])
        return ()

      def drain(i, _):
        slot = lax.rem(i, i32(NUM_STAGES))
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])
        return ()

      lax.fori_loop(0, steps, load, ())
      lax.fori_loop(jnp.maximum(steps - NUM_STAGES, 0), steps, drain, ())

    pl.when(wg < 2)(consumer)
    pl.when(wg == 2)(producer)

  free = plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES)
  full = plgpu.Barrier(num_barriers=NUM_STAGES)
  kernel = compat.mosaic_gpu_kernel(
    body,
    out=[
      jax.ShapeDtypeStruct((B, num_rows, N, H), dtype),
      jax.ShapeDtypeStruct((B, N, num_rows), jnp.float32),
      jax.ShapeDtypeStruct((B, N, S // BLOCK, num_rows) if maxima else (1, 1, 1, TILE),
                           jnp.float32),
    ],
    scratch=[
      hopper.swizzled((2, BLOCK, H), dtype, interpret),
      hopper.swizzled((NUM_STAGES, TILE, H), dtype, interpret),
      hopper.swizzled((NUM_STAGES, TILE, H), dtype, interpret),
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
  )
  return kernel(q, k, v, q_start, visible.offset, visible.key_ranges, *visible.ids)
