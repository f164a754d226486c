"""Eight simulated CPU devices, and programs compiled quickly, set before JAX makes its backend.

Most of the suite's time is XLA's and LLVM's. A test process that runs on CPU alone (`make test`)
turns LLVM's optimiser off and writes fused loops as LLVM IR at once, not by way of MLIR, whose
dialects are set up for every loop: half the compile time. Tests that start programs of their own
start them with XLA's defaults, which tests on an accelerator have too. There XLA tunes no products
of the references, which takes 14 s a program, and several processes may share the memory.
"""

import gc
import os

import pytest

if os.environ.get("JAX_PLATFORMS") == "cpu":
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
                             " --xla_llvm_disable_expensive_passes=true"
                             " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
else:
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")   # programs keep nothing in the user's cache

# Each process has a core to itself: threads of OpenBLAS would only wait for each other. Python
# collects garbage seldom: tracing makes millions of objects that stay, and each collection visits
# them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
gc.set_threshold(100_000, 50, 50)

import jax  # noqa: E402  (after the flags)

jax.config.update("jax_num_cpu_devices", 8)

# Modules whose tests share something slow to make, a trained run or a compiled program: one process
# runs all of a module's tests, so that it is made once (--dist loadgroup).
SHARED = {"test_checkpoint", "test_engine", "test_evals", "test_evaluate_cli", "test_recall",
          "test_sampling", "test_serve", "test_run_folder", "test_sharding", "test_training",
          "test_training_faults"}


@pytest.hookimpl(tryfirst=True)      # before xdist reads the marks
def pytest_collection_modifyitems(items):
  """Marks the tests of SHARED modules as groups."""
  for item in items:
    if item.path.stem in SHARED:
      item.add_marker(pytest.mark.xdist_group(item.path.stem))
