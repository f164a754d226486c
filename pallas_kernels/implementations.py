"""How an op turns `implementation=` into the function that runs."""

import jax


def pick(op, implementation, available, by_platform):
  """The function to run; never another one than asked for.

  Args:
    op: the op's name, for the error.
    implementation: a key of `available`, or None for the platform's own.
    available: {name: function} of what exists for this op.
    by_platform: {platform: name}; platforms not listed use "reference".

  Raises:
    NotImplementedError: `implementation` does not exist for this op.
  """
  if implementation is None:
    implementation = by_platform.get(jax.default_backend(), "reference")
  if implementation not in available:
    raise NotImplementedError(
      f"{op}: implementation={implementation!r} does not exist; use one of "
      f"{', '.join(map(repr, sorted(available)))}, or None to pick by platform")
  return available[implementation]
