"""Every tolerance of the test suite: name -> (rtol, atol), each with its reason."""

import numpy as np

TOLERANCES = {
  # float32 attention against float64 loops: logits of a few units carry 1e-6, and a row's
  # weighted sum of some 100 values as much again.
  "attention_f32": (1e-5, 1e-5),
  # Its gradients: sums of some 100 such products, which partly cancel.
  "attention_grad_f32": (3e-5, 3e-5),
  # Computed in float32 from the rounded inputs; only the result is rounded, to 8 or 11 bits.
  "attention_bf16": (4e-3, 1e-5),
  "attention_f16": (1e-3, 1e-5),
  # A gradient of bfloat16 inputs: the op's own rounding of the result is 8 bits, and the
  # cotangent enters in bfloat16 too.
  "attention_grad_bf16": (4e-3, 3e-5),
  # ||x - ref|| / ||ref|| where a matrix unit takes the softmax weights and their gradients in 8
  # bits: 2^-9 each for those, and for the rounded result.
  "mxu_bf16_norm": (0.0, 4e-3),
  # The same of the worst row, over the larger of its own norm and the typical row's: a row's error
  # is a sum of some 100 of the same roundings, the largest of some 1000 rows is 4 times the typical
  # one. A row that is wrong differs by about 1.
  "mxu_bf16_row": (0.0, 1.6e-2),
  # The same of a sum over some 100 rows of terms of both signs, each with that error and made of
  # a result rounded once more: the sum has half the norm of its terms.
  "mxu_bf16_cancelled_norm": (0.0, 8e-3),
  # float64 chain rule against central differences with step 1e-5: truncation 1e-10 x curvature,
  # rounding 1e-16 / 1e-5.
  "finite_difference_f64": (1e-7, 1e-8),
  # The same op in float32 by another route (one pass against cached, another chunk size).
  "attention_routes_f32": (1e-5, 2e-6),
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
  # 20,000 draws: 4 standard deviations of a frequency near 0.5.
  "draw_frequency": (0.0, 0.015),
  # Layer by layer or scanned: the same float32 operations, fused differently.
  "unrolled_f32": (1e-5, 1e-5),
  # Float32 softmax sums over some 50 keys against float64 loops.
  "coverage_f32": (1e-5, 1e-6),
  # A mean of float32 token losses against the same logits in float64.
  "heldout_f32": (1e-5, 1e-6),
  # Logits of a whole model in float32 by two routes: some 10 layers' sums, each in another order.
  "decode_f32": (1e-5, 1e-5),
  # One device against many: float32 sums over rows, heads or experts in another order.
  "sharded_f32": (1e-5, 1e-5),
  # One scalar, summed in another order.
  "same_sum_f32": (1e-6, 1e-6),
  # Gradients of the head in bfloat16: the cotangent and the result are each rounded to 8 bits.
  "head_grad_bf16": (4e-3, 0.0),
  # A weight's gradient in float32 with the same sums fused or split differently.
  "gradient_f32": (1e-5, 1e-5),
}


def assert_close(actual, expected, name: str):
  """Asserts the two arrays agree within the tolerance of that name, and are both finite."""
  rtol, atol = TOLERANCES[name]
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.isfinite(actual).all() and np.isfinite(expected).all(), f"{name}: not finite"
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)
