"""How an op turns `implementation=` into the function that runs."""

import functools
import importlib

import jax
from absl import logging

from pallas_kernels.checks import NotCoveredError

REFERENCE = "reference"


def lazy(target):
  """The function named "module:function", whose module is imported when it is first called.

  Kernels import packages that exist on their own platform only.
  """
  module, _, name = target.partition(":")

  def call(*args, **options):
    return getattr(importlib.import_module(module), name)(*args, **options)

  return call


def pick(op, implementation, available, by_platform):
  """The function to run.

  A named implementation runs or raises. With None the platform's own run in their order: the first
  that covers the arguments. Each that does not is named once, with the reason, in a warning.

  Args:
    op: the op's name, for messages.
    implementation: a key of `available`, or None for the platform's own.
    available: {name: function} of what exists for this op.
    by_platform: {platform: names, the best first}; the reference stands behind all of them.

  Raises:
    NotImplementedError: `implementation` does not exist for this op.
  """
  if implementation is None:
    names = (*by_platform.get(_platform(), ()), REFERENCE)
    return functools.partial(_first_that_covers, op, names, available)
  if implementation not in available:
    raise NotImplementedError(
      f"{op}: implementation={implementation!r} does not exist; use one of "
      f"{', '.join(map(repr, sorted(available)))}, or None to pick by platform")
  return available[implementation]


def _platform():
  """The platform that is traced for: of the mesh's devices, which may be absent ones
  (`tpu.topology`), or the default backend where no mesh is set.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _first_that_covers(op, names, available, *args, **options):
  *kernels, last = names
  for name in kernels:
    try:
      _check_device(op, name)
      return available[name](*args, **options)
    except NotCoveredError as reason:
      _warn_once(f"{reason}. Not running implementation={name!r} of {op}")
  return available[last](*args, **options)


def _check_device(op, name):
  """Mosaic GPU kernels use instructions of one generation only."""
  if name == "mosaic_gpu":
    found = getattr(jax.devices()[0], "compute_capability", None)
    if found != "9.0":
      raise NotCoveredError(f"{op} mosaic_gpu: got compute capability {found}, want 9.0 (Hopper)")


@functools.cache
def _warn_once(message):
  logging.warning("%s", message)
