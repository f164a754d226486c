"""Runs the GPU's sparse kernels on CPU: Triton on its own interpreter, Mosaic in interpret mode.

`install` must come before the first import of a module with Triton kernels. The interpreter takes
tensors by duck typing, without torch; `_HostArray` is the little of that which it uses, over numpy.
Use float16: its matrix products do not know bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention.gpu import forward, forward_split


class _HostArray:
  """A numpy array that the interpreter takes for a tensor on the host."""

  def __init__(self, array):
    # Over-allocated, so that the data start on a 16-byte boundary as on a GPU.
    raw = np.empty(array.nbytes + 16, np.uint8)
    skip = -raw.ctypes.data % 16
    self.array = raw[skip:skip + array.nbytes].view(array.dtype).reshape(array.shape)
    self.array[...] = array
    self.dtype = "torch." + str(jnp.dtype(array.dtype))

  def data_ptr(self):
    return self.array.ctypes.data

  def untyped_storage(self):
    return self

  def cpu(self):
    return self

  def copy_(self, _):
    return self

  def new_empty(self, *_, **__):
    return self

  def set_(self, *_):
    return self

  def storage_offset(self):
    return 0

  def size(self):
    return self.array.shape

  def stride(self):
    return ()


def _poison(shape, dtype):
  out = np.zeros(shape, dtype)
  out[...] = np.nan if jnp.issubdtype(dtype, jnp.floating) else 2**30
  return out


def triton_call(*args, kernel, out_shape, grid, name="", num_warps=4, num_stages=1,
                input_output_aliases=None, **constants):
  """`jax_triton.triton_call` on the interpreter; outputs start poisoned with NaN."""
  del name, num_warps, num_stages
  shapes, tree = jax.tree.flatten(out_shape)

  aliases = {o: i for i, o in (input_output_aliases or {}).items()}
  is_array = [not isinstance(x, int) for x in args]

  def run(*arrays):
    rest = iter(arrays)
    inputs = [_HostArray(np.asarray(next(rest))) if a else x for a, x in zip(is_array, args)]
    outputs = [inputs[aliases[i]] if i in aliases else _HostArray(_poison(s.shape, s.dtype))
               for i, s in enumerate(shapes)]
    kernel[grid](*inputs, *outputs, **constants)
    return [x.array for x in outputs]

  arrays = [x for a, x in zip(is_array, args) if a]
  return jax.tree.unflatten(tree, jax.pure_callback(run, shapes, *arrays))


def install(patch):
  """Turns the interpreter on and puts it in jax-triton's place; `patch`: a pytest.MonkeyPatch."""
  patch.setenv("TRITON_INTERPRET", "1")
  from pallas_kernels.block_sparse_attention.gpu import key_major

  patch.setattr(key_major, "call",
                lambda kernel, *args, **kwargs: triton_call(*args, kernel=kernel, **kwargs))


def install_all(patch):
  """`install`, and the Mosaic kernels in JAX's GPU interpret mode."""
  install(patch)
  for module, name in ((forward, "tile_forward"), (forward_split, "split_forward")):
    patch.setattr(module, name, functools.partial(
      getattr(module, name), interpret=compat.InterpretGPUParams()))
