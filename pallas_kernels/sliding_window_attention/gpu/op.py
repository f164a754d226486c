"""Sliding-window attention on NVIDIA GPUs: block-sparse attention to the blocks of the window.

A tile's list is its own blocks and the few before them, all in the tile kernel; the backward is
the key-major kernel over the tokens that can see a block. Both mask the window key by key.
"""

import functools

from pallas_kernels.block_sparse_attention.gpu import forward as tile_kernel
from pallas_kernels.block_sparse_attention.gpu import op as block_sparse
from pallas_kernels.block_sparse_attention.gpu import plan as selection_plan
from pallas_kernels.block_sparse_attention.gpu.visibility import visibility
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.gpu_padding import BLOCK

MAX_WINDOW = BLOCK * (block_sparse.MAX_SELECTED - 1) + 1


def check_window(op, window):
  """Raises NotCoveredError for a window that does not fit 32 blocks."""
  if window > MAX_WINDOW:
    raise NotCoveredError(f"{op} on GPU: got window {window}, want at most {MAX_WINDOW}")


def plan_config(all_rare, group):
  """The config of a window's plan: for the tile kernel, or for Triton alone (`all_rare`)."""
  tile = tile_kernel.tile_tokens(group)
  return selection_plan.PlanConfig(
    tile_tokens=tile, hot_threshold=tile + 1 if all_rare else 1,
    list_multiple=tile_kernel.BLOCKS_PER_STEP)


def sliding_window_attention(q, k, v, *, window, sinks, query_offset, segment_ids, kv_segment_ids,
                             scale, all_rare=False):
  """The op of `api.py` on an NVIDIA GPU of compute capability 9.0; dtypes, H and G as there.

  `all_rare`: by the Triton kernels alone.

  Raises:
    NotCoveredError: window over 1985 (31 blocks and the query's own), or what
      `block_sparse_attention` does not take.
  """
  op = "sliding_window_attention"
  check_window(op, window)
  visible = visibility(q.shape[1], k.shape[1], query_offset, segment_ids, kv_segment_ids, window)
  return block_sparse.attend(
    op, q, k, v, functools.partial(plan_config, all_rare), sinks=sinks, visible=visible,
    scale=scale)


def sliding_window_attention_triton(*args, **options):
  """`sliding_window_attention` by the Triton kernels alone."""
  return sliding_window_attention(*args, **options, all_rare=True)
