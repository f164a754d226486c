"""What decoding remembers: full-length KV of the full layers, a window ring of the others.

All buffers are stacked over blocks and layers, donated to the decode step, carried through its scan
and written in place. A sparse layer owns nothing that grows with the sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hysparse_jax import sharding
from hysparse_jax.config import ModelConfig


class SharedKV(NamedTuple):
  """A full layer's keys (rotary applied) and values, as its sparse layers reuse them."""

  k: jax.Array  # [B, S, K, H]
  v: jax.Array  # [B, S, K, Hv]


class GroupCache(NamedTuple):
  """The cache of one `LayerGroup`: C blocks of one full and M other layers."""

  full_k: jax.Array           # [C, B, S, K, H]
  full_v: jax.Array           # [C, B, S, K, Hv]
  ring_k: jax.Array | None    # [C, M, B, W, K, H]; position p stands in slot p % W
  ring_v: jax.Array | None    # [C, M, B, W, K, Hv]
  last_picked: jax.Array | None = None   # i32 [C, B, K, P], of block_choice="previous" alone


class DecodeState(NamedTuple):
  """Everything `prefill` and `decode` carry from call to call."""

  length: jax.Array                   # i32 [B], tokens cached per sequence
  groups: tuple[GroupCache, ...]

  @property
  def max_tokens(self) -> int:
    """S, the tokens there is room for."""
    return self.groups[0].full_k.shape[2]


def init_cache(cfg: ModelConfig, batch: int, max_tokens: int) -> DecodeState:
  """An empty cache for `batch` sequences of at most `max_tokens` tokens, in the compute dtype."""
  def zeros(*shape):
    return jnp.zeros(shape, cfg.dtype)

  groups = []
  for count, num_sparse in cfg.layer_groups:
    full = (count, batch, max_tokens, cfg.num_kv_heads)
    ring = (count, num_sparse, batch, cfg.window, cfg.num_kv_heads)
    has_ring = num_sparse > 0 and cfg.owns_local_kv
    remembers = num_sparse > 0 and cfg.block_choice == "previous"
    groups.append(GroupCache(
      zeros(*full, cfg.head_dim), zeros(*full, cfg.v_dim),
      zeros(*ring, cfg.head_dim) if has_ring else None,
      zeros(*ring, cfg.v_dim) if has_ring else None,
      jnp.full((count, batch, cfg.num_kv_heads, cfg.num_blocks), -1, jnp.int32)
      if remembers else None))
  return DecodeState(jnp.zeros((batch,), jnp.int32), tuple(groups))


def shardings(state: DecodeState, mesh: jax.sharding.Mesh) -> DecodeState:
  """A NamedSharding for every leaf: sequences over the batch axes, KV heads over `tensor`."""
  place = lambda *names: jax.sharding.NamedSharding(mesh, sharding.spec(names))
  full, ring = (place(*stack, "batch", None, "kv_heads", None) for stack in ((None,), (None, None)))
  return DecodeState(place("batch"), tuple(
    GroupCache(full, full, *((ring, ring) if group.ring_k is not None else (None, None)))
    for group in state.groups))


def append_full(cache: GroupCache, block, k, v, positions, valid) -> GroupCache:
  """Writes k, v [B, T, K, .] of full layer `block` at `positions` where `valid` (both [B, T])."""
  rows = jnp.arange(k.shape[0])[:, None]
  slots = jnp.where(valid, positions, cache.full_k.shape[2])      # out of range: dropped
  return cache._replace(
    full_k=cache.full_k.at[block, rows, slots].set(k.astype(cache.full_k.dtype), mode="drop"),
    full_v=cache.full_v.at[block, rows, slots].set(v.astype(cache.full_v.dtype), mode="drop"))


def append_ring(cache: GroupCache, block, layer, k, v, positions, valid) -> GroupCache:
  """Writes the newest W valid of k, v [B, T, K, .] into the ring of layer (`block`, `layer`)."""
  window = cache.ring_k.shape[3]
  rows = jnp.arange(k.shape[0])[:, None]
  newest = jnp.max(jnp.where(valid, positions, -1), axis=1, keepdims=True)
  kept = valid & (positions > newest - window)                    # so that no slot is hit twice
  slots = jnp.where(kept, positions % window, window)
  return cache._replace(
    ring_k=cache.ring_k.at[block, layer, rows, slots].set(k.astype(cache.ring_k.dtype),
                                                          mode="drop"),
    ring_v=cache.ring_v.at[block, layer, rows, slots].set(v.astype(cache.ring_v.dtype),
                                                          mode="drop"))


def remember_picks(cache: GroupCache, block, picked, valid) -> GroupCache:
  """Keeps the picks i32 [B, K, T, P] of each row's newest `valid` token [B, T]."""
  newest = jnp.maximum(jnp.sum(valid, axis=1) - 1, 0)                      # valid ones come first
  last = jnp.take_along_axis(picked, newest[:, None, None, None], axis=2)[:, :, 0]
  return cache._replace(last_picked=cache.last_picked.at[block].set(last))


def ring_view(full, positions, window: int):
  """The ring and the new rows that a full-length buffer [B, S, K, H] holds for `positions` [B, T].

  For the ablation whose local branch reads the shared KV: it keeps no ring of its own.

  Returns:
    [B, W, K, H] with the newest position before `positions[:, 0]` per slot, and [B, T, K, H].
  """
  start = positions[:, :1]
  slot = jnp.arange(window)[None]
  newest = start - 1 - (start - 1 - slot) % window                # negative: nothing there yet
  rows = jnp.arange(full.shape[0])[:, None]
  return full[rows, jnp.maximum(newest, 0)], full[rows, positions]
