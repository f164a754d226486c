"""What both decoding kernels do with 64 keys and one KV head's queries."""

import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.gpu.key_major import LOG2E, MASKED


@triton.jit
def attend(q, k_ptr, v_ptr, seen, m, l, acc, H: tl.constexpr, E: tl.constexpr,
           SCALE: tl.constexpr):
  """Takes the first `seen` of 64 keys [64,H] and values [64,E] into m, l f32 [M], acc f32 [M,E].

  Scores and m are in log2. Returns m, l, acc and the largest scores f32 [M]. The other keys and
  values may hold anything: they are not read.
  """
  key = tl.arange(0, 64)
  live = key < seen
  keys = tl.load(k_ptr + key[:, None] * H + tl.arange(0, H)[None, :], mask=live[:, None], other=0.0)
  values = tl.load(v_ptr + key[:, None] * E + tl.arange(0, E)[None, :], mask=live[:, None],
                   other=0.0)
  scores = tl.dot(q, tl.trans(keys)) * (SCALE * LOG2E)
  scores = tl.where(live[None, :], scores, MASKED)
  top = tl.max(scores, 1)
  m_new = tl.maximum(m, top)
  alpha = tl.exp2(m - m_new)
  weights = tl.exp2(scores - m_new[:, None])
  l = l * alpha + tl.sum(weights, 1)
  acc = tl.dot(weights.to(values.dtype), values, acc * alpha[:, None])
  return m_new, l, acc, top


@triton.jit
def entry(values, at, SIZE: tl.constexpr):
  """values[at] of an i32 or f32 [SIZE]."""
  return tl.sum(tl.where(tl.arange(0, SIZE) == at, values, 0), 0)
