"""HySparse: one full-attention layer, then M sparse layers that reuse its choice and its KV.

    FullLayer    softmax(q k^T / sqrt(H)) v, and from inside it, per token and KV head, the P key
                 blocks whose largest weight is largest: the oracle (HySparse section 3.2)
    SparseLayer  sigmoid(W_gs x) * attend(q, selected blocks of the full layer's k, v)
                 + sigmoid(W_gl x) * attend(q, last `window` of its own k', v')      (section 3.3)
    HybridBlock  a FullLayer and a scan over its M SparseLayers
    HybridStack  a scan over HybridBlocks, group by group (`ModelConfig.layer_groups`)

What is shared is an ordinary value: the full layer returns it, the sparse layers take it. The
Hybrid SWA baseline is the same stack whose layers in between have the local branch alone, and full
attention the stack with nothing in between.

Axis letters: B batch, T query, S key, D model, N query heads, K KV heads, H head dim, P picked
blocks, C blocks in a group, M sparse layers per block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hysparse_jax.config import ModelConfig
from hysparse_jax.model import block_choice
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.cache import GroupCache, SharedKV
from hysparse_jax.model.layers import (
  Mlp,
  ones,
  rms_norm,
  rotary,
  scaled_normal,
  stacked,
  weight,
  zeros,
)
from hysparse_jax.model.moe import Experts, RouterStats
from hysparse_jax.sharding import constrain, per_device
from pallas_kernels import (
  block_sparse_attention,
  cached_block_sparse_attention,
  cached_oracle_attention,
  cached_sliding_window_attention,
  oracle_attention,
  plan_blocks,
  sliding_window_attention,
  sparse_layer_attention,
)

TOKENS = ("batch", "seq")
STREAM = ("batch", "seq", None)
HEADS = ("batch", "seq", "heads", None)
KV = ("batch", "seq", "kv_heads", None)
LAYER_KV = (None, *KV)   # of the cache: layers stacked in front
INDEX = ()
PICKED = ("batch", "kv_heads", "seq", None)
SHARDS = ("shard",)   # of a plan: whatever each device's kernels need, stacked


class Rows(NamedTuple):
  """Which tokens the rows of a call are; the same for every layer."""

  positions: jax.Array                  # i32 [B, T], within the document
  segment_ids: jax.Array | None = None  # i32 [B, T], 0 is padding; None: one document per row
  valid: jax.Array | None = None        # bool [B, T], with a cache: rows that are no padding


class LayerStats(NamedTuple):
  """What a layer reports: mean gates (None where there is none) and its router's losses."""

  gate_sparse: jax.Array | None   # f32 []
  gate_local: jax.Array | None    # f32 []
  router: RouterStats | None


class Attention(nnx.Module):
  """What both kinds of layer have: norms, projections, the FFN behind."""

  def __init__(self, cfg: ModelConfig, owns_kv: bool, *, rngs: nnx.Rngs):
    D, N, K, H, Hv = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.v_dim
    self.cfg = cfg
    self.owns_kv = owns_kv
    self.attn_norm = weight(rngs, (D,), (None,), init=ones)
    self.wq = weight(rngs, (D, N, H), ("embed", "heads", None), in_axes=(0,), out_axes=(1, 2))
    if owns_kv:
      self.wk = weight(rngs, (D, K, H), ("embed", "kv_heads", None), in_axes=(0,), out_axes=(1, 2))
      self.wv = weight(rngs, (D, K, Hv), ("embed", "kv_heads", None), in_axes=(0,),
                       out_axes=(1, 2))
    self.wo = weight(rngs, (N, Hv, D), ("heads", None, "embed"), in_axes=(0, 1), out_axes=(2,),
                     init=scaled_normal((2 * cfg.num_layers * N * Hv) ** -0.5))
    if cfg.qk_norm:
      self.q_norm = weight(rngs, (H,), (None,), init=ones)
      if owns_kv:
        self.k_norm = weight(rngs, (H,), (None,), init=ones)
    self.mlp_norm = weight(rngs, (D,), (None,), init=ones)
    self.mlp = Mlp(cfg, rngs=rngs) if cfg.moe is None else Experts(cfg, rngs=rngs)

  def project(self, x, rows: Rows):
    """The normed input y [B, T, D], q [B, T, N, H] and own k, v [B, T, K, .] or None, None."""
    cfg = self.cfg
    y = rms_norm(x, self.attn_norm[...], cfg.norm_eps)
    q = self._heads(y, self.wq)
    if cfg.qk_norm:
      q = rms_norm(q, self.q_norm[...], cfg.norm_eps)
    q = rotary(q, rows.positions, cfg.rope_base)
    if not self.owns_kv:
      return y, q, None, None
    k, v = self._heads(y, self.wk), self._heads(y, self.wv)
    if cfg.qk_norm:
      k = rms_norm(k, self.k_norm[...], cfg.norm_eps)
    return y, q, rotary(k, rows.positions, cfg.rope_base), v

  def finish(self, x, o):
    """Adds W_o o, then the FFN: [B, T, D], and the router's statistics or None."""
    x = x + jnp.einsum("btnh,nhd->btd", o, self.wo[...].astype(o.dtype))
    x = constrain(x, *STREAM)
    out, router = self.mlp(rms_norm(x, self.mlp_norm[...], self.cfg.norm_eps))
    return constrain(x + out, *STREAM), router

  def _heads(self, y, w):
    return jnp.einsum("btd,dnh->btnh", y, w[...].astype(y.dtype))


class FullLayer(Attention):
  """Full attention that tells, for every token, which key blocks mattered."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(cfg, owns_kv=True, rngs=rngs)

  def __call__(self, x, rows: Rows, num_blocks: int, cache: GroupCache | None, block):
    """x [B, T, D] -> x, SharedKV, block_indices i32 [B, K, T, P], cache, LayerStats.

    `num_blocks` is P; 0 when no layer follows that would use them.
    """
    cfg = self.cfg
    ranked = 0 if cfg.block_choice == "random" else num_blocks    # blocks the oracle is asked for
    options = dict(block_size=cfg.block_size, num_blocks=ranked)
    _, q, k, v = self.project(x, rows)
    if cache is None:
      shared = SharedKV(k, v)
      attend = lambda q, k, v, segments: oracle_attention(
        q, k, v, segment_ids=segments, implementation=cfg.implementation, **options)
      o, picked = per_device(attend, (HEADS, KV, KV, TOKENS), (HEADS, PICKED))(
        q, k, v, rows.segment_ids)
    else:
      cache = kv_cache.append_full(cache, block, k, v, rows.positions, rows.valid)
      shared = SharedKV(cache.full_k[block], cache.full_v[block])
      attend = lambda q, k, v, positions, block: cached_oracle_attention(
        q, k, v, positions, layer=block, **options)
      o, picked = per_device(attend, (HEADS, LAYER_KV, LAYER_KV, TOKENS, INDEX), (HEADS, PICKED))(
        q, cache.full_k, cache.full_v, rows.positions, block)
    if num_blocks and cfg.block_choice != "oracle":
      picked, cache = self._replaced(picked, rows, num_blocks, shared, cache, block)
    picked = checkpoint_name(picked, "block_indices")   # saved, so never recomputed differently
    x, router = self.finish(x, o)
    return x, shared, picked, cache, LayerStats(None, None, router)

  def _replaced(self, picked, rows: Rows, num_blocks, shared, cache, block):
    """The ablations' blocks in place of the oracle's, and the cache they need."""
    cfg = self.cfg
    shape = rows.positions.shape
    index, first, before = rows.positions, jnp.zeros(shape, jnp.int32), None
    if cache is None:
      index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
      first = block_choice.document_starts(rows.segment_ids, shape)
    if cfg.block_choice == "random":
      total = -(-shared.k.shape[1] // cfg.block_size)
      return block_choice.random_blocks(index, first, cfg.num_kv_heads, num_blocks,
                                        cfg.block_size, total), cache
    if cache is not None:
      before = cache.last_picked[block]
      cache = kv_cache.remember_picks(cache, block, picked, rows.valid)
    return block_choice.previous_blocks(picked, index == first, before), cache


class SparseLayer(Attention):
  """The full layer's blocks through its KV, a window through a KV of its own, gated and added."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(cfg, owns_kv=cfg.owns_local_kv, rngs=rngs)
    D, N = cfg.d_model, cfg.num_heads
    for branch, present in (("sparse", cfg.has_sparse_branch), ("local", cfg.has_local_branch)):
      if present and cfg.gate == "elementwise":
        gate = weight(rngs, (D, N, cfg.v_dim), ("embed", "heads", None), in_axes=(0,),
                      out_axes=(1, 2))
        setattr(self, f"w_gate_{branch}", gate)
      elif present and cfg.gate == "per_head":
        gate = weight(rngs, (D, N), ("embed", "heads"), in_axes=(0,), out_axes=(1,))
        setattr(self, f"w_gate_{branch}", gate)
      if present and cfg.sinks:
        setattr(self, f"sinks_{branch}", weight(rngs, (N,), ("heads",), init=zeros))

  def gates(self, y):
    """(sparse, local) sigmoid gates of y [B, T, D]: [B, T, N, Hv or 1]; None for no branch."""
    cfg = self.cfg
    if cfg.gate == "none":
      one = jnp.ones((*y.shape[:2], cfg.num_heads, 1), y.dtype)
      return one if cfg.has_sparse_branch else None, one if cfg.has_local_branch else None
    contract = "btd,dnh->btnh" if cfg.gate == "elementwise" else "btd,dn->btn"

    def gate(w):
      g = jax.nn.sigmoid(jnp.einsum(contract, y, w[...].astype(y.dtype)))
      return g if cfg.gate == "elementwise" else g[..., None]

    return (gate(self.w_gate_sparse) if cfg.has_sparse_branch else None,
            gate(self.w_gate_local) if cfg.has_local_branch else None)

  def sinks(self):
    """(sparse, local) sink logits f32 [N]; None for no sink or no branch."""
    cfg = self.cfg
    return (self.sinks_sparse[...] if cfg.sinks and cfg.has_sparse_branch else None,
            self.sinks_local[...] if cfg.sinks and cfg.has_local_branch else None)

  def __call__(self, x, shared: SharedKV, picked, rows: Rows, cache: GroupCache | None, block,
               layer, plan=None):
    """x [B, T, D], the full layer's KV and choice -> x, cache, LayerStats.

    `plan`: `plan_of` the choice, which the layers of a block share; None: each makes its own.
    """
    y, q, k, v = self.project(x, rows)
    gate_sparse, gate_local = self.gates(y)
    sink_sparse, sink_local = self.sinks()
    if cache is None:
      local = (k, v) if self.owns_kv else shared
      o = self._attend(q, shared, picked, plan, local, gate_sparse, gate_local, sink_sparse,
                       sink_local, rows.segment_ids)
    else:
      o, cache = self._attend_cached(q, shared, picked, k, v, gate_sparse, gate_local, sink_sparse,
                                     sink_local, rows, cache, block, layer)
    x, router = self.finish(x, o)
    mean = lambda g: None if g is None else jnp.mean(g, dtype=jnp.float32)
    return x, cache, LayerStats(mean(gate_sparse), mean(gate_local), router)

  def _attend(self, q, shared, picked, plan, local, gate_sparse, gate_local, sink_sparse,
              sink_local, segment_ids):
    cfg = self.cfg
    common = dict(implementation=cfg.implementation)
    sinks = ("heads",)
    if cfg.has_sparse_branch and cfg.has_local_branch:
      op = lambda q, ks, vs, ix, plan, kl, vl, gs, gl, ss, sl, seg: sparse_layer_attention(
        q, ks, vs, ix, kl, vl, gs, gl, ss, sl, block_size=cfg.block_size, window=cfg.window,
        segment_ids=seg, plan=_own(plan), **common)
      names = (HEADS, KV, KV, PICKED, SHARDS, KV, KV, HEADS, HEADS, sinks, sinks, TOKENS)
      return per_device(op, names, HEADS)(q, *shared, picked, plan, *local, gate_sparse,
                                          gate_local, sink_sparse, sink_local, segment_ids)
    if cfg.has_sparse_branch:
      op = lambda q, k, v, ix, plan, sink, seg: block_sparse_attention(
        q, k, v, ix, block_size=cfg.block_size, sinks=sink, segment_ids=seg, plan=_own(plan),
        **common)
      return gate_sparse * per_device(op, (HEADS, KV, KV, PICKED, SHARDS, sinks, TOKENS), HEADS)(
        q, *shared, picked, plan, sink_sparse, segment_ids)
    op = lambda q, k, v, sink, seg: sliding_window_attention(
      q, k, v, window=cfg.window, sinks=sink, segment_ids=seg, **common)
    return gate_local * per_device(op, (HEADS, KV, KV, sinks, TOKENS), HEADS)(
      q, *local, sink_local, segment_ids)

  def _attend_cached(self, q, shared, picked, k, v, gate_sparse, gate_local, sink_sparse,
                     sink_local, rows, cache, block, layer):
    cfg = self.cfg
    sinks = ("heads",)
    o = 0
    if cfg.has_sparse_branch:
      op = lambda q, k, v, ix, positions, sink, block: cached_block_sparse_attention(
        q, k, v, ix, positions, block_size=cfg.block_size, sinks=sink, layer=block)
      names = (HEADS, LAYER_KV, LAYER_KV, PICKED, TOKENS, sinks, INDEX)
      o = gate_sparse * per_device(op, names, HEADS)(
        q, cache.full_k, cache.full_v, picked, rows.positions, sink_sparse, block)
    if cfg.has_local_branch:
      if self.owns_kv:
        ring_k, ring_v = cache.ring_k[block, layer], cache.ring_v[block, layer]
        cache = kv_cache.append_ring(cache, block, layer, k, v, rows.positions, rows.valid)
      else:
        ring_k, k = kv_cache.ring_view(shared.k, rows.positions, cfg.window)
        ring_v, v = kv_cache.ring_view(shared.v, rows.positions, cfg.window)
      op = lambda q, kr, vr, k, v, positions, sink: cached_sliding_window_attention(
        q, kr, vr, k, v, positions, window=cfg.window, sinks=sink)
      o = o + gate_local * per_device(op, (HEADS, KV, KV, KV, KV, TOKENS, sinks), HEADS)(
        q, ring_k, ring_v, k, v, rows.positions, sink_local)
    return o, cache


class HybridBlock(nnx.Module):
  """One full layer and the `num_sparse` layers that live on what it returns."""

  def __init__(self, cfg: ModelConfig, num_sparse: int, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.num_sparse = num_sparse
    self.full = FullLayer(cfg, rngs=rngs)
    self.sparse = (stacked(lambda rngs: SparseLayer(cfg, rngs=rngs), num_sparse, rngs)
                   if num_sparse else None)

  def __call__(self, x, rows: Rows, cache: GroupCache | None, block):
    """x [B, T, D] -> x, cache, (stats of the full layer, stats of the others stacked [M])."""
    num_blocks = self.cfg.num_blocks if self.num_sparse and self.cfg.has_sparse_branch else 0
    full = _remat(self.cfg, "layer", lambda layer, *args: layer(*args), static_argnums=(3,))
    x, shared, picked, cache, stats = full(self.full, x, rows, num_blocks, cache, block)
    if not self.num_sparse:
      return x, cache, (stats, None)
    plan = plan_of(self.cfg, picked) if num_blocks and cache is None else None

    def step(carry, scanned):
      x, cache = carry
      index, layer = scanned
      x, cache, stats = layer(x, shared, picked, rows, cache, block, index, plan)
      return (x, cache), stats

    (x, cache), sparse_stats = jax.lax.scan(
      _remat(self.cfg, "layer", step), (x, cache), (jnp.arange(self.num_sparse), self.sparse))
    return x, cache, (stats, sparse_stats)


def plan_of(cfg: ModelConfig, picked):
  """What the kernels of a block's sparse layers derive from its choice, worked out once for all.

  picked i32 [B, K, T, P] -> a pytree that each device's shard leads by an axis of 1, or None.
  """
  make = lambda picked: jax.tree.map(lambda leaf: leaf[None], plan_blocks(
    picked, num_heads=picked.shape[1] * (cfg.num_heads // cfg.num_kv_heads),
    block_size=cfg.block_size, implementation=cfg.implementation))
  return per_device(make, (PICKED,), SHARDS)(picked)


def _own(plan):
  return jax.tree.map(lambda leaf: leaf[0], plan)


class HybridStack(nnx.Module):
  """All layers: per `LayerGroup`, a scan over its blocks."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.groups = nnx.List([
      stacked(lambda rngs, m=num_sparse: HybridBlock(cfg, m, rngs=rngs), count, rngs)
      for count, num_sparse in cfg.layer_groups])

  def __call__(self, x, rows: Rows, caches: tuple[GroupCache, ...] | None = None):
    """x [B, T, D] -> x, caches, per group the stats of its layers stacked [C] and [C, M]."""
    new_caches, all_stats = [], []

    def step(carry, scanned):
      x, cache = carry
      index, block = scanned
      x, cache, stats = block(x, rows, cache, index)
      return (x, cache), stats

    for index, (blocks, group) in enumerate(zip(self.groups, self.cfg.layer_groups)):
      cache = None if caches is None else caches[index]
      (x, cache), stats = jax.lax.scan(
        _remat(self.cfg, "block", step), (x, cache), (jnp.arange(group.count), blocks))
      new_caches.append(cache)
      all_stats.append(stats)
    return x, None if caches is None else tuple(new_caches), tuple(all_stats)


def by_layer(cfg: ModelConfig, stats) -> list[LayerStats]:
  """The stack's statistics as one `LayerStats` per layer, in order."""
  layers = []
  for (count, num_sparse), (full, sparse) in zip(cfg.layer_groups, stats):
    for c in range(count):
      layers.append(jax.tree.map(lambda leaf, c=c: leaf[c], full))
      for m in range(num_sparse):
        layers.append(jax.tree.map(lambda leaf, c=c, m=m: leaf[c, m], sparse))
  return layers


def _remat(cfg: ModelConfig, level: str, function, **kwargs):
  """`function`, recomputed in the backward pass if `cfg.remat` says so at this level.

  The oracle's choice is always saved: recomputed scores could differ in the last bit, and then
  forward and backward would attend to different blocks. So are, where a kernel names them, its
  output and log-sum-exp, which spare the backward pass a second run of the forward kernel.
  """
  if cfg.remat != level:
    return function
  keep = jax.checkpoint_policies.save_only_these_names(
    "block_indices", "oracle_block_indices", "oracle_out", "oracle_lse")
  return jax.checkpoint(function, policy=keep, prevent_cse=False, **kwargs)
