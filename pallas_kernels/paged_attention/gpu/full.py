"""Decoding through a full layer in Triton: attention over every page, and the P best pages.

Two launches. `attend_kernel` splits the pages of all rows and KV heads, laid end to end, into equal
runs of consecutive pages, one run a program, so that rows of any lengths fill the GPU and none is
padded to the longest. A run that crosses from one (row, KV head) to the next leaves a partial
result of each: program p's part of pair i = b * K + kv is in slot p + i, which no other has.
`finish_kernel` merges a pair's slots, and selects its pages from the largest logit that each query
head has in each page, f32 [B,N,U]: all the scores that are ever stored.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.gpu import key_major
from pallas_kernels.block_sparse_attention.gpu.key_major import M_FLOOR, MASKED
from pallas_kernels.paged_attention.gpu.tile import attend, entry


@dataclasses.dataclass(frozen=True)
class FullConfig:
  """Launch sizes; the defaults are for an H100 of 132 multiprocessors."""

  programs: int = 264           # of attend_kernel: two a multiprocessor
  num_warps: int = 4
  num_stages: int = 4           # one more than the pages, keys and values, in shared memory
  finish_warps: int = 8


@triton.jit
def runs(length_ptr, B: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr):
  """lengths and pages i32 [ROWS] of the rows, the work before each row's end, pages of a run.

  Work is counted in pages of one KV head, in the order (row, KV head, page).
  """
  row = tl.arange(0, ROWS)
  lengths = tl.load(length_ptr + row, mask=row < B, other=0)
  pages = (lengths + 63) // 64
  ends = tl.cumsum(pages, 0) * K
  return lengths, pages, ends, (tl.max(ends, 0) + PROGRAMS - 1) // PROGRAMS


@triton.jit
def attend_kernel(q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, layer_ptr, acc_ptr, ml_ptr, max_ptr,
                  B: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                  M: tl.constexpr, H: tl.constexpr, E: tl.constexpr, U: tl.constexpr,
                  R: tl.constexpr, SCALE: tl.constexpr, PROGRAMS: tl.constexpr,
                  SELECT: tl.constexpr):
  """Partial acc f32 [slots,G,E], m and l f32 [slots,2,G]; page maxima f32 [B,N,U], all in log2."""
  program = tl.program_id(0)
  lengths, pages, ends, each = runs(length_ptr, B, ROWS, K, PROGRAMS)
  at = program * each
  stop = tl.minimum(at + each, tl.max(ends, 0))
  layer = tl.load(layer_ptr).to(tl.int64)
  g = tl.arange(0, M)
  h = tl.arange(0, H)
  e = tl.arange(0, E)
  while at < stop:
    b = tl.sum((ends <= at).to(tl.int32), 0)
    of_row = entry(pages, b, ROWS)
    length = entry(lengths, b, ROWS)
    done = at - entry(ends, b, ROWS) + of_row * K
    kv = done // of_row
    first = done - kv * of_row
    last = tl.minimum(first + stop - at, of_row)
    head = (b * K + kv) * G
    q = tl.load(q_ptr + (head + g)[:, None] * H + h[None, :], mask=(g < G)[:, None], other=0.0)
    m = tl.full([M], M_FLOOR, tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, E], tl.float32)
    number = tl.load(table_ptr + b * U + first)
    for page in range(first, last):
      base = ((layer * R + number) * K + kv) * 64
      # Loaded a step ahead: Triton halves its prefetch depth where a load waits for another.
      number = tl.load(table_ptr + b * U + tl.minimum(page + 1, last - 1))
      m, l, acc, top = attend(q, k_ptr + base * H, v_ptr + base * E, length - page * 64, m, l, acc,
                              H, E, SCALE)
      if SELECT:
        tl.store(max_ptr + (head + g) * U + page, top, mask=g < G)
    to = (program + b * K + kv) * G + g
    tl.store(acc_ptr + to[:, None] * E + e[None, :], acc, mask=(g < G)[:, None])
    tl.store(ml_ptr + to + (program + b * K + kv) * G, m, mask=g < G)
    tl.store(ml_ptr + to + (program + b * K + kv + 1) * G, l, mask=g < G)
    at += last - first


@triton.jit
def merged(ml_ptr, first, count, g, G: tl.constexpr, SLOTS: tl.constexpr):
  """m and l over `count` slots from `first`, of heads g i32 [M] of the group."""
  m = tl.full(g.shape, M_FLOOR, tl.float32)
  l = tl.zeros(g.shape, tl.float32)
  for begin in range(0, count, SLOTS):
    slot = begin + tl.arange(0, SLOTS)
    live = (slot < count)[:, None] & (g < G)[None, :]
    at = ((first + slot) * (2 * G))[:, None] + g[None, :]
    part_m = tl.load(ml_ptr + at, mask=live, other=MASKED)
    part_l = tl.load(ml_ptr + at + G, mask=live, other=0.0)
    m_new = tl.maximum(m, tl.max(part_m, 0))
    l = l * tl.exp2(m - m_new) + tl.sum(part_l * tl.exp2(part_m - m_new[None, :]), 0)
    m = m_new
  return m, l


@triton.jit
def finish_kernel(acc_ptr, ml_ptr, max_ptr, length_ptr, out_ptr, index_ptr,
                  B: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                  M: tl.constexpr, E: tl.constexpr, U: tl.constexpr, PROGRAMS: tl.constexpr,
                  P: tl.constexpr, PICKS: tl.constexpr, COLUMNS: tl.constexpr,
                  SLOTS: tl.constexpr):
  """The output of one query head, or with P, in the first B*K programs, the pages of one pair.

  PICKS, COLUMNS: P and U up to a power of two.
  """
  lengths, pages, ends, each = runs(length_ptr, B, ROWS, K, PROGRAMS)
  number = tl.program_id(0)
  if P > 0:
    number -= B * K
  selecting = number < 0
  pair = tl.where(selecting, number + B * K, number // G)
  g = number % G
  b = pair // K
  of_row = entry(pages, b, ROWS)
  begin = entry(ends, b, ROWS) - of_row * (K - pair % K)
  each = tl.maximum(each, 1)
  first = begin // each
  count = tl.where(of_row > 0, (begin + of_row - 1) // each - first + 1, 0)
  first += pair
  if selecting:
    most, total = merged(ml_ptr, first, count, tl.arange(0, M), G, SLOTS)
    lse = most + tl.log2(tl.where(total > 0, total, 1.0))
    page = tl.arange(0, COLUMNS)
    weight = tl.full([COLUMNS], float("-inf"), tl.float32)
    for head in range(G):
      top = tl.load(max_ptr + (pair * G + head) * U + page, mask=page < of_row,
                    other=float("-inf"))
      weight = tl.maximum(weight, top - entry(lse, head, M))
    taken = tl.zeros([COLUMNS], tl.int32)
    for _ in range(P):       # once all are taken the first is, again
      _, at = tl.max(weight, 0, return_indices=True, return_indices_tie_break_left=True)
      taken = tl.where(page == at, 1, taken)
      weight = tl.where(page == at, float("-inf"), weight)
    taken = tl.where(page < of_row, taken, 0)
    place = tl.cumsum(taken, 0) - 1
    tl.store(index_ptr + pair * P + place, page, mask=taken > 0)
    pick = tl.arange(0, PICKS)
    tl.store(index_ptr + pair * P + pick, tl.full([PICKS], -1, tl.int32),
             mask=(pick >= tl.sum(taken, 0)) & (pick < P))
  else:
    e = tl.arange(0, E)
    m, l = merged(ml_ptr, first, count, g + tl.arange(0, 1), G, SLOTS)
    acc = tl.zeros([E], tl.float32)
    for start in range(0, count, SLOTS):
      slot = start + tl.arange(0, SLOTS)
      live = slot < count
      part_m = tl.load(ml_ptr + (first + slot) * (2 * G) + g, mask=live, other=MASKED)
      part = tl.load(acc_ptr + ((first + slot) * G + g)[:, None] * E + e[None, :],
                     mask=live[:, None], other=0.0)
      acc += tl.sum(part * tl.exp2(part_m - tl.max(m, 0))[:, None], 0)
    acc = acc / tl.max(tl.where(l > 0, l, 1.0), 0)
    tl.store(out_ptr + (pair * G + g) * E + e, acc.to(out_ptr.dtype.element_ty))


def paged_oracle_attention(q, k_pages, v_pages, page_table, lengths, *, layer, num_blocks, scale,
                           config=None):
  """See `api.py`; sizes are checked in `op.py`. config: FullConfig, None for the default."""
  config = config or FullConfig()
  B, N, H = q.shape
  R, K = k_pages.shape[1:3]
  E, U, G = v_pages.shape[-1], page_table.shape[1], N // K
  up = triton.next_power_of_2
  slots = config.programs + B * K
  sizes = dict(B=B, ROWS=up(B), K=K, G=G, M=max(16, up(G)), E=E, U=U, PROGRAMS=config.programs)
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  acc, ml, maxima = key_major.call(
    attend_kernel, q, k_pages, v_pages, page_table, lengths, layer.reshape(1),
    out_shape=(f32(slots, G, E), f32(slots, 2, G), f32(B, N, U) if num_blocks else f32(1)),
    grid=(config.programs,), num_warps=config.num_warps, num_stages=config.num_stages,
    H=H, R=R, SCALE=float(scale), SELECT=num_blocks > 0, **sizes)
  out, block_indices = key_major.call(
    finish_kernel, acc, ml, maxima, lengths,
    out_shape=(jax.ShapeDtypeStruct((B, N, E), q.dtype),
               jax.ShapeDtypeStruct((B, K, max(num_blocks, 1)), jnp.int32)),
    grid=(B * N + (B * K if num_blocks else 0),), num_warps=config.finish_warps, num_stages=1,
    P=num_blocks, PICKS=up(max(num_blocks, 1)), COLUMNS=up(U), SLOTS=64, **sizes)
  return out, block_indices[:, :, :num_blocks]
