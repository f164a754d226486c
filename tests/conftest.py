"""Eight simulated CPU devices, and programs compiled quickly, set before JAX makes its backend.

Most of the suite's time is LLVM's. Its optimiser is turned off in a test process that runs on CPU
alone (`make test`): what XLA fuses and splits stays as it is. Tests that start programs of their
own start them with it on, and so is it for tests on an accelerator. There XLA tunes no products of
the references, which takes 14 s a program, and several processes may share the memory.
"""

import os

if os.environ.get("JAX_PLATFORMS") == "cpu":
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
                             " --xla_llvm_disable_expensive_passes=true")
else:
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402  (after the flags)

jax.config.update("jax_num_cpu_devices", 8)
