"""The KV cache: all tokens of the full layers, a ring of the last `window` tokens of the others.

Buffers are stacked over hybrid blocks and layers, donated to the decode step, carried through its
scan and written in place. A sparse layer's cache does not grow with the sequence.

Axis letters: C hybrid blocks of a group, R layers of a run, B batch, T new tokens, S cache slots,
W window, K KV heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hysparse_jax import sharding
from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError


class Ring(NamedTuple):
  """The window KV of a run of R layers in C hybrid blocks; None where they project none."""

  k: jax.Array | None   # [C, R, B, W, K, H]; position p is in slot p % W
  v: jax.Array | None   # [C, R, B, W, K, Hv]


class GroupCache(NamedTuple):
  """The cache of one `LayerGroup`: C hybrid blocks."""

  full_k: jax.Array | None   # [C, B, S, K, H]; None: the group has no full layer
  full_v: jax.Array | None   # [C, B, S, K, Hv]
  rings: tuple[Ring, ...]    # one per run of other layers


class DecodeState(NamedTuple):
  """Everything `prefill` and `decode` carry from call to call."""

  length: jax.Array                   # i32 [B], tokens cached per sequence
  groups: tuple[GroupCache, ...]

  @property
  def max_tokens(self) -> int:
    """S, the tokens there is room for; without a full layer any number is."""
    return min((group.full_k.shape[2] for group in self.groups if group.full_k is not None),
               default=2**31 - 1)


def init_cache(cfg: ModelConfig, batch: int, max_tokens: int) -> DecodeState:
  """An empty cache for `batch` sequences of at most `max_tokens` tokens, in the compute dtype.

  Raises:
    UserError: the ablation `block_choice="previous"`, which cannot decode.
  """
  if cfg.block_choice == "previous":
    raise UserError("model.block_choice='previous' trains and evaluates without a cache only; "
                    "generate with 'oracle' or 'random'")

  def pair(*lead):
    return tuple(jnp.zeros((*lead, cfg.num_kv_heads, width), cfg.dtype)
                 for width in (cfg.head_dim, cfg.v_dim))

  groups = []
  for group in cfg.layer_groups:
    full = pair(group.count, batch, max_tokens) if group.has_full else (None, None)
    rings = (Ring(*pair(group.count, run.count, batch, cfg.window)) if cfg.owns_kv(run.kind)
             else Ring(None, None) for run in group.runs)
    groups.append(GroupCache(*full, tuple(rings)))
  return DecodeState(jnp.zeros((batch,), jnp.int32), tuple(groups))


def shardings(state: DecodeState, mesh: jax.sharding.Mesh) -> DecodeState:
  """A NamedSharding for every leaf: sequences over the batch axes, KV heads over `tensor`."""
  def place(leaf):
    names = ("batch",) if leaf.ndim == 1 else ("batch", None, "kv_heads", None)
    stack = (None,) * (leaf.ndim - len(names))
    return jax.sharding.NamedSharding(mesh, sharding.spec((*stack, *names)))

  return jax.tree.map(place, state)


def append_full(cache: GroupCache, hybrid_block, k, v, positions, valid) -> GroupCache:
  """Writes k, v [B, T, K, .] of a full layer at `positions` where `valid` (both [B, T])."""
  rows = jnp.arange(k.shape[0])[:, None]
  slots = jnp.where(valid, positions, cache.full_k.shape[2])      # out of range: dropped
  write = lambda full, new: full.at[hybrid_block, rows, slots].set(
    new.astype(full.dtype), mode="drop")
  return cache._replace(full_k=write(cache.full_k, k), full_v=write(cache.full_v, v))


def append_ring(ring: Ring, at, k, v, positions, valid) -> Ring:
  """Writes the newest W valid of k, v [B, T, K, .] into layer `at` = (hybrid block, layer)."""
  window = ring.k.shape[3]
  rows = jnp.arange(k.shape[0])[:, None]
  newest = jnp.max(jnp.where(valid, positions, -1), axis=1, keepdims=True)
  kept = valid & (positions > newest - window)                    # so that no slot is hit twice
  slots = jnp.where(kept, positions % window, window)
  write = lambda buffer, new: buffer.at[*at, rows, slots].set(new.astype(buffer.dtype), mode="drop")
  return Ring(write(ring.k, k), write(ring.v, v))


def ring_view(full, hybrid_block, positions, window: int):
  """The ring and the new rows that full-length KV [C, B, S, K, H] holds for `positions` [B, T].

  For the ablation whose local branch reads the shared KV: it keeps no ring of its own.

  Returns:
    [B, W, K, H] with the newest position before `positions[:, 0]` per slot, and [B, T, K, H].
  """
  start = positions[:, :1]
  slot = jnp.arange(window)[None]
  newest = start - 1 - (start - 1 - slot) % window                # negative: nothing there yet
  rows = jnp.arange(full.shape[1])[:, None]
  return full[hybrid_block, rows, jnp.maximum(newest, 0)], full[hybrid_block, rows, positions]
