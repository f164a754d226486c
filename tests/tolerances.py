"""Every tolerance of the test suite, each with its reason.

`assert_close` compares element by element; `assert_rows_close` compares attention outputs and
gradients row by row, so that one wrong row among thousands fails.
"""

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
  # The GPU's sparse kernels against float32, ||x - ref|| / ||ref||: operands, softmax weights and
  # stored partial outputs have 8 (bf16) or 11 (f16) bits, each product's error is independent, and
  # norms average them.
  "gpu_sparse_bfloat16_norm": (0.0, 5e-3),
  "gpu_sparse_float16_norm": (0.0, 7e-4),
  # Their gradients: the cotangent and dQ's parts are rounded too, and dS has the error of P and dP.
  "gpu_sparse_grad_bfloat16_norm": (0.0, 1e-2),
  "gpu_sparse_grad_float16_norm": (0.0, 1.4e-3),
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
  # Channels turned by float32 angles of up to 902 radians: an angle carries 3e-5.
  "rotary_f32": (1e-5, 2e-4),
  # One device against many: float32 sums over rows, heads or experts in another order.
  "sharded_f32": (1e-5, 1e-5),
  # One scalar, summed in another order.
  "same_sum_f32": (1e-6, 1e-6),
  # Gradients of the head in bfloat16: the cotangent and the result are each rounded to 8 bits.
  "head_grad_bf16": (4e-3, 0.0),
  # A weight's gradient in float32 with the same sums fused or split differently.
  "gradient_f32": (1e-5, 1e-5),
}

# name -> (norm, row, leaf), what `assert_rows_close` allows: the whole leaf's relative error in the
# 2-norm; and in each row a largest error of `row` times the row's own largest value plus `leaf`
# times the leaf's. `leaf` covers rows that cancel: dq of a query that sees few keys.
ROW_TOLERANCES = {
  # float32 sums of some 100 to 1000 terms, 6e-8 each, against float64.
  "attention_rows_f32": (3e-6, 1e-5, 3e-6),
  # The same products of softmax weights with values of both signs, which partly cancel.
  "attention_grad_rows_f32": (5e-6, 2e-5, 1e-5),
  # Float32 throughout, one rounding of the result to 8 bits: 2^-9 of each element.
  "attention_rows_rounded_bf16": (2.5e-3, 4e-3, 1e-5),
  # The same to 11 bits.
  "attention_rows_rounded_f16": (3.2e-4, 5e-4, 1e-5),
  # Matrix units take the softmax weights in 8 bits too. Emulated at 70 to 2,000 tokens and head
  # dims 16 to 128: norm 2.0e-3, rows 5.2e-3.
  "attention_rows_bf16": (4e-3, 1e-2, 1e-3),
  # Three such roundings (weights or their gradients, the saved output, the result). Emulated: norm
  # 2.6e-3, rows 6e-3, and 2.3e-3 of the leaf's maximum in dq rows that cancel.
  "attention_grad_rows_bf16": (5e-3, 1e-2, 5e-3),
  # float16 matrix units: 11 bits instead of 8, an eighth of the error.
  "attention_rows_f16": (5e-4, 1.3e-3, 1.3e-4),
  "attention_grad_rows_f16": (6.3e-4, 1.3e-3, 6.3e-4),
  # The same over 100 random shapes, some of few tokens, where dq of a query with 2 or 3 keys is
  # a difference of large terms: the saved output's rounding alone (delta = out . dout) gives 6.6e-4
  # of the leaf's maximum, emulated in float32 with float16 results at 72 tokens.
  "attention_grad_rows_any_shape_bf16": (5e-3, 1e-2, 1e-2),
  "attention_grad_rows_any_shape_f16": (6.3e-4, 1.3e-3, 1.3e-3),
}


def assert_rows_close(actual, expected, name: str, size: float = 0.0):
  """Asserts that a leaf agrees in norm, and that its worst row does.

  A row is the last axis. Both limits scale with the leaf, so that a gradient of size 1e-3 is held
  as tightly as one of size 1.

  Args:
    actual: [...,H] of any float dtype.
    expected: the same shape, computed in float64 or float32.
    name: of a row of `ROW_TOLERANCES`.
    size: a least magnitude of the leaf's elements, for a leaf whose terms cancel to (nearly) zero:
      that of the terms.

  Raises:
    AssertionError: names the worst row, its error and its limit.
  """
  norm_limit, row_limit, leaf_limit = ROW_TOLERANCES[name]
  assert np.shape(actual) == np.shape(expected), \
    f"{name}: shapes {np.shape(actual)} and {np.shape(expected)}"
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.isfinite(actual).all() and np.isfinite(expected).all(), f"{name}: not finite"
  error = np.abs(actual - expected)
  norm, whole = np.linalg.norm(error), np.linalg.norm(expected)
  whole = max(whole, size * error.size ** 0.5)
  assert norm <= norm_limit * whole, \
    f"{name}: norm of the error {norm:.3g}; wanted at most {norm_limit:.3g} of {whole:.3g}"
  magnitude = np.abs(expected)
  limit = (row_limit * magnitude.max(axis=-1)
           + leaf_limit * max(magnitude.max(initial=0.0), size))
  excess = error.max(axis=-1) - limit
  worst = np.unravel_index(excess.argmax(), excess.shape) if excess.ndim else ()
  assert excess[worst] <= 0, \
    (f"{name}: row {list(map(int, worst))} is off by {error.max(axis=-1)[worst]:.3g}; wanted at "
     f"most {limit[worst]:.3g} (the row's largest value {magnitude.max(axis=-1)[worst]:.3g}, the "
     f"leaf's {magnitude.max():.3g}); {int((excess > 0).sum())} of {excess.size} rows are off")


# How much larger than the norm's tolerance one row's error may be, in units of its norm or of the
# root mean square of the rows' norms, whichever is larger. A row's error is a sum over its own few
# keys, presumably 2 to 4 times the mean in the worst of 10,000 rows (not measured); a wrong row
# has an error of 1 and more, over 100 (bf16) times the mean.
ROW_FACTOR = 8.0


def assert_norm_close(actual, expected, name: str):
  """Asserts ||x - ref|| / ||ref|| for the whole array and for each row along its last axis."""
  limit = TOLERANCES[name][1]
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.isfinite(actual).all() and np.isfinite(expected).all(), f"{name}: not finite"
  error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)
  assert error <= limit, f"{name}: norm of the error {error:.2e}, want at most {limit:.1e}"
  sizes = np.linalg.norm(np.atleast_1d(expected), axis=-1)
  scale = np.maximum(sizes, np.sqrt((sizes ** 2).mean()))
  errors = np.linalg.norm(np.atleast_1d(actual - expected), axis=-1) / np.maximum(scale, 1e-30)
  worst = np.unravel_index(errors.argmax(), errors.shape)
  assert errors.max() <= ROW_FACTOR * limit, (
    f"{name}: row {worst} has error {errors.max():.2e}, want at most {ROW_FACTOR * limit:.1e}")


def assert_close(actual, expected, name: str):
  """Asserts the two arrays agree within the tolerance of that name, and are both finite."""
  rtol, atol = TOLERANCES[name]
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.isfinite(actual).all() and np.isfinite(expected).all(), f"{name}: not finite"
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)


# Of a whole model's gradients: name -> (norm of the error over the leaf's, largest error over the
# leaf's largest element).
LEAF_TOLERANCES = {
  # Activations, cotangents and softmax weights are rounded to 8 bits at some 10 places a layer. The
  # reference attention in bfloat16 on CPU, 5 layers, rows of 512, blocks of 16, is off by at most
  # 3.7 % of a leaf's norm and 5.5 % of its largest element (full: 2.6 %, 4.6 %). 1.5 times that.
  "model_bf16": (0.055, 0.085),
  # The same where tokens choose among more blocks than they select: rounding moves the choice
  # between blocks of nearly equal weight. Not measured: an estimate of twice the above.
  "model_bf16_near_ties": (0.10, 0.15),
}


def assert_leaf_close(actual, expected, tolerance: str, leaf: str):
  """Asserts that a leaf agrees in norm and in its worst element, both relative to the leaf."""
  norm_limit, max_limit = LEAF_TOLERANCES[tolerance]
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f"{leaf}: shapes {actual.shape} and {expected.shape}"
  assert np.isfinite(actual).all() and np.isfinite(expected).all(), f"{leaf}: not finite"
  error = np.abs(actual - expected)
  norm = np.linalg.norm(error) / np.linalg.norm(expected)
  worst = error.max() / np.abs(expected).max()
  assert norm <= norm_limit and worst <= max_limit, (
    f"{leaf}: norm {norm:.4f} of at most {norm_limit}, worst element {worst:.4f} of at most "
    f"{max_limit} of the largest")
