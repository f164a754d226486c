"""How an op turns `implementation=` into the function that runs."""

import contextlib
import contextvars
import functools
import importlib

import jax
from absl import logging

from pallas_kernels.checks import NotCoveredError

REFERENCE = "reference"
REFERENCE_TOKENS = 2048   # longest rows that take a reference unasked where kernels exist

_record = contextvars.ContextVar("record", default=None)


def lazy(target):
  """The function named "module:function", whose module is imported when it is first called.

  Kernels import packages that exist on their own platform only.
  """
  module, _, name = target.partition(":")

  def call(*args, **options):
    return getattr(importlib.import_module(module), name)(*args, **options)

  return call


def platform() -> str:
  """"cpu", "gpu" or "tpu": what is traced for.

  That is the platform of the mesh's devices, which may be absent ones (`tpu.topology`); without a
  mesh that of `jax.default_device`, or else the default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
  if device is None:
    return jax.default_backend()
  return device if isinstance(device, str) else device.platform


@contextlib.contextmanager
def recorded():
  """Yields a dict that fills with {op: names of the implementations that run} while it is open.

  Ops choose when they are traced, so tracing a function (`jax.eval_shape`) is enough to know.
  """
  names = {}
  token = _record.set(names)
  try:
    yield names
  finally:
    _record.reset(token)


def pick(op, implementation, available, by_platform, *, tokens=None):
  """The function to run.

  A named implementation runs or raises. With None the first of the platform's own that covers the
  arguments runs, and a warning names, once, each that does not. Where the platform has some and
  none does, rows of at most REFERENCE_TOKENS tokens take the reference; longer rows raise, because
  the reference's time grows with their square.

  Args:
    op: the op's name, for messages.
    implementation: a key of `available`, or None for the platform's own.
    available: {name: function} of what exists for this op.
    by_platform: {platform: names, the best first}.
    tokens: queries per row; None: the reference's cost is linear, so it always runs.

  Raises:
    NotImplementedError: `implementation` does not exist for this op; or, when the function is
      called, no implementation of the platform takes its arguments.
  """
  if implementation is None:
    names = by_platform.get(platform(), ())
    return functools.partial(_first_that_covers, op, names, available, tokens)
  if implementation not in available:
    raise NotImplementedError(
      f"{op}: implementation={implementation!r} does not exist; use one of "
      f"{', '.join(map(repr, sorted(available)))}, or None to pick by platform")
  return functools.partial(_run, op, implementation, available)


def _run(op, name, available, *args, **options):
  result = available[name](*args, **options)
  names = _record.get()
  if names is not None and name not in names.setdefault(op, []):
    names[op].append(name)
  return result


def _first_that_covers(op, names, available, tokens, *args, **options):
  reasons = []
  for name in names:
    try:
      _check_device(op, name)
      result = _run(op, name, available, *args, **options)
    except NotCoveredError as reason:
      reasons.append(str(reason))
    else:
      _warn_once(op, name, reasons)
      return result
  if reasons and tokens is not None and tokens > REFERENCE_TOKENS:
    raise NotImplementedError(
      f"{op}: no {platform()} implementation takes this call ({'; '.join(reasons)}), and its rows "
      f"of {tokens} tokens are too long for the reference; wanted at most {REFERENCE_TOKENS}: "
      "change those sizes, or give implementation='reference' to run it all the same")
  _warn_once(op, REFERENCE, reasons)
  return _run(op, REFERENCE, available, *args, **options)


def _check_device(op, name):
  """Mosaic GPU kernels use instructions of one generation only."""
  if name == "mosaic_gpu":
    device = jax.config.jax_default_device
    device = jax.devices()[0] if device is None or isinstance(device, str) else device
    found = getattr(device, "compute_capability", None)
    if found != "9.0":
      raise NotCoveredError(f"{op} mosaic_gpu: got compute capability {found}, want 9.0 (Hopper)")


def _warn_once(op, name, reasons):
  for reason in reasons:
    _warn(f"{reason}. Running implementation={name!r} of {op} instead")


@functools.cache
def _warn(message):
  logging.warning("%s", message)
