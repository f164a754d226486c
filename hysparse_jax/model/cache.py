"""The KV cache: pages of one block for the full layers, a ring of the last `window` tokens of the
others.

A page holds the keys or values of `block_size` tokens of one sequence in one full layer: what a
sparse layer selects is one contiguous read per KV head. A page table says which pages are a
sequence's; the same pages serve it in every full layer. Sparse and window layers keep dense rings,
which do not grow. Buffers are stacked over layers, donated to the step that writes them and written
in place.

Axis letters: C hybrid blocks of a group, L layers of a run in all C, B batch, T new tokens,
R pages, U pages a sequence has room for, K KV heads, W window, H head dim of keys, E of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hysparse_jax import sharding
from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError
from hysparse_jax.sharding import sharded


class Ring(NamedTuple):
  """The window KV of a run of layers, all hybrid blocks' L; None where they project none."""

  k: jax.Array | None   # [L, B, K, W, H]; position p is in slot p % W
  v: jax.Array | None   # [L, B, K, W, E]


class GroupCache(NamedTuple):
  """The cache of one `LayerGroup`: C hybrid blocks."""

  k_pages: jax.Array | None   # [C, R, K, block_size, H]; None: the group has no full layer
  v_pages: jax.Array | None   # [C, R, K, block_size, E]
  rings: tuple[Ring, ...]     # one per run of other layers


class DecodeState(NamedTuple):
  """Everything `prefill` and `decode` carry from call to call."""

  length: jax.Array                   # i32 [B], tokens cached per sequence
  page_table: jax.Array               # i32 [B, U], pages of each sequence in order, -1 for none yet
  groups: tuple[GroupCache, ...]

  @property
  def block_size(self) -> int | None:
    """Tokens of a page; None if no layer is full."""
    return next((group.k_pages.shape[3] for group in self.groups if group.k_pages is not None),
                None)

  @property
  def max_tokens(self) -> int:
    """The tokens of a sequence there is room for; without a full layer any number is."""
    return 2**31 - 1 if self.block_size is None else self.page_table.shape[1] * self.block_size


def pages_for(cfg: ModelConfig, tokens: int) -> int:
  """U: pages that hold `tokens` tokens of one sequence; 0 if no layer is full."""
  return -(-tokens // cfg.block_size) if "full" in cfg.layer_kinds else 0


def init_cache(cfg: ModelConfig, batch: int, max_tokens: int,
               num_pages: int | None = None) -> DecodeState:
  """An empty cache for `batch` sequences of at most `max_tokens` tokens, in the compute dtype.

  Under a mesh a row's pages lie with the row: page numbers count from the first page of its shard.

  Args:
    cfg: of the model.
    batch: B.
    max_tokens: rounded up to pages.
    num_pages: R, pages that all rows share, handed out by whoever fills the page table; None: every
      row has pages for max_tokens of its own.

  Raises:
    UserError: the ablation `block_choice="previous"`, which cannot decode.
  """
  if cfg.block_choice == "previous":
    raise UserError("model.block_choice='previous' trains and evaluates without a cache only; "
                    "generate with 'oracle' or 'random'")
  columns = pages_for(cfg, max_tokens)
  if num_pages is None:
    num_pages = batch * columns
    row = jnp.arange(batch, dtype=jnp.int32)[:, None] % (batch // sharding.batch_shards())
    table = row * columns + jnp.arange(columns, dtype=jnp.int32)
  else:
    table = jnp.full((batch, columns), -1, jnp.int32)

  def pair(layers, of, tokens):
    return tuple(jnp.zeros((layers, of, cfg.num_kv_heads, tokens, width), cfg.dtype)
                 for width in (cfg.head_dim, cfg.v_dim))

  groups = []
  for group in cfg.layer_groups:
    pages = pair(group.count, num_pages, cfg.block_size) if group.has_full else (None, None)
    rings = (Ring(*pair(group.count * run.count, batch, cfg.window)) if cfg.owns_kv(run.kind)
             else Ring(None, None) for run in group.runs)
    groups.append(GroupCache(*pages, tuple(rings)))
  return DecodeState(jnp.zeros((batch,), jnp.int32), table, tuple(groups))


def shardings(state: DecodeState, mesh: jax.sharding.Mesh) -> DecodeState:
  """A NamedSharding for every leaf: sequences and pages over the batch axes, KV heads over
  `tensor`."""
  names = {1: ("batch",), 2: ("batch", None), 5: (None, "batch", "kv_heads", None, None)}
  return jax.tree.map(
    lambda leaf: jax.sharding.NamedSharding(mesh, sharding.spec(names[leaf.ndim])), state)


@jax.named_scope("append")
def append_full(cache: GroupCache, layer, k, v, context) -> GroupCache:
  """Writes k, v [B, T, K, .] of a full layer to the pages of the context's valid positions."""
  k_pages, v_pages = sharded(
    _write_pages, returns=("k_pages", "v_pages"), k_pages=cache.k_pages, v_pages=cache.v_pages,
    k=k, v=v, page_table=context.page_table, query_positions=context.positions,
    valid=context.valid, layer=layer)
  return cache._replace(k_pages=k_pages, v_pages=v_pages)


def _write_pages(k_pages, v_pages, k, v, page_table, query_positions, valid, layer):
  pages, size = k_pages.shape[1], k_pages.shape[3]
  number = jnp.take_along_axis(page_table, query_positions // size, axis=1, mode="fill",
                               fill_value=-1)
  number = jnp.where(valid & (number >= 0), number, pages)          # out of range: dropped
  write = lambda old, new: old.at[layer, number, :, query_positions % size].set(
    new.astype(old.dtype), mode="drop")
  return write(k_pages, k), write(v_pages, v)


@jax.named_scope("gather_pages")
def gathered(cache: GroupCache, layer, context):
  """k, v [B, S, K, .] of a full layer: all pages of the context's table; 0 after the last token."""
  return sharded(
    _gather_pages, returns=("k", "v"), k_pages=cache.k_pages, v_pages=cache.v_pages,
    page_table=context.page_table, lengths=context.lengths, layer=layer)


def _gather_pages(k_pages, v_pages, page_table, lengths, layer):
  def gather(pages):
    rows = pages[layer, page_table.clip(0, pages.shape[1] - 1)].swapaxes(2, 3)
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    written = jnp.arange(rows.shape[1], dtype=jnp.int32) < lengths[:, None]
    return jnp.where(written[..., None, None], rows, 0)   # another sequence may have left a NaN

  return gather(k_pages), gather(v_pages)


@jax.named_scope("append")
def append_ring(ring: Ring, ring_layer, k, v, context) -> Ring:
  """Writes the newest W of the context's valid tokens, k, v [B, T, K, .], to a layer's ring."""
  return Ring(*sharded(
    _write_ring, returns=("k_ring", "v_ring"), k_ring=ring.k, v_ring=ring.v, k=k, v=v,
    query_positions=context.positions, valid=context.valid, ring_layer=ring_layer))


def _write_ring(k_ring, v_ring, k, v, query_positions, valid, ring_layer):
  window = k_ring.shape[3]
  rows = jnp.arange(k.shape[0])[:, None]
  newest = jnp.max(jnp.where(valid, query_positions, -1), axis=1, keepdims=True)
  kept = valid & (query_positions > newest - window)              # so that no slot is hit twice
  slots = jnp.where(kept, query_positions % window, window)
  write = lambda ring, new: ring.at[ring_layer, rows, :, slots].set(
    new.astype(ring.dtype), mode="drop")
  return write(k_ring, k), write(v_ring, v)


@jax.named_scope("ring_and_new")
def ring_and_new(ring: Ring, ring_layer, k, v, context):
  """What a chunk's tokens see through the window: the ring, oldest first, and the new rows.

  Args:
    ring: before the chunk was appended.
    ring_layer: i32 [], of its L.
    k, v: [B, T, K, .], the chunk's.
    context: its positions.

  Returns:
    k, v [B, W+T, K, .] and i32 [B], the index of the chunk's first token among them.
  """
  return sharded(
    _ring_and_new, returns=("k_local", "v_local", "local_query_offset"), k_ring=ring.k,
    v_ring=ring.v, k=k, v=v, query_positions=context.positions, ring_layer=ring_layer)


def _ring_and_new(k_ring, v_ring, k, v, query_positions, ring_layer):
  start, window = query_positions[:, 0], k_ring.shape[3]
  offset = jnp.minimum(start, window)                  # tokens of the ring
  index = jnp.arange(window + k.shape[1], dtype=jnp.int32)
  old = (start - offset)[:, None] + index[:window]     # positions, from the oldest that is there
  at = jnp.where(index < offset[:, None], jnp.pad(old, ((0, 0), (0, k.shape[1]))) % window,
                 window + index - offset[:, None]).clip(0, window + k.shape[1] - 1)

  def join(ring, new):
    rows = jnp.concatenate([ring[ring_layer].swapaxes(1, 2), new.astype(ring.dtype)], axis=1)
    return jnp.take_along_axis(rows, at[..., None, None], axis=1)

  return join(k_ring, k), join(v_ring, v), offset
