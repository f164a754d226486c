"""TPU generations: their facts, compiling for them on a machine that has none, interpret mode.

`libtpu` (requirements-dev.txt) holds the TPU compiler; it compiles on a CPU machine, Pallas
kernels included, and fails when a kernel overflows VMEM or a program overflows HBM.
"""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Generation:
  """What one device (as JAX counts them) of a TPU generation has.

  Attributes:
    name: "v5e".
    topology: the smallest slice that libtpu describes.
    vmem_bytes: per core.
    hbm_bytes: per device.
    hbm_bytes_per_second: per device.
    cores: TensorCores per device.
    clock_hz: bundles a core issues per second.
    flops_per_bundle: multiply-adds x 2 of all matrix units of a core per bundle, bf16. v6e's
      256 x 256 units take two rows a bundle.

  Sources: jax's own table (`pltpu.get_tpu_info`, which a test holds this one to); clock_hz is
  its peak FLOP/s over `flops_per_bundle`.
  """

  name: str
  topology: str
  vmem_bytes: int
  hbm_bytes: int
  hbm_bytes_per_second: float
  cores: int
  clock_hz: float
  flops_per_bundle: int


GENERATIONS = {g.name: g for g in (
  Generation("v4", "v4:2x2x1", 16 << 20, 17_200_000_000, 0.615e12, 1, 1.049e9, 2**17),
  Generation("v5e", "v5e:2x2", 128 << 20, 17_200_000_000, 0.82e12, 1, 1.503e9, 2**17),
  Generation("v5p", "v5p:2x2x1", 64 << 20, 103_000_000_000, 2.46e12, 2, 1.751e9, 2**17),
  Generation("v6e", "v6e:2x2", 128 << 20, 34_400_000_000, 1.64e12, 1, 1.755e9, 2**19),
)}

# Without these libtpu asks the cloud's metadata server for the machine, warns if none answers,
# and refuses to be loaded by two processes.
COMPILER_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
}


def dot(a, b, contract):
  """f32 matmul of two 2-D arrays inside a kernel, over axis contract[0] of `a` and [1] of `b`.

  float32 is multiplied in full: the matrix units' default would round it to bfloat16.
  """
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def interpret_params(cores=1):
  """TPU interpret mode on CPU at its strictest: NaN memory, no stray read, race detection.

  cores: TensorCores of the simulated device, among which parallel grid axes are divided.
  """
  return pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise",
                               detect_races=True, num_cores_or_threads=cores)


def vmem_bytes():
  """VMEM of a core of the TPU that is compiled for; v5p's, the smallest, in interpret mode."""
  try:
    return pltpu.get_tpu_info().vmem_capacity_bytes
  except ValueError:                    # "Unsupported TPU device kind: cpu"
    return GENERATIONS["v5p"].vmem_bytes


def vmem_limit():
  """Bytes of VMEM a kernel may ask for; the rest is the compiler's own scratch."""
  return vmem_bytes() * 15 // 16


def topology(name):
  """libtpu's description of a slice, such as "v5p:2x2x1"; its `devices` are absent.

  Raises:
    RuntimeError: libtpu is not installed, or has no such slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise RuntimeError("compiling for TPU needs libtpu; pip install -r requirements-dev.txt")
  if jax.config.jax_platforms == "cpu":      # on a TPU VM the defaults are right
    for variable, value in COMPILER_ENVIRONMENT.items():
      os.environ.setdefault(variable, value)
  from jax.experimental import topologies
  return topologies.get_topology_desc(platform="tpu", topology_name=name)


def mesh(generation, *axes):
  """A mesh of the described, absent devices of a generation.

  Args:
    generation: a key of `GENERATIONS`.
    axes: (name, size) pairs; none gives one device on axis "x".

  Raises:
    RuntimeError: libtpu is not installed.
  """
  devices = topology(GENERATIONS[generation].topology).devices
  axes = axes or (("x", 1),)
  shape = [size for _, size in axes]
  devices = np.asarray(devices[:int(np.prod(shape))]).reshape(shape)
  return jax.sharding.Mesh(devices, [name for name, _ in axes])


def lower_for(generation, fn, *abstract_args):
  """`jax.jit(fn)` of one device, traced and lowered for a TPU generation.

  Args:
    generation: a key of `GENERATIONS`.
    fn: the function; inside it `pltpu.get_tpu_info()` describes that generation.
    abstract_args: pytrees of arrays or `jax.ShapeDtypeStruct`.
  """
  one = mesh(generation)
  place = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract_args)
  with jax.sharding.use_abstract_mesh(one.abstract_mesh):
    return jax.jit(fn, out_shardings=place).lower(*args)


def compile_for(generation, fn, *abstract_args):
  """The compiled executable of `lower_for`; its `memory_analysis()` has the bytes per device.

  Raises:
    jax.errors.JaxRuntimeError: VMEM or HBM overflow, or what the TPU compiler cannot do.
    RuntimeError: libtpu is not installed.
  """
  return lower_for(generation, fn, *abstract_args).compile()
