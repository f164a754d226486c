"""Backward pass of causal attention with segments on Hopper, from (out, lse): two kernels.

With p = exp(scale s - lse), delta_t = dO_t . O_t and ds = p (dO V^T - delta):

    dQ = scale ds K        one owner per 128 queries of a head; loops over key tiles
    dV = p^T dO            one owner per 128 keys of a KV head; loops over its G heads and
    dK = scale ds^T Q      their query tiles, so the group's sum stays in registers

Every gradient row has one owner and a fixed order of additions: bitwise repeatable.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, hopper
from pallas_kernels.oracle_attention.gpu.forward import visible_tiles

LOG2E = math.log2(math.e)
ROWS = 64
TILE_T = 128


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
  """Tile sizes of the two backward kernels.

  Attributes:
    keys: keys per step of the dQ kernel: two f32 tiles of 64 x keys beside the 64 x 128 of dQ.
    queries: queries per step of the dK/dV kernel: two tiles of 64 x queries beside dK and dV.
    stages: tiles in flight.
  """

  keys: int = 128
  queries: int = 64
  stages: int = 2

  def __post_init__(self):
    for name, value, allowed in (("keys", self.keys, (64, 128)), ("queries", self.queries, (64,))):
      if value not in allowed:
        raise ValueError(f"{name}: got {value}, wanted one of {allowed}")
    if self.stages < 2:
      raise ValueError(f"stages: got {self.stages}, wanted at least 2")


def backward(q, k, v, out, lse, grad_out, *, scale, segment_ids=None, tiles=BackwardTiles(),
             interpret=None):
  """Gradients of causal attention for q, k and v.

  Args:
    q: [B, T, N, H], bf16 or f16.
    k: [B, T, K, H].
    v: [B, T, K, H].
    out: [B, T, N, H], the forward's output.
    lse: f32 [B, N, T], natural logarithm of the softmax denominators, inf for empty rows.
    grad_out: [B, T, N, H].
    scale: multiplies the logits.
    segment_ids: i32 [B, T] or None.
    tiles: tile sizes.
    interpret: GPU interpret mode parameters, or None to compile.

  Returns:
    dq, dk, dv with the shapes and dtypes of q, k, v.
  """
  T = q.shape[1]
  delta = jnp.einsum("btnh,btnh->bnt", out, grad_out, preferred_element_type=jnp.float32)
  padding = -T % TILE_T
  if padding:
    q, k, v, grad_out = (
      jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v, grad_out)
    )
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, padding)), constant_values=jnp.inf)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, padding)))
    if segment_ids is not None:
      segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
  segments = None if segment_ids is None else (segment_ids, *visible_tiles(segment_ids))
  args = (q, k, v, grad_out, lse * LOG2E, delta, segments, scale, tiles, interpret)
  dq = _queries(*args)
  dk, dv = _keys(*args)
  return dq[:, :T], dk[:, :T], dv[:, :T]


def _dot(a, b_ref, transposed, n, interpret):
  """a (a ref or registers) times a tile in shared memory, from zero, waited for."""
  if interpret:
    a = a if isinstance(a, jax.Array) else a[...]
    b = b_ref[...].T if transposed else b_ref[...]
    return jnp.dot(a, b, preferred_element_type=jnp.float32)

  def product(acc):
    plgpu.wgmma(acc, a, b_ref.transpose((1, 0)) if transposed else b_ref)
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC((ROWS, n), jnp.float32))


def _two_dots(a, a_ref, b, b_ref, n, interpret):
  """(a a_ref^T, b b_ref^T), both in flight together."""
  if interpret:
    return _dot(a, a_ref, True, n, interpret), _dot(b, b_ref, True, n, interpret)

  def products(x, y):
    plgpu.wgmma(x, a, a_ref.transpose((1, 0)))
    plgpu.wgmma(y, b, b_ref.transpose((1, 0)))
    return x[...], y[...]

  return pl.run_scoped(products, *[plgpu.ACC((ROWS, n), jnp.float32)] * 2)


def _accumulate(accs, operands, interpret):
  """accs[i] + operands[i][0] @ operands[i][1], all in flight together."""
  if interpret:
    return [
      x + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
      for x, (a, b) in zip(accs, operands)
    ]

  def products(refs):
    for ref, (a, b) in zip(refs, operands):
      plgpu.wgmma(ref, a, b)

  return pl.run_state(products)([plgpu.ACC.init(x) for x in accs])


def _queries(q, k, v, grad_out, lse2, delta, segments, scale, tiles, interpret):
  """dQ. One CTA per 128 queries of a head."""
  B, T, N, H = q.shape
  K, keys, stages, dtype = k.shape[2], tiles.keys, tiles.stages, q.dtype
  G, num_tiles = N // K, T // TILE_T
  ratio = TILE_T // keys
  i32 = lambda x: jnp.asarray(x, jnp.int32)

  def body(*refs):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest = refs
    if segments is not None:
      ids_ref, first_ref, *rest = rest
    dq_ref, qs, dos, ks, vs, q_bar, do_bar, k_bar, v_bar, free = rest
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cta")
    g = lax.rem(cta, i32(G))
    t = num_tiles - 1 - lax.rem(lax.div(cta, i32(G)), i32(num_tiles))
    bk = lax.div(cta, i32(G * num_tiles))
    b, kv_head = lax.div(bk, i32(K)), lax.rem(bk, i32(K))
    head = kv_head * G + g
    first = i32(0) if segments is None else first_ref[b, t] * ratio
    end = (t + 1) * ratio
    steps = end - first

    def consumer():
      plgpu.set_max_registers(240, action="increase")
      base = t * TILE_T + wg * ROWS
      rows = pl.ds(base, ROWS)
      shape = (ROWS, keys)
      cast = lambda x, layout: compat.cast(x, layout, interpret)
      iota = lambda d: cast(lax.broadcasted_iota(jnp.int32, shape, d), hopper.TILE)
      plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], qs.at[wg], q_bar.at[wg])
      plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head], dos.at[wg], do_bar.at[wg])
      load_rows = lambda ref: compat.load(ref, hopper.ROWS, interpret)
      row_lse = load_rows(lse_ref.at[b, head, rows])
      row_delta = load_rows(delta_ref.at[b, head, rows])
      row_ids = None if segments is None else load_rows(ids_ref.at[b, rows])
      plgpu.barrier_wait(q_bar.at[wg])
      plgpu.barrier_wait(do_bar.at[wg])

      def step(i, dq, masked):
        slot, j = lax.rem(i, i32(stages)), first + i
        plgpu.barrier_wait(k_bar.at[slot])
        plgpu.barrier_wait(v_bar.at[slot])
        s, dp = _two_dots(qs.at[wg], ks.at[slot], dos.at[wg], vs.at[slot], keys, interpret)
        p = jnp.exp2(s * (scale * LOG2E) - hopper.rows_to_tile(row_lse, shape))
        if masked:
          keep = iota(0) + base >= iota(1) + j * keys
          if segments is not None:
            k_ids = compat.load(ids_ref.at[b, pl.ds(j * keys, keys)], hopper.COLS, interpret)
            keep &= lax.broadcast_in_dim(k_ids, shape, [1]) == hopper.rows_to_tile(row_ids, shape)
          p = jnp.where(keep, p, 0.0)
        ds = (p * (dp - hopper.rows_to_tile(row_delta, shape))).astype(dtype)
        (dq,) = _accumulate([dq], [(ds, ks.at[slot])], interpret)
        plgpu.barrier_arrive(free.at[slot])
        return dq

      dq = cast(jnp.zeros((ROWS, H), jnp.float32), hopper.TILE)
      plain = i32(0) if segments is not None else steps - ratio
      dq = lax.fori_loop(0, plain, lambda i, x: step(i, x, False), dq)
      dq = lax.fori_loop(plain, steps, lambda i, x: step(i, x, True), dq)
      qs[wg] = (dq * scale).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(qs.at[wg], dq_ref.at[b, rows, head])
      plgpu.wait_smem_to_gmem(0)

    def producer():
      plgpu.set_max_registers(24, action="decrease")

      def load(i, carry):
        slot, rows = lax.rem(i, i32(stages)), pl.ds((first + i) * keys, keys)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], ks.at[slot], k_bar.at[slot])
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], vs.at[slot], v_bar.at[slot])
        return carry

      def drain(i, carry):
        plgpu.barrier_wait(free.at[lax.rem(i, i32(stages))])
        return carry

      lax.fori_loop(0, steps, load, ())
      lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, ())

    pl.when(wg < 2)(consumer)
    pl.when(wg == 2)(producer)

  pair = plgpu.Barrier(num_barriers=2)
  full = plgpu.Barrier(num_barriers=stages)
  operands = [q, k, v, grad_out, lse2, delta]
  operands += [] if segments is None else list(segments[:2])
  return compat.mosaic_gpu_kernel(
    body,
    out=jax.ShapeDtypeStruct(q.shape, dtype),
    scratch=[
      *[hopper.swizzled((2, ROWS, H), dtype, interpret)] * 2,
      *[hopper.swizzled((stages, keys, H), dtype, interpret)] * 2,
      pair, pair, full, full,
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ],
    grid=(B * N * num_tiles,),
    grid_names=("cta",),
    num_threads=3,
    thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
    interpret=interpret,
  )(*operands)  # fmt: skip


def _keys(q, k, v, grad_out, lse2, delta, segments, scale, tiles, interpret):
  """dK and dV. One CTA per 128 keys of a KV head; keys are the rows of every product."""
  B, T, N, H = q.shape
  K, queries, stages, dtype = k.shape[2], tiles.queries, tiles.stages, q.dtype
  G, num_tiles = N // K, T // TILE_T
  ratio = TILE_T // queries
  i32 = lambda x: jnp.asarray(x, jnp.int32)

  def body(*refs):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest = refs
    if segments is not None:
      ids_ref, last_ref, *rest = rest
    dk_ref, dv_ref, ks, vs, qs, dos, lses, deltas, k_bar, v_bar, q_bar, do_bar, free = rest
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cta")
    t = lax.rem(cta, i32(num_tiles))  # early keys are seen by most queries: heavy first
    bk = lax.div(cta, i32(num_tiles))
    b, kv_head = lax.div(bk, i32(K)), lax.rem(bk, i32(K))
    end = i32(num_tiles) if segments is None else last_ref[b, t] + 1
    per_head = (end - t) * ratio
    steps = per_head * G
    # Step i: head kv_head * G + i // per_head, query tile t * ratio + i % per_head.
    place = lambda i: (kv_head * G + lax.div(i, per_head), t * ratio + lax.rem(i, per_head))

    def consumer():
      plgpu.set_max_registers(240, action="increase")
      base = t * TILE_T + wg * ROWS
      rows = pl.ds(base, ROWS)
      shape = (ROWS, queries)
      cast = lambda x, layout: compat.cast(x, layout, interpret)
      iota = lambda d: cast(lax.broadcasted_iota(jnp.int32, shape, d), hopper.TILE)
      columns = lambda ref: lax.broadcast_in_dim(
        compat.load(ref, hopper.COLS, interpret), shape, [1]
      )
      plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], ks.at[wg], k_bar.at[wg])
      plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], vs.at[wg], v_bar.at[wg])
      row_ids = None
      if segments is not None:
        row_ids = compat.load(ids_ref.at[b, rows], hopper.ROWS, interpret)
      plgpu.barrier_wait(k_bar.at[wg])
      plgpu.barrier_wait(v_bar.at[wg])

      def step(i, carry):
        slot = lax.rem(i, i32(stages))
        _, j = place(i)
        plgpu.barrier_wait(q_bar.at[slot])
        plgpu.barrier_wait(do_bar.at[slot])
        s, dp = _two_dots(ks.at[wg], qs.at[slot], vs.at[wg], dos.at[slot], queries, interpret)
        p = jnp.exp2(s * (scale * LOG2E) - columns(lses.at[slot]))
        keep = iota(1) + j * queries >= iota(0) + base
        if segments is not None:
          q_ids = columns(ids_ref.at[b, pl.ds(j * queries, queries)])
          keep &= q_ids == hopper.rows_to_tile(row_ids, shape)
        p = jnp.where(keep, p, 0.0)
        ds = (p * (dp - columns(deltas.at[slot]))).astype(dtype)
        dv, dk = _accumulate(
          carry, [(p.astype(dtype), dos.at[slot]), (ds, qs.at[slot])], interpret
        )
        plgpu.barrier_arrive(free.at[slot])
        return dv, dk

      zeros = cast(jnp.zeros((ROWS, H), jnp.float32), hopper.TILE)
      dv, dk = lax.fori_loop(0, steps, step, (zeros, zeros))
      ks[wg] = (dk * scale).astype(dtype)
      vs[wg] = dv.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(ks.at[wg], dk_ref.at[b, rows, kv_head])
      plgpu.copy_smem_to_gmem(vs.at[wg], dv_ref.at[b, rows, kv_head])
      plgpu.wait_smem_to_gmem(0)

    def producer():
      plgpu.set_max_registers(24, action="decrease")

      def load(i, carry):
        slot = lax.rem(i, i32(stages))
        head, j = place(i)
        rows = pl.ds(j * queries, queries)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], qs.at[slot], q_bar.at[slot])
        plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], lses.at[slot], q_bar.at[slot])
        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head], dos.at[slot], do_bar.at[slot])
        plgpu.copy_gmem_to_smem(delta_ref.at[b, head, rows], deltas.at[slot], do_bar.at[slot])
        return carry

      def drain(i, carry):
        plgpu.barrier_wait(free.at[lax.rem(i, i32(stages))])
        return carry

      lax.fori_loop(0, steps, load, ())
      lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, ())

    pl.when(wg < 2)(consumer)
    pl.when(wg == 2)(producer)

  pair = plgpu.Barrier(num_barriers=2)
  full = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
  operands = [q, k, v, grad_out, lse2, delta]
  operands += [] if segments is None else [segments[0], segments[3]]
  return compat.mosaic_gpu_kernel(
    body,
    out=[jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)],
    scratch=[
      *[hopper.swizzled((2, ROWS, H), dtype, interpret)] * 2,
      *[hopper.swizzled((stages, queries, H), dtype, interpret)] * 2,
      *[plgpu.SMEM((stages, queries), jnp.float32)] * 2,
      pair, pair, full, full,
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ],
    grid=(B * K * num_tiles,),
    grid_names=("cta",),
    num_threads=3,
    thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
    interpret=interpret,
  )(*operands)  # fmt: skip
