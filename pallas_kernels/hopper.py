"""Hopper building blocks of the Mosaic GPU kernels: layouts, swizzled tiles, matrix products."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

# A warpgroup's 64-row accumulator tile, and the vectors that go with its rows and columns.
TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLS = plgpu.Layout.WGMMA.reduce(0)
TILE_ROWS = 64


def swizzled(shape, dtype, interpret):
  """Shared memory for a TMA copy that feeds the tensor cores: 128-byte swizzle, 8-row tiles."""
  tiles = () if interpret else (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM(shape, dtype, transforms=tiles)


def rows_to_tile(x, shape):
  """Broadcasts a row vector over the columns of a tile."""
  return lax.broadcast_in_dim(x, shape, [0])


def cols_to_tile(x, shape):
  """Broadcasts a column vector over the rows of a tile."""
  return lax.broadcast_in_dim(x, shape, [1])


def zeros(shape, layout, interpret):
  """A float32 array of zeros in registers."""
  return compat.cast(jnp.zeros(shape, jnp.float32), layout, interpret)


def iota(shape, dimension, interpret):
  """i32 row (dimension 0) or column (1) numbers of a tile."""
  return compat.cast(lax.broadcasted_iota(jnp.int32, shape, dimension), TILE, interpret)


def products(operands, interpret, *, accs=None, transposed=False):
  """Returns [a @ b for (a, b) in operands], or [acc + a @ b ...], on one warpgroup.

  All products are in flight together and finished on return. GPU interpret mode knows neither
  register operands nor accumulators that start from a value, nor (in jax 0.10.2) transposed refs:
  there they are plain dots.

  Args:
    operands: pairs of a: shared-memory ref or registers [64, k], and b: shared-memory ref [k, n],
      or [n, k] where `transposed`.
    interpret: GPU interpret mode parameters, or None.
    accs: None, or f32 [64, n] in registers for each pair.
    transposed: multiply by the transpose of b.

  Returns:
    f32 [64, n] in registers for each pair.
  """
  if interpret:
    value = lambda x: x if isinstance(x, jax.Array) else x[...]
    outs = [jnp.dot(value(a), b[...].T if transposed else b[...],
                    preferred_element_type=jnp.float32) for a, b in operands]
    return outs if accs is None else [acc + out for acc, out in zip(accs, outs)]

  def issue(refs):
    for ref, (a, b) in zip(refs, operands):
      plgpu.wgmma(ref, a, b.transpose((1, 0)) if transposed else b)

  if accs is not None:
    return pl.run_state(issue)([plgpu.ACC.init(x) for x in accs])

  def from_zero(*refs):
    issue(refs)
    return [ref[...] for ref in refs]

  widths = [b.shape[0 if transposed else 1] for _, b in operands]
  return pl.run_scoped(from_zero, *[plgpu.ACC((TILE_ROWS, n), jnp.float32) for n in widths])
