"""Differences between the supported jax versions (0.10.2 and 0.11.2), in one place."""

from jax.experimental.pallas import mosaic_gpu as plgpu


def gpu_interpret_params():
  """Parameters that make a Mosaic GPU kernel run in GPU interpret mode on CPU.

  jax 0.10.2 has the class but does not export it.
  """
  if hasattr(plgpu, "InterpretGPUParams"):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params
  return params.InterpretGPUParams()
