"""Decoding through a sparse layer in Triton: selected pages, window ring, sinks and gates.

With enough (row, KV head) pairs to fill the GPU one launch does all, a program a pair. With fewer,
a pair's pages and ring are split over several programs, and a second launch merges their parts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.gpu import key_major
from pallas_kernels.block_sparse_attention.gpu.key_major import LOG2E, M_FLOOR, MASKED
from pallas_kernels.paged_attention.gpu.tile import attend, entry


@dataclasses.dataclass(frozen=True)
class SparseConfig:
  """Launch sizes; the defaults are for an H100 of 132 multiprocessors."""

  tiles: int | None = None      # pages, or 64 slots of the ring, of a program; None: by the pairs
  num_warps: int = 4
  num_stages: int = 4
  merge_warps: int = 4

  def tiles_of(self, pairs, total):
    """Tiles of a program, of `total`: all, or so few that some 132 programs run."""
    if self.tiles is not None:
      return min(self.tiles, total)
    if pairs >= 100:
      return total
    return max(1, pairs * total // 132)


@triton.jit
def with_sink(m, l, acc, sink_ptr, at, live, SINKS: tl.constexpr):
  """The softmax's output f32 [rows,E] from m, l f32 [rows], acc f32 [rows,E]."""
  scale = tl.full(m.shape, 1.0, tl.float32)
  if SINKS:
    sink = tl.load(sink_ptr + at, mask=live, other=0.0) * LOG2E
    m_new = tl.maximum(m, sink)
    scale = tl.exp2(m - m_new)
    l = l * scale + tl.exp2(sink - m_new)
  return acc * (scale / tl.where(l > 0, l, 1.0))[:, None]


@triton.jit
def gated(out, gate_ptr, at, live, E: tl.constexpr, WIDTH: tl.constexpr):
  """out f32 [rows,E] times the gates of (row, head) `at`: WIDTH a head, 0 for no gate."""
  if WIDTH == 1:
    out *= tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)[:, None]
  if WIDTH > 1:
    out *= tl.load(gate_ptr + at[:, None] * E + tl.arange(0, E)[None, :], mask=live[:, None],
                   other=0.0).to(tl.float32)
  return out


@triton.jit
def attend_kernel(q_ptr, k_ptr, v_ptr, index_ptr, table_ptr, length_ptr, k_ring_ptr, v_ring_ptr,
                  gate_sparse_ptr, gate_local_ptr, sink_sparse_ptr, sink_local_ptr, layer_ptr,
                  ring_layer_ptr, out_ptr, ml_ptr,
                  B: tl.constexpr, K: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
                  H: tl.constexpr, E: tl.constexpr, U: tl.constexpr, R: tl.constexpr,
                  P: tl.constexpr, PICKS: tl.constexpr, W: tl.constexpr, SCALE: tl.constexpr,
                  TILES: tl.constexpr, LOCAL: tl.constexpr, SPLITS: tl.constexpr,
                  SINKS_SPARSE: tl.constexpr, SINKS_LOCAL: tl.constexpr,
                  GATE_SPARSE: tl.constexpr, GATE_LOCAL: tl.constexpr):
  """out [B,N,E]; or, with SPLITS > 1, parts f32 [B*K,SPLITS,G,E], and m and l [B*K,SPLITS,2,G].

  The first LOCAL splits are the ring's. P = 0: no sparse branch; W = 0: no local branch.
  """
  split = tl.program_id(0)
  pair = tl.program_id(1)
  b = pair // K
  kv = pair % K
  g = tl.arange(0, M)
  live = g < G
  head = pair * G + g
  length = tl.load(length_ptr + b)
  q = tl.load(q_ptr + head[:, None] * H + tl.arange(0, H)[None, :], mask=live[:, None], other=0.0)
  if P > 0:
    layer = tl.load(layer_ptr).to(tl.int64)
    pick = tl.arange(0, PICKS)
    blocks = tl.load(index_ptr + pair * P + pick, mask=pick < P, other=-1)
    seen = tl.where(blocks < 0, 0, length - blocks * 64)
    pages = tl.load(table_ptr + b * U + blocks, mask=seen > 0, other=0)
  m = tl.full([M], M_FLOOR, tl.float32)
  l = tl.zeros([M], tl.float32)
  acc = tl.zeros([M, E], tl.float32)
  out = tl.zeros([M, E], tl.float32)
  if W > 0:
    ring = (tl.load(ring_layer_ptr).to(tl.int64) * (B * K) + pair) * W
    begin = 0
    end = (W + 63) // 64
    if SPLITS > 1:
      begin = split * TILES
      end = tl.where(split < LOCAL, tl.minimum(begin + TILES, end), begin)
    for i in range(begin, end):
      at = ring + i * 64
      m, l, acc, _ = attend(q, k_ring_ptr + at * H, v_ring_ptr + at * E,
                            tl.minimum(length, W) - i * 64, m, l, acc, H, E, SCALE)
    if SPLITS == 1:
      out = gated(with_sink(m, l, acc, sink_local_ptr, kv * G + g, live, SINKS_LOCAL),
                  gate_local_ptr, head, live, E, GATE_LOCAL)
      m = tl.full([M], M_FLOOR, tl.float32)
      l = tl.zeros([M], tl.float32)
      acc = tl.zeros([M, E], tl.float32)
  if P > 0:
    begin = 0
    end = P
    if SPLITS > 1:
      begin = tl.maximum(split - LOCAL, 0) * TILES
      end = tl.where(split < LOCAL, 0, tl.minimum(begin + TILES, P))
    for i in range(begin, end):
      base = ((layer * R + entry(pages, i, PICKS)) * K + kv) * 64
      m, l, acc, _ = attend(q, k_ptr + base * H, v_ptr + base * E, entry(seen, i, PICKS), m, l,
                            acc, H, E, SCALE)
    if SPLITS == 1:
      out += gated(with_sink(m, l, acc, sink_sparse_ptr, kv * G + g, live, SINKS_SPARSE),
                   gate_sparse_ptr, head, live, E, GATE_SPARSE)
  e = tl.arange(0, E)
  if SPLITS == 1:
    tl.store(out_ptr + head[:, None] * E + e[None, :], out.to(out_ptr.dtype.element_ty),
             mask=live[:, None])
  else:
    part = (pair * SPLITS + split) * G
    tl.store(out_ptr + (part + g)[:, None] * E + e[None, :], acc, mask=live[:, None])
    tl.store(ml_ptr + 2 * part + g, m, mask=live)
    tl.store(ml_ptr + 2 * part + G + g, l, mask=live)


@triton.jit
def _merged(acc_ptr, ml_ptr, pair, g, first, count, G: tl.constexpr, E: tl.constexpr,
            SPLITS: tl.constexpr, SLOTS: tl.constexpr):
  """m, l f32 [1] and acc f32 [1,E] of head g's parts first..first+count-1."""
  slot = tl.arange(0, SLOTS)
  live = (slot < count)[None, :]
  part = (pair * SPLITS + first + slot)[None, :] * G
  part_m = tl.load(ml_ptr + 2 * part + g, mask=live, other=MASKED)
  part_l = tl.load(ml_ptr + 2 * part + G + g, mask=live, other=0.0)
  acc = tl.load(acc_ptr + (part + g)[:, :, None] * E + tl.arange(0, E)[None, None, :],
                mask=live[:, :, None], other=0.0)
  m = tl.maximum(tl.max(part_m, 1), M_FLOOR)
  weight = tl.exp2(part_m - m[:, None])
  return m, tl.sum(part_l * weight, 1), tl.sum(acc * weight[:, :, None], 1)


@triton.jit
def merge_kernel(acc_ptr, ml_ptr, gate_sparse_ptr, gate_local_ptr, sink_sparse_ptr, sink_local_ptr,
                 out_ptr, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
                 LOCAL: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
                 SINKS_SPARSE: tl.constexpr, SINKS_LOCAL: tl.constexpr,
                 GATE_SPARSE: tl.constexpr, GATE_LOCAL: tl.constexpr):
  """out [B,N,E] of one query head from its parts. SLOTS: SPLITS up to a power of two."""
  head = tl.program_id(0) + tl.arange(0, 1)
  live = head >= 0
  pair = tl.program_id(0) // G
  g = tl.program_id(0) % G
  out = tl.zeros([1, E], tl.float32)
  if LOCAL > 0:
    m, l, acc = _merged(acc_ptr, ml_ptr, pair, g, 0, LOCAL, G, E, SPLITS, SLOTS)
    out += gated(with_sink(m, l, acc, sink_local_ptr, head % (K * G), live, SINKS_LOCAL),
                 gate_local_ptr, head, live, E, GATE_LOCAL)
  if SPLITS > LOCAL:
    m, l, acc = _merged(acc_ptr, ml_ptr, pair, g, LOCAL, SPLITS - LOCAL, G, E, SPLITS, SLOTS)
    out += gated(with_sink(m, l, acc, sink_sparse_ptr, head % (K * G), live, SINKS_SPARSE),
                 gate_sparse_ptr, head, live, E, GATE_SPARSE)
  tl.store(out_ptr + head[:, None] * E + tl.arange(0, E)[None, :],
           out.to(out_ptr.dtype.element_ty))


def paged_sparse_layer_attention(q, k_pages, v_pages, block_indices, page_table, lengths, k_ring,
                                 v_ring, gate_sparse, gate_local, *, sinks_sparse, sinks_local,
                                 layer, ring_layer, scale, config=None):
  """See `api.py`; sizes are checked in `op.py`. config: SparseConfig, None for the default."""
  config = config or SparseConfig()
  B, N, H = q.shape
  sparse, local = block_indices is not None, k_ring is not None
  K = (k_pages if sparse else k_ring).shape[2]
  E = (v_pages if sparse else v_ring).shape[-1]
  P, W, G = block_indices.shape[2] if sparse else 0, k_ring.shape[3] if local else 0, N // K
  up = triton.next_power_of_2
  ring_tiles = -(-W // 64)
  tiles = config.tiles_of(B * K, P + ring_tiles)
  local_splits = -(-ring_tiles // tiles)
  splits = local_splits + -(-P // tiles) if tiles < P + ring_tiles else 1
  none, one = jnp.zeros((1,), q.dtype), jnp.zeros((1,), jnp.int32)
  given = lambda x, otherwise=none: otherwise if x is None else x
  scalar = lambda x: one if x is None else x.reshape(1)
  width = lambda gate: 0 if gate is None else gate.shape[-1]
  branches = (given(gate_sparse), given(gate_local), given(sinks_sparse), given(sinks_local))
  constants = dict(
    K=K, G=G, E=E, LOCAL=local_splits, SPLITS=splits, SINKS_SPARSE=sinks_sparse is not None,
    SINKS_LOCAL=sinks_local is not None, GATE_SPARSE=width(gate_sparse),
    GATE_LOCAL=width(gate_local))
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  answer = jax.ShapeDtypeStruct((B, N, E), q.dtype)
  parts = answer, f32(1)
  if splits > 1:
    parts = f32(B * K, splits, G, E), f32(B * K, splits, 2, G)
  acc, ml = key_major.call(
    attend_kernel, q, given(k_pages), given(v_pages), given(block_indices, one),
    given(page_table, one), lengths, given(k_ring), given(v_ring), *branches, scalar(layer),
    scalar(ring_layer), out_shape=parts, grid=(splits, B * K), num_warps=config.num_warps,
    num_stages=config.num_stages, B=B, M=max(16, up(G)), H=H,
    U=page_table.shape[1] if sparse else 0, R=k_pages.shape[1] if sparse else 0, P=P,
    PICKS=up(max(P, 1)), W=W, SCALE=float(scale), TILES=tiles, **constants)
  if splits == 1:
    return acc
  return key_major.call(
    merge_kernel, acc, ml, *branches, out_shape=answer, grid=(B * N,),
    num_warps=config.merge_warps, num_stages=1, SLOTS=up(splits), **constants)
