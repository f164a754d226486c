"""PRNG keys of seeds of up to 63 bits, the same with and without 64-bit JAX."""

import jax


def key_of(seed: int) -> jax.Array:
  """The typed PRNG key of a seed.

  Without 64-bit JAX `jax.random.key` drops all but the lower 32 bits: seeds that differ by 2**32
  would give the same weights and the same text. Here the upper bits are folded in; a seed below
  2**32 has the key that `jax.random.key` gives it.

  Args:
    seed: at least 0, less than 2**63.
  """
  upper, lower = divmod(seed, 2**32)
  key = jax.random.key(lower)
  return jax.random.fold_in(key, upper) if upper else key
