"""Backward pass of causal attention with offsets and segments on Hopper, from (out, lse).

With p = exp(scale s - lse), delta_t = dO_t . O_t and ds = p (dO V^T - delta):

    dQ = scale ds K        `_query_grads`: one owner per 128 queries of a head, loops over key tiles
    dV = p^T dO            `_key_grads`: one owner per 128 keys of a KV head, loops over its G heads
    dK = scale ds^T Q      and their query tiles, so that the group's sum stays in registers

Every gradient row has one owner and a fixed order of additions: bitwise repeatable. Tiles in which
every query sees every key are computed without a mask (`tile_ranges`).
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, hopper
from pallas_kernels.oracle_attention.gpu.tile_ranges import TILE, Visibility, visibility
from pallas_kernels.softmax import EMPTY_LSE, LOG2E

ROWS = 64           # of one warpgroup
BLOCK_Q = 64        # queries per step of the dK/dV kernel: two f32 tiles beside dK and dV
NUM_STAGES = 2      # tiles in flight


def backward(q, k, v, out, lse, grad_out, *, query_offset, segment_ids, kv_segment_ids, scale,
             interpret):
  """Gradients of causal attention for q, k and v.

  Args:
    q: [B, T, N, H], bf16 or f16.
    k: [B, S, K, H].
    v: [B, S, K, H].
    out: [B, T, N, H], the forward's output.
    lse: f32 [B, N, T], natural log-sum-exp of the logits, -inf for a row that sees no key.
    grad_out: [B, T, N, H].
    query_offset: int, or i32 [B]: the key index of query 0.
    segment_ids: i32 [B, T] or None.
    kv_segment_ids: i32 [B, S] or None.
    scale: multiplies the logits.
    interpret: GPU interpret mode parameters, or None to compile.

  Returns:
    dq, dk, dv with the shapes and dtypes of q, k, v.
  """
  (B, T), S = q.shape[:2], k.shape[1]
  visible = visibility(query_offset, segment_ids, kv_segment_ids, B, T, S)
  delta = jnp.einsum("btnh,btnh->bnt", out, grad_out, preferred_element_type=jnp.float32)
  # exp2(s - inf) = 0 for rows that see no key and for padding.
  lse2 = jnp.where(lse == EMPTY_LSE, jnp.inf, lse * LOG2E)
  lse2, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, -T % TILE)), constant_values=fill)
                 for x, fill in ((lse2, jnp.inf), (delta, 0.0)))
  q, k, v, grad_out = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, 0)))
                       for x in (q, k, v, grad_out))
  args = (q, k, v, grad_out, lse2, delta, visible, scale, interpret)
  dq = _query_grads(*args)
  dk, dv = _key_grads(*args)
  return dq[:, :T], dk[:, :S], dv[:, :S]


def _query_grads(q, k, v, grad_out, lse2, delta, visible: Visibility, scale, interpret):
  """dq [B, T', N, H]. One CTA per 128 queries of a head."""
  B, T, N, H = q.shape
  K, dtype = k.shape[2], q.dtype
  G, num_tiles = N // K, T // TILE
  shape = (ROWS, TILE)       # of a warpgroup's scores
  i32 = lambda x: jnp.asarray(x, jnp.int32)

  def body(
    q_ref,        # [B, T', N, H]
    k_ref,        # [B, S', K, H]
    v_ref,        # [B, S', K, H]
    do_ref,       # [B, T', N, H]
    lse_ref,      # f32 [B, N, T'], base 2
    delta_ref,    # f32 [B, N, T']
    offset_ref,   # i32 [B]
    ranges_ref,   # i32 [B, T'/128, 4]
    *refs,
  ):
    if visible.segmented:
      ids_ref, kv_ids_ref, *refs = refs      # i32 [B, T'], i32 [B, S']
    (
      dq_ref,     # [B, T', N, H]
      qs, dos,    # [2, 64, H], one per warpgroup; qs holds dq at the end
      ks, vs,     # [stages, 128, H]
      q_bar, do_bar, k_bar, v_bar, free,
    ) = refs      # fmt: skip
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cta")
    g = lax.rem(cta, i32(G))
    t = num_tiles - 1 - lax.rem(lax.div(cta, i32(G)), i32(num_tiles))
    bk = lax.div(cta, i32(G * num_tiles))
    b, kv_head = lax.div(bk, i32(K)), lax.rem(bk, i32(K))
    head = kv_head * G + g
    begin, plain_begin, plain_end, end = (ranges_ref[b, t, i] for i in range(4))
    slot_of = lambda j: lax.rem(j - begin, i32(NUM_STAGES))

    def consumer():
      plgpu.set_max_registers(240, action="increase")
      row = t * TILE + wg * ROWS
      rows = pl.ds(row, ROWS)
      plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], qs.at[wg], q_bar.at[wg])
      plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head], dos.at[wg], do_bar.at[wg])
      load_rows = lambda ref: compat.load(ref, hopper.ROWS, interpret)
      row_lse = load_rows(lse_ref.at[b, head, rows])
      row_delta = load_rows(delta_ref.at[b, head, rows])
      first_position = offset_ref[b] + row
      if visible.segmented:
        ids = load_rows(ids_ref.at[b, rows])
      plgpu.barrier_wait(q_bar.at[wg])
      plgpu.barrier_wait(do_bar.at[wg])

      def mask(p, j):
        position = jnp.minimum(hopper.iota(shape, 0, interpret) + first_position,
                               visible.num_keys - 1)
        keep = position >= hopper.iota(shape, 1, interpret) + j * TILE
        if visible.segmented:
          kv_ids = compat.load(kv_ids_ref.at[b, pl.ds(j * TILE, TILE)], hopper.COLS, interpret)
          keep &= hopper.cols_to_tile(kv_ids, shape) == hopper.rows_to_tile(ids, shape)
        return jnp.where(keep, p, 0.0)

      def step(j, dq, masked):
        slot = slot_of(j)
        plgpu.barrier_wait(k_bar.at[slot])
        plgpu.barrier_wait(v_bar.at[slot])
        s, dp = hopper.products([(qs.at[wg], ks.at[slot]), (dos.at[wg], vs.at[slot])], interpret,
                                transposed=True)
        p = jnp.exp2(s * (scale * LOG2E) - hopper.rows_to_tile(row_lse, shape))
        if masked:
          p = mask(p, j)
        ds = (p * (dp - hopper.rows_to_tile(row_delta, shape))).astype(dtype)
        (dq,) = hopper.products([(ds, ks.at[slot])], interpret, accs=[dq])
        plgpu.barrier_arrive(free.at[slot])
        return dq

      dq = hopper.zeros((ROWS, H), hopper.TILE, interpret)
      plain_from = begin
      if visible.segmented:
        plain_from = plain_begin
        dq = lax.fori_loop(begin, plain_from, lambda j, x: step(j, x, True), dq)
      dq = lax.fori_loop(plain_from, plain_end, lambda j, x: step(j, x, False), dq)
      dq = lax.fori_loop(plain_end, end, lambda j, x: step(j, x, True), dq)
      qs[wg] = (dq * scale).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(qs.at[wg], dq_ref.at[b, rows, head])
      plgpu.wait_smem_to_gmem(0)

    def producer():
      plgpu.set_max_registers(24, action="decrease")

      def load(j, _):
        slot, keys = slot_of(j), pl.ds(j * TILE, TILE)
        pl.when(j - begin >= NUM_STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[b, keys, kv_head], ks.at[slot], k_bar.at[slot])
        plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], vs.at[slot], v_bar.at[slot])
        return ()

      def drain(j, _):
        plgpu.barrier_wait(free.at[slot_of(j)])
        return ()

      lax.fori_loop(begin, end, load, ())
      lax.fori_loop(jnp.maximum(end - NUM_STAGES, begin), end, drain, ())

    pl.when(wg < 2)(consumer)
    pl.when(wg == 2)(producer)

  pair = plgpu.Barrier(num_barriers=2)
  full = plgpu.Barrier(num_barriers=NUM_STAGES)
  kernel = compat.mosaic_gpu_kernel(
    body,
    out=jax.ShapeDtypeStruct(q.shape, dtype),
    scratch=[
      *[hopper.swizzled((2, ROWS, H), dtype, interpret)] * 2,
      *[hopper.swizzled((NUM_STAGES, TILE, H), dtype, interpret)] * 2,
      pair, pair, full, full,
      plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES),
    ],
    grid=(B * N * num_tiles,),
    grid_names=("cta",),
    num_threads=3,
    thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
    interpret=interpret,
  )  # fmt: skip
  return kernel(q, k, v, grad_out, lse2, delta, visible.offset, visible.key_ranges, *visible.ids)


def _key_grads(q, k, v, grad_out, lse2, delta, visible: Visibility, scale, interpret):
  """dk, dv [B, S', K, H]. One CTA per 128 keys of a KV head; keys are the rows of every product."""
  B, S, K, H = k.shape
  N, dtype = q.shape[2], q.dtype
  G, num_tiles = N // K, S // TILE
  ratio = TILE // BLOCK_Q
  shape = (ROWS, BLOCK_Q)       # of a warpgroup's transposed scores
  i32 = lambda x: jnp.asarray(x, jnp.int32)

  def body(
    q_ref,        # [B, T', N, H]
    k_ref,        # [B, S', K, H]
    v_ref,        # [B, S', K, H]
    do_ref,       # [B, T', N, H]
    lse_ref,      # f32 [B, N, T'], base 2
    delta_ref,    # f32 [B, N, T']
    offset_ref,   # i32 [B]
    ranges_ref,   # i32 [B, S'/128, 4]
    *refs,
  ):
    if visible.segmented:
      ids_ref, kv_ids_ref, *refs = refs      # i32 [B, T'], i32 [B, S']
    (
      dk_ref, dv_ref,     # [B, S', K, H]
      ks, vs,             # [2, 64, H], one per warpgroup; dk and dv at the end
      qs, dos,            # [stages, 64, H]
      lses, deltas,       # f32 [stages, 64]
      k_bar, v_bar, q_bar, do_bar, free,
    ) = refs      # fmt: skip
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cta")
    t = lax.rem(cta, i32(num_tiles))  # early keys are seen by most queries: heavy first
    bk = lax.div(cta, i32(num_tiles))
    b, kv_head = lax.div(bk, i32(K)), lax.rem(bk, i32(K))
    # In tiles of BLOCK_Q queries. Each head has `before + after` tiles with a mask around
    # `num_plain` without one; those of all heads with a mask come first.
    begin, plain_begin, plain_end, end = (ranges_ref[b, t, i] * ratio for i in range(4))
    before, num_plain, after = plain_begin - begin, plain_end - plain_begin, end - plain_end
    num_masked = before + after
    masked_steps = num_masked * G
    steps = masked_steps + num_plain * G

    def masked_place(i):
      """(head, query tile) of step i < masked_steps."""
      g, n = lax.div(i, num_masked), lax.rem(i, num_masked)
      return kv_head * G + g, jnp.where(n < before, begin + n, plain_end + n - before)

    def plain_place(i):
      """(head, query tile) of step i >= masked_steps."""
      i = i - masked_steps
      return kv_head * G + lax.div(i, num_plain), plain_begin + lax.rem(i, num_plain)

    def consumer():
      plgpu.set_max_registers(240, action="increase")
      row = t * TILE + wg * ROWS
      rows = pl.ds(row, ROWS)
      columns = lambda ref: hopper.cols_to_tile(compat.load(ref, hopper.COLS, interpret), shape)
      plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], ks.at[wg], k_bar.at[wg])
      plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], vs.at[wg], v_bar.at[wg])
      offset = offset_ref[b]
      if visible.segmented:
        kv_ids = compat.load(kv_ids_ref.at[b, rows], hopper.ROWS, interpret)
      plgpu.barrier_wait(k_bar.at[wg])
      plgpu.barrier_wait(v_bar.at[wg])

      def mask(p, j):
        first_position = offset + j * BLOCK_Q
        position = jnp.minimum(hopper.iota(shape, 1, interpret) + first_position,
                               visible.num_keys - 1)
        keep = position >= hopper.iota(shape, 0, interpret) + row
        if visible.segmented:
          ids = columns(ids_ref.at[b, pl.ds(j * BLOCK_Q, BLOCK_Q)])
          keep &= ids == hopper.rows_to_tile(kv_ids, shape)
        return jnp.where(keep, p, 0.0)

      def step(i, carry, masked):
        slot = lax.rem(i, i32(NUM_STAGES))
        plgpu.barrier_wait(q_bar.at[slot])
        plgpu.barrier_wait(do_bar.at[slot])
        s, dp = hopper.products([(ks.at[wg], qs.at[slot]), (vs.at[wg], dos.at[slot])], interpret,
                                transposed=True)
        p = jnp.exp2(s * (scale * LOG2E) - columns(lses.at[slot]))
        if masked:
          p = mask(p, masked_place(i)[1])
        ds = (p * (dp - columns(deltas.at[slot]))).astype(dtype)
        carry = hopper.products([(p.astype(dtype), dos.at[slot]), (ds, qs.at[slot])], interpret,
                                accs=carry)
        plgpu.barrier_arrive(free.at[slot])
        return tuple(carry)

      zeros = hopper.zeros((ROWS, H), hopper.TILE, interpret)
      carry = lax.fori_loop(0, masked_steps, lambda i, c: step(i, c, True), (zeros, zeros))
      dv, dk = lax.fori_loop(masked_steps, steps, lambda i, c: step(i, c, False), carry)
      ks[wg] = (dk * scale).astype(dtype)
      vs[wg] = dv.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(ks.at[wg], dk_ref.at[b, rows, kv_head])
      plgpu.copy_smem_to_gmem(vs.at[wg], dv_ref.at[b, rows, kv_head])
      plgpu.wait_smem_to_gmem(0)

    def producer():
      plgpu.set_max_registers(24, action="decrease")

      def load(i, place):
        slot = lax.rem(i, i32(NUM_STAGES))
        head, j = place(i)
        rows = pl.ds(j * BLOCK_Q, BLOCK_Q)
        pl.when(i >= NUM_STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], qs.at[slot], q_bar.at[slot])
        plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], lses.at[slot], q_bar.at[slot])
        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head], dos.at[slot], do_bar.at[slot])
        plgpu.copy_gmem_to_smem(delta_ref.at[b, head, rows], deltas.at[slot], do_bar.at[slot])
        return ()

      def drain(i, _):
        plgpu.barrier_wait(free.at[lax.rem(i, i32(NUM_STAGES))])
        return ()

      lax.fori_loop(0, masked_steps, lambda i, _: load(i, masked_place), ())
      lax.fori_loop(masked_steps, steps, lambda i, _: load(i, plain_place), ())
      lax.fori_loop(jnp.maximum(steps - NUM_STAGES, 0), steps, drain, ())

    pl.when(wg < 2)(consumer)
    pl.when(wg == 2)(producer)

  pair = plgpu.Barrier(num_barriers=2)
  full = plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES)
  kernel = compat.mosaic_gpu_kernel(
    body,
    out=[jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)],
    scratch=[
      *[hopper.swizzled((2, ROWS, H), dtype, interpret)] * 2,
      *[hopper.swizzled((NUM_STAGES, BLOCK_Q, H), dtype, interpret)] * 2,
      *[plgpu.SMEM((NUM_STAGES, BLOCK_Q), jnp.float32)] * 2,
      pair, pair, full, full,
      plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES),
    ],
    grid=(B * K * num_tiles,),
    grid_names=("cta",),
    num_threads=3,
    thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
    interpret=interpret,
  )  # fmt: skip
  return kernel(q, k, v, grad_out, lse2, delta, visible.offset, visible.query_ranges,
                *visible.ids)
