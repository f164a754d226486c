"""What the tests of TPU kernels rely on: interpret mode catches kernels that are wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat
from tests import tpu_interpret
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

X = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)


def run(body, *scratch, out_spec=None, grid=()):
  return pl.pallas_call(
    body, out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype), grid=grid,
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)], out_specs=out_spec or pl.BlockSpec(X.shape),
    scratch_shapes=scratch, interpret=tpu_interpret.INTERPRET)(X)


def copying(wait_first):
  """Copies X to VMEM and reads it there, before or after the copy is known to be done."""
  def body(x_ref, out_ref, scratch, semaphore):
    copy = pltpu.make_async_copy(x_ref, scratch, semaphore)
    copy.start()
    if wait_first:
      copy.wait()
    out_ref[...] = scratch[...]
    if not wait_first:
      copy.wait()
  return body


@pytest.mark.parametrize("wait_first", [True, False])
def test_a_race_in_an_earlier_kernel_is_kept(wait_first, race_detectors):  # noqa: F811
  scratch = pltpu.VMEM(X.shape, X.dtype), pltpu.SemaphoreType.DMA
  jax.block_until_ready(run(copying(wait_first), *scratch))
  jax.block_until_ready(run(copying(True), *scratch))
  assert [detector.races_found for detector in race_detectors] == [not wait_first, False]
  race_detectors.clear()


def test_unwritten_memory_is_nan():
  def body(x_ref, out_ref, scratch):
    out_ref[...] = scratch[...]
  assert np.isnan(run(body, pltpu.VMEM(X.shape, X.dtype))).all()


def test_a_stray_read_raises():
  def body(x_ref, out_ref, scratch):
    scratch[...] = jnp.zeros_like(scratch)
    out_ref[...] = scratch[pl.ds(pl.program_id(0) + 1, 8), :]
  try:
    with pytest.raises(Exception, match="(?i)out-of-bounds"):
      jax.block_until_ready(run(body, pltpu.VMEM(X.shape, X.dtype), grid=(1,)))
  finally:
    compat.tpu_interpreter().reset_tpu_interpret_mode_state()
