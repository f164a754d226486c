"""`assert_rows_close` fails for one wrong row, a small wrong leaf and a wrong scale."""

import numpy as np
import pytest

from tests.tolerances import ROW_TOLERANCES, assert_rows_close


def leaf(scale=1.0):
  return scale * np.random.default_rng(0).normal(size=(2, 500, 4, 16))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
@pytest.mark.parametrize("name", sorted(ROW_TOLERANCES))
def test_rounding_passes_and_one_wrong_row_fails_at_any_size(name, scale):
  x = leaf(scale)
  rounded = x * (1 + ROW_TOLERANCES[name][0] / 2)
  assert_rows_close(rounded, x, name)
  wrong = x.copy()
  wrong[1, 300, 2] *= 1.1            # one row of 4,000: 0.16 % of the norm
  with pytest.raises(AssertionError, match=r"row \[1, 300, 2\] is off|norm"):
    assert_rows_close(wrong, x, name)


def test_the_worst_row_is_named_where_the_norm_passes():
  x = leaf()
  wrong = x.copy()
  wrong[0, 7, 1] = x[0, 8, 1]
  wrong[0, 7, 1] = x[0, 7, 1] + 0.05 * (wrong[0, 7, 1] - x[0, 7, 1])
  with pytest.raises(AssertionError, match=r"row \[0, 7, 1\] is off by .*1 of 4000 rows"):
    assert_rows_close(wrong, x, "attention_rows_bf16")


def test_a_leaf_that_cancels_is_held_to_the_size_of_its_terms():
  noise = leaf(1e-4)
  with pytest.raises(AssertionError):
    assert_rows_close(noise, np.zeros_like(noise), "attention_grad_rows_bf16")
  assert_rows_close(noise, np.zeros_like(noise), "attention_grad_rows_bf16", size=1.0)
  with pytest.raises(AssertionError):
    assert_rows_close(100 * noise, np.zeros_like(noise), "attention_grad_rows_bf16", size=1.0)


def test_nan_and_another_shape_fail():
  x = leaf()
  broken = x.copy()
  broken[0, 0, 0, 0] = np.nan
  with pytest.raises(AssertionError, match="not finite"):
    assert_rows_close(broken, x, "attention_rows_f32")
  with pytest.raises(AssertionError, match="shapes"):
    assert_rows_close(x[:, :1], x, "attention_rows_f32")
