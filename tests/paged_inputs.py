"""A paged cache with the same contents as a contiguous one, and NaN wherever none may look."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.attention_inputs import normal


@dataclasses.dataclass(frozen=True)
class Paged:
  """A cache of a few layers, of which one counts, and what it was made from."""

  q: jax.Array               # [B,N,H]
  k: jax.Array               # [B,S,K,H], S the longest length
  v: jax.Array               # [B,S,K,E]
  k_pages: jax.Array         # [2,R,K,64,H], layer 1; layer 0 is NaN
  v_pages: jax.Array
  page_table: jax.Array      # i32 [B,U], a random permutation of pages
  lengths: jax.Array         # i32 [B]
  layer: jax.Array           # i32 []

  @property
  def cache(self):
    return self.k_pages, self.v_pages

  @property
  def where(self):
    return self.page_table, self.lengths


def paged(seed, lengths, heads, kv_heads, head_dim, v_dim=None, dtype="float32", k=None, v=None):
  """A `Paged`; k, v [B,S,K,.] are drawn unless given. Entries past a row's pages name NaN pages."""
  rng = np.random.default_rng(seed)
  batch, longest = len(lengths), max(lengths)
  v_dim = head_dim if v_dim is None else v_dim
  room = -(-longest // 64) + 1
  q = normal(seed, batch, heads, head_dim, dtype=dtype)
  k = normal(seed + 1, batch, longest, kv_heads, head_dim, dtype=dtype) if k is None else k
  v = normal(seed + 2, batch, longest, kv_heads, v_dim, dtype=dtype) if v is None else v
  count = batch * room + 3
  table = rng.permutation(count)[:batch * room].reshape(batch, room)
  pages = [np.full((2, count, kv_heads, 64, width), np.nan, np.float32)
           for width in (head_dim, v_dim)]
  for b, length in enumerate(lengths):
    for at in range(-(-length // 64)):
      stop = min(at * 64 + 64, length)
      for out, x in zip(pages, (k, v)):
        rows = np.asarray(x[b, at * 64:stop], np.float32).swapaxes(0, 1)
        out[1, table[b, at], :, :stop - at * 64] = rows
  return Paged(q, k, v, *(jnp.asarray(x, dtype) for x in pages), jnp.asarray(table, jnp.int32),
               jnp.asarray(lengths, jnp.int32), jnp.int32(1))


def ring(x, lengths, window, dtype="float32"):
  """[2,B,K,W,.] of which layer 1 holds the last W tokens of x [B,S,K,.]; NaN elsewhere."""
  batch, _, kv_heads, width = x.shape
  out = np.full((2, batch, kv_heads, window, width), np.nan, np.float32)
  for b, length in enumerate(lengths):
    for p in range(max(length - window, 0), length):
      out[1, b, :, p % window] = np.asarray(x[b, p], np.float32)
  return jnp.asarray(out, dtype)


def picks(seed, lengths, kv_heads, num_blocks):
  """i32 [B,K,P]: up to P distinct blocks of each row, ascending, -1 last."""
  rng = np.random.default_rng(seed)
  out = np.full((len(lengths), kv_heads, num_blocks), -1, np.int32)
  for b, k in np.ndindex(out.shape[:2]):
    blocks = rng.permutation(-(-lengths[b] // 64))[:rng.integers(0, num_blocks + 1)]
    out[b, k, :len(blocks)] = np.sort(blocks)
  return jnp.asarray(out)
