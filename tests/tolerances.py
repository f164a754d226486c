"""Every tolerance of the test suite: name -> (rtol, atol), each with its reason."""

import numpy as np

TOLERANCES = {
  # float32 sums in another order (blocks of rows, one device's shard): some 1e-6 at these sizes.
  "moe_f32": (1e-5, 1e-5),
  # bfloat16 keeps 8 bits; a row passes through three matmuls.
  "moe_bf16": (3e-2, 3e-2),
  # A float32 gradient along one direction against float64 finite differences: sums of some 1000
  # terms that partly cancel.
  "moe_slope": (1e-4, 1e-4),
  # Five Newton-Schulz steps in float32, batched (or sharded) against one matrix at a time: sums in
  # another order, amplified some 3.4x per step on small singular values; updates are up to 0.5.
  "muon_slice": (1e-4, 1e-4),
  # Elementwise float32 optimizer arithmetic against float64; updates are 1e-3 to 1e-1.
  "adamw_step": (1e-5, 1e-7),
  # A handful of float32 operations on values up to 2.
  "schedule": (1e-6, 1e-6),
  # 50 float32 steps of a running mean.
  "guard_mean": (1e-5, 1e-5),
}


def assert_close(actual, expected, name: str):
  """Asserts the two arrays agree within the tolerance of that name, and are both finite."""
  rtol, atol = TOLERANCES[name]
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.isfinite(actual).all() and np.isfinite(expected).all(), f"{name}: not finite"
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)
