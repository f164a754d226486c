"""Seeded inputs of the attention tests, and the ops under one jit."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np


def jitted(op):
  """The op, compiled whole: eager references would compile each small operation by itself."""
  static = {"block_size", "num_blocks", "window", "scale"} & set(inspect.signature(op).parameters)
  return jax.jit(op, static_argnames=sorted(static))


def normal(seed, *shape, dtype="float32"):
  """A standard normal array; the same for the same seed and shape."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def qkv(seed, batch, tokens, heads, kv_heads, head_dim, v_dim=None, dtype="float32", keys=None):
  """q [B,T,N,H], k [B,S,K,H], v [B,S,K,E]; S = `keys` or T."""
  keys = tokens if keys is None else keys
  v_dim = head_dim if v_dim is None else v_dim
  return (normal(seed, batch, tokens, heads, head_dim, dtype=dtype),
          normal(seed + 1, batch, keys, kv_heads, head_dim, dtype=dtype),
          normal(seed + 2, batch, keys, kv_heads, v_dim, dtype=dtype))


def small_integers(seed, *shape, low=-2, high=3):
  """Integers as float32: with scale 1 every logit is exact, so equal ones tie exactly."""
  return jnp.asarray(np.random.default_rng(seed).integers(low, high, size=shape), jnp.float32)


def packed_segments(seed, batch, tokens, documents=3, padding=0):
  """i32 [B,T]: documents 1, 2, ... of random lengths, then `padding` zeros."""
  rng = np.random.default_rng(seed)
  rows = []
  for _ in range(batch):
    cuts = np.sort(rng.integers(1, max(tokens - padding, 2), size=documents - 1))
    row = 1 + np.searchsorted(cuts, np.arange(tokens), side="right")
    row[tokens - padding:] = 0
    rows.append(row)
  return np.asarray(rows, np.int32)


def random_blocks(seed, batch, kv_heads, tokens, picks, block_size):
  """i32 [B,K,T,P]: up to P distinct causal blocks of each query, ascending, -1 at the end."""
  rng = np.random.default_rng(seed)
  indices = np.full((batch, kv_heads, tokens, picks), -1, np.int32)
  for b, k, t in np.ndindex(batch, kv_heads, tokens):
    blocks = rng.permutation(t // block_size + 1)[:rng.integers(0, picks + 1)]
    indices[b, k, t, :len(blocks)] = np.sort(blocks)
  return indices


def query_positions(offset, batch, tokens):
  """i32 [B,T]: the key index of each query, for an int or one offset a row."""
  return np.broadcast_to(np.asarray(offset), (batch,))[:, None] + np.arange(tokens)


def cut_ranges(tokens, *lengths):
  """[(start, stop)] of consecutive ranges of these lengths, repeated, that cover all tokens."""
  ranges, start, turn = [], 0, 0
  while start < tokens:
    stop = min(start + lengths[turn % len(lengths)], tokens)
    ranges.append((start, stop))
    start, turn = stop, turn + 1
  return ranges
