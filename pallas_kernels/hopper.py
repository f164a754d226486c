"""Hopper building blocks of the Mosaic GPU kernels: layouts, named barriers, swizzled tiles."""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# A warpgroup's 64-row accumulator tile, and the vectors that go with its rows and columns.
TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLS = plgpu.Layout.WGMMA.reduce(0)


def swizzled(shape, dtype, interpret):
  """Shared memory for a TMA copy that feeds the tensor cores: 128-byte swizzle, 8-row tiles."""
  tiles = () if interpret else (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM(shape, dtype, transforms=tiles)


def _named_barrier(operation, barrier_id, num_threads):
  @plgpu.inline_mgpu()
  def bar(_):
    llvm.inline_asm(
      ir.Type.parse("!llvm.void"),
      [],
      f"bar.{operation} {barrier_id}, {num_threads};",
      "",
      has_side_effects=True,
    )

  bar()


def named_barrier_sync(barrier_id: int, num_threads: int):
  """Waits until `num_threads` threads arrived. Mosaic uses the low ids itself: take 8 and up."""
  _named_barrier("sync", barrier_id, num_threads)


def named_barrier_arrive(barrier_id: int, num_threads: int):
  """Counts this warpgroup's threads as arrived, without waiting."""
  _named_barrier("arrive", barrier_id, num_threads)


def rows_to_tile(x, shape):
  """Broadcasts a row vector over the columns of a tile."""
  return lax.broadcast_in_dim(x, shape, [0])
