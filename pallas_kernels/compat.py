"""The differences between the two supported JAX versions, 0.10.2 and 0.11.2, in one place.

Everything that a kernel needs and that moved, was renamed or became private between them is
reached through this module, so that a version bump is one file to read.
"""

import inspect

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax._src.pallas.mosaic_gpu.interpret import params as _interpret_params

JAX_VERSION = tuple(int(x) for x in jax.__version__.split(".")[:3])

# 0.10.2 has the class but does not export it.
InterpretGPUParams = getattr(plgpu, "InterpretGPUParams", _interpret_params.InterpretGPUParams)


def tpu_interpreter():
  """The private module of TPU interpret mode: it makes a `RaceDetectionState` for each kernel run,
  whose `races_found` has no public name yet.
  """
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  return interpret_pallas_call


def cast(x, layout, interpret=None):
  """`layout_cast`, which GPU interpret mode of 0.10.2 does not support."""
  return x if interpret is not None else plgpu.layout_cast(x, layout)


def load(ref, layout, interpret=None, optimized=False):
  """Reads a whole ref into registers as `layout`.

  optimized: raise where there is no fast path; False: plain loads there.
  """
  if interpret is not None:
    return ref[...]
  if JAX_VERSION >= (0, 11, 0):
    return plgpu.load(ref, layout=layout, optimized=optimized)
  return plgpu.load(ref, (), layout=layout, optimized=optimized)


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


_CUDNN_BACKWARD_ARGUMENTS = [
  *("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"),
  *("page_table_k", "page_table_v", "activation", "fwd_output", "grad_output"),
  *("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout"),
  "sliding_window_length",
]


def cudnn_attention_backward():
  """(primitive, causal mask type): JAX's private cuDNN attention backward, after a look at it.

  Raises:
    NotImplementedError: it is gone, or takes other arguments than in 0.10.2 and 0.11.2.
  """
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  impl = getattr(cudnn, "_dot_product_attention_bwd_impl", None)
  primitive = getattr(cudnn, "_dot_product_attention_bwd_p_wrapper", None)
  found = [] if impl is None else list(inspect.signature(impl).parameters)
  if primitive is None or found != _CUDNN_BACKWARD_ARGUMENTS:
    raise NotImplementedError(
      f"cuDNN attention backward: jax {jax.__version__} takes {found}, wanted "
      f"{_CUDNN_BACKWARD_ARGUMENTS}; adapt pallas_kernels/compat.py"
    )
  return primitive, cudnn.MaskType.CAUSAL
