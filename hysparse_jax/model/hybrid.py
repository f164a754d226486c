"""HySparse: one full-attention layer, then M sparse layers that reuse its selection and its KV.

    FullLayer    o = softmax(q k^T / sqrt(H)) v, and from inside it, per token and KV head, the P
                 key blocks with the largest attention weight: the oracle (HySparse section 3.2)
    SparseLayer  o = sigmoid(W_sparse y) * attend(q, the selected blocks of the full layer's k, v)
                   + sigmoid(W_local y) * attend(q, the last `window` of its own k', v')    (3.3)
    HybridBlock  a FullLayer and a scan over its M SparseLayers
    HybridStack  a scan over equal HybridBlocks, group by group (`ModelConfig.layer_groups`)

What is shared is an ordinary value: the full layer returns a SharedKV, the sparse layers take it.
A sliding-window layer is a SparseLayer without its sparse branch; full attention is a stack of
HybridBlocks without sparse layers.

Axis letters: B batch, T query, S key, D model, N query heads, K KV heads, H head dim of queries and
keys, Hv of values, P selected blocks, C hybrid blocks of a group, M layers of a run.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels as ops
from hysparse_jax.config import LayerGroup, ModelConfig
from hysparse_jax.model import block_choice, decode_attention
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.cache import GroupCache, Ring
from hysparse_jax.model.decoder_layer import Branch, DecoderLayer, TokenContext
from hysparse_jax.model.layers import rematerialised, stacked, valid_mean
from hysparse_jax.model.moe import RouterStats
from hysparse_jax.sharding import sharded


class SharedKV(NamedTuple):
  """What a full layer hands to the sparse layers of its hybrid block.

  When a token is decoded, k and v are the pages of the group's cache: [C, R, K, block_size, .].
  """

  k: jax.Array               # [B, S, K, H], rotary applied
  v: jax.Array               # [B, S, K, Hv]
  block_indices: jax.Array   # i32 [B, K, T, P], each token's selected key blocks, -1 for none
  plan: object               # what the kernels derive from block_indices; None: nothing


class LayerStats(NamedTuple):
  """What a layer reports: mean gates (None where there is none) and its router's losses."""

  gate_sparse: jax.Array | None   # f32 []
  gate_local: jax.Array | None    # f32 []
  router: RouterStats | None


class FullLayer(DecoderLayer):
  """Causal attention that also returns each token's top-P key blocks."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(cfg, "full", rngs=rngs)

  @jax.named_scope("full_layer")
  def __call__(self, x, context: TokenContext, num_blocks: int, cache: GroupCache | None = None,
               hybrid_block=None):
    """x [B, T, D] -> x, SharedKV, cache, LayerStats; `num_blocks` is P, 0 if none are read."""
    cfg = self.cfg
    wanted = 0 if cfg.block_choice == "random" else num_blocks
    q, k, v, _ = self.project(x, context)
    with jax.named_scope("attend"):
      if cache is not None:
        cache = kv_cache.append_full(cache, hybrid_block, k, v, context)
      if context.decodes(cfg):
        k, v = cache.k_pages, cache.v_pages
        o, block_indices = decode_attention.full_layer(cfg, q, cache, hybrid_block, context, wanted)
      else:
        if cache is not None:
          k, v = kv_cache.gathered(cache, hybrid_block, context)
        op = partial(ops.oracle_attention, block_size=cfg.block_size, num_blocks=wanted,
                     implementation=cfg.implementation)
        o, block_indices = sharded(op, returns=("out", "block_indices"), q=q, k=k, v=v,
                                   **context.key_range)
    shared = self._share(k, v, block_indices, context, num_blocks)
    x, router = self.finish(x, o, context)
    return x, shared, cache, LayerStats(None, None, router)

  @jax.named_scope("select")
  def _share(self, k, v, block_indices, context, num_blocks) -> SharedKV:
    cfg, plan = self.cfg, None
    if num_blocks:
      block_indices = block_choice.chosen(cfg, block_indices, num_blocks, context)
      # Saved by remat, so never recomputed differently.
      block_indices = checkpoint_name(block_indices, "block_indices")
      if not context.decodes(cfg):
        keys = {name: x for name, x in context.key_range.items() if name == "query_offset"}
        plan = sharded(partial(_plan, cfg=cfg, num_keys=k.shape[1]), returns="plan",
                       block_indices=block_indices, **keys)
    return SharedKV(k, v, block_indices, plan)


def _plan(block_indices, *, cfg: ModelConfig, num_keys: int, query_offset=0):
  return ops.plan_blocks(block_indices, num_heads=block_indices.shape[1] * cfg.group_size,
                         num_keys=num_keys, block_size=cfg.block_size, query_offset=query_offset,
                         implementation=cfg.implementation)


class SparseLayer(DecoderLayer):
  """The full layer's blocks through its KV, a window through a KV of its own, gated and added."""

  def __init__(self, cfg: ModelConfig, kind: str = "sparse", *, rngs: nnx.Rngs):
    super().__init__(cfg, kind, rngs=rngs)
    self.sparse = Branch(cfg, rngs=rngs) if kind == "sparse" else None
    self.local = Branch(cfg, rngs=rngs) if cfg.has_local_branch(kind) else None

  def __call__(self, x, shared: SharedKV | None, context: TokenContext, ring: Ring | None = None,
               at=None):
    """x [B, T, D] -> x, ring, LayerStats.

    `shared` is None for a window layer before the first full layer; with a cache, `at` is the
    layer's place in the full layers' pages and in the ring.
    """
    with jax.named_scope(f"{self.kind}_layer"):
      q, k, v, inputs = self.project(x, context)
      (gate_sparse, sinks_sparse), (gate_local, sinks_local) = (
        (None, None) if branch is None else branch(y)
        for branch, y in zip((self.sparse, self.local), inputs))
      branches = dict(gate_sparse=gate_sparse, gate_local=gate_local, sinks_sparse=sinks_sparse,
                      sinks_local=sinks_local)
      with jax.named_scope("attend"):
        o, ring = self._attend(q, shared, k, v, context, branches, ring, at)
      x, router = self.finish(x, o, context)
      means = (None if gate is None else valid_mean(gate, context.valid)
               for gate in (gate_sparse, gate_local))
      return x, ring, LayerStats(*means, router)

  def _attend(self, q, shared, k, v, context, branches, ring, at):
    cfg, keys = self.cfg, dict(context.key_range)
    shared = None if self.sparse is None else shared
    has_ring = ring is not None and k is not None
    if context.decodes(cfg):
      ring = kv_cache.append_ring(ring, at[1], k, v, context) if has_ring else ring
      return decode_attention.sparse_layer(cfg, q, shared, ring if has_ring else None, *at, context,
                                           branches), ring
    k_local, v_local = (shared.k, shared.v) if self.local is not None and k is None else (k, v)
    if has_ring:
      k_local, v_local, keys["local_query_offset"] = kv_cache.ring_and_new(
        ring, at[1], k, v, context)
      ring = kv_cache.append_ring(ring, at[1], k, v, context)
    selected = SharedKV(None, None, None, None) if shared is None else shared
    op = partial(ops.sparse_layer_attention, block_size=cfg.block_size, window=cfg.window,
                 implementation=cfg.implementation)
    return sharded(op, q=q, **selected._asdict(), k_local=k_local, v_local=v_local, **branches,
                   **keys), ring


class HybridBlock(nnx.Module):
  """One full layer and the runs of layers that reuse what it returns."""

  def __init__(self, cfg: ModelConfig, group: LayerGroup, *, rngs: nnx.Rngs):
    self.cfg, self.group = cfg, group
    self.full = FullLayer(cfg, rngs=rngs) if group.has_full else None
    self.runs = nnx.List([
      stacked(lambda rngs, kind=run.kind: SparseLayer(cfg, kind, rngs=rngs), run.count, rngs)
      for run in group.runs])

  @property
  def parts(self) -> tuple:
    """The full layer, if there is one, and each run's stacked layers: one `LayerStats` each."""
    return (self.full, *self.runs) if self.full is not None else tuple(self.runs)

  def __call__(self, x, context: TokenContext, cache: GroupCache | None, hybrid_block):
    """x [B, T, D] -> x, cache, the stats of `parts`, those of a run stacked [M]."""
    shared, all_stats, rings = None, [], []
    if self.full is not None:
      num_blocks = self.cfg.num_blocks if self.group.has_sparse else 0
      full = rematerialised(self.cfg, "layer", FullLayer.__call__, static_argnums=(3,))
      x, shared, cache, stats = full(self.full, x, context, num_blocks, cache, hybrid_block)
      all_stats.append(stats)

    def step(carry, scanned):
      x, ring = carry
      index, layer = scanned
      x, ring, stats = layer(x, shared, context, ring, (hybrid_block, index))
      return (x, ring), stats

    for r, (layers, run) in enumerate(zip(self.runs, self.group.runs)):
      ring = None if cache is None else cache.rings[r]
      (x, ring), stats = jax.lax.scan(
        rematerialised(self.cfg, "layer", step), (x, ring),
        (jnp.arange(run.count, dtype=jnp.int32) + hybrid_block * run.count, layers),
        unroll=context.unrolled(self.cfg))
      rings.append(ring)
      all_stats.append(stats)
    cache = None if cache is None else cache._replace(rings=tuple(rings))
    return x, cache, tuple(all_stats)


class HybridStack(nnx.Module):
  """All layers: per `LayerGroup`, a scan over its hybrid blocks."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.groups = nnx.List([
      stacked(lambda rngs, group=group: HybridBlock(cfg, group, rngs=rngs), group.count, rngs)
      for group in cfg.layer_groups])

  def __call__(self, x, context: TokenContext, caches: tuple[GroupCache, ...] | None = None):
    """x [B, T, D] -> x, caches, per group the stats of its layers stacked [C] and [C, M]."""
    new_caches, all_stats = [], []

    def step(carry, scanned):
      x, cache = carry
      index, block = scanned
      x, cache, stats = block(x, context, cache, index)
      return (x, cache), stats

    for index, (blocks, group) in enumerate(zip(self.groups, self.cfg.layer_groups)):
      cache = None if caches is None else caches[index]
      (x, cache), stats = jax.lax.scan(
        rematerialised(self.cfg, "block", step), (x, cache),
        (jnp.arange(group.count, dtype=jnp.int32), blocks), unroll=context.unrolled(self.cfg))
      new_caches.append(cache)
      all_stats.append(stats)
    return x, None if caches is None else tuple(new_caches), tuple(all_stats)


def by_layer(cfg: ModelConfig, stats) -> list[LayerStats]:
  """The stack's statistics as one `LayerStats` per layer, in order."""
  layers = []
  for group, parts in zip(cfg.layer_groups, stats):
    counts = (None,) * group.has_full + tuple(run.count for run in group.runs)
    for c in range(group.count):
      for count, part in zip(counts, parts):
        at = [(c,)] if count is None else [(c, m) for m in range(count)]
        layers += [jax.tree.map(lambda leaf, i=i: leaf[i], part) for i in at]
  return layers
