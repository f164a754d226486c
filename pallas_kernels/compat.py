"""The differences between the two supported JAX versions (0.10.2 and 0.11.2), in one place.

Everything that a kernel needs and that moved, was renamed or became private between them is
reached through this module, so that a version bump is one file to read.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax._src.pallas.mosaic_gpu.interpret import params as _interpret_params

JAX_VERSION = tuple(int(x) for x in jax.__version__.split(".")[:3])

# 0.10.2 has the class but does not export it.
InterpretGPUParams = getattr(plgpu, "InterpretGPUParams", _interpret_params.InterpretGPUParams)


def cast(x, layout, interpret=None):
  """`layout_cast`, which GPU interpret mode of 0.10.2 does not know."""
  return x if interpret is not None else plgpu.layout_cast(x, layout)


def load(ref, layout, interpret=None):
  """Reads a whole ref into registers as `layout`, by plain loads where no fast path exists."""
  if interpret is not None:
    return ref[...]
  if JAX_VERSION >= (0, 11, 0):
    return plgpu.load(ref, layout=layout, optimized=False)
  return plgpu.load(ref, (), layout=layout, optimized=False)


def mosaic_gpu_kernel(body, *, out, scratch, interpret=None, **kwargs):
  """`plgpu.kernel` with Lane semantics pinned: the default became Warpgroup in 0.11.0."""
  options = {"approx_math": True, "lowering_semantics": plgpu.LoweringSemantics.Lane}
  options |= kwargs.pop("compiler_options", {})
  if interpret is not None:
    kwargs["interpret"] = interpret
  return plgpu.kernel(
    body,
    out_type=out,
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(**options),
    **kwargs,
  )
