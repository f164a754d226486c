"""Sliding-window attention on NVIDIA GPUs: block-sparse attention whose picks are the window.

A tile's list is its own block and the few before it, all in the union kernel; the backward is
the key-major kernels over the tokens that can see a block. Both mask the window key by key.
"""

import functools

from pallas_kernels import checks
from pallas_kernels.block_sparse_attention.gpu import forward as mosaic_gpu
from pallas_kernels.block_sparse_attention.gpu import op as gpu
from pallas_kernels.block_sparse_attention.gpu import plan as index_plan
from pallas_kernels.checks import NotCoveredError


def check_window(op, window):
  """Raises NotCoveredError for a window that does not fit 16 picks."""
  if window > 961:
    raise NotCoveredError(f"{op} on GPU: got window {window}, want at most 961")


def window_plan(batch, kv_heads, window, tokens, group):
  """The plan of a window, at padded sizes: for the union kernel and the key-major backward."""
  config = index_plan.PlanConfig(
    tile_tokens=mosaic_gpu.tile_tokens(group), hot_threshold=1,
    list_multiple=mosaic_gpu.UnionConfig().blocks_per_step)
  return index_plan.window_plan(batch, kv_heads, tokens, window, config)


def sliding_window_attention(q, k, v, *, window=128, sinks=None, query_offset=0, segment_ids=None,
    kv_segment_ids=None, scale=None):
  """The op of `api.py` on an NVIDIA GPU of compute capability 9.0; dtypes, H and G as there.

  Raises:
    NotCoveredError: window over 961 (15 blocks and the query's own), or what
      `block_sparse_attention` does not take.
  """
  checks.queries_are_keys("sliding_window_attention", query_offset, segment_ids, kv_segment_ids,
                          (q.shape[1], k.shape[1]))
  op = "sliding_window_attention"
  check_window(op, window)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return gpu.attend(
    op, q, k, v, functools.partial(window_plan, q.shape[0], k.shape[2], window),
    sinks=sinks, segment_ids=segment_ids, scale=scale, window=window)
