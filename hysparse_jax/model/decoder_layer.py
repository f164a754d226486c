"""What full, sparse and window layers have in common: projections, output, FFN, residuals.

Axis letters: B batch, T tokens, D model, N query heads, K KV heads, H head dim of queries and keys,
Hv of values.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hysparse_jax.config import ModelConfig
from hysparse_jax.model.fused import split
from hysparse_jax.model.layers import (
  Mlp,
  ones,
  product,
  rms_norm,
  rotary,
  scaled_normal,
  weight,
  zeros,
)
from hysparse_jax.model.moe import Experts
from hysparse_jax.sharding import STREAM, constrain
from pallas_kernels import implementations


class TokenContext(NamedTuple):
  """Positions, segment ids and validity of the input tokens; the same for every layer.

  With a cache, positions are those of consecutive tokens of one sequence, valid ones first.
  """

  positions: jax.Array                  # i32 [B, T], within the document
  segment_ids: jax.Array | None = None  # i32 [B, T], 0 is padding; None: one document per row
  valid: jax.Array | None = None        # bool [B, T], False for padding; None: there is none
  page_table: jax.Array | None = None   # i32 [B, U], of the cache; None: there is no cache

  @property
  def key_range(self) -> dict:
    """Which keys are before which queries, as arguments of the attention ops."""
    if self.page_table is None:
      return {"segment_ids": self.segment_ids}
    return {"query_offset": self.positions[:, 0]}

  @property
  def lengths(self):
    """i32 [B]: tokens in the cache when these are appended; 0 for a row without a valid one."""
    return jnp.max(jnp.where(self.valid, self.positions + 1, 0), axis=1)

  def decodes(self, cfg: ModelConfig) -> bool:
    """Whether the paged ops run: one token per row, and no local branch without a ring."""
    return (self.page_table is not None and self.positions.shape[1] == 1
            and not cfg.local_shares_kv)

  def unrolled(self, cfg: ModelConfig) -> bool:
    """Whether the scans over layers are unrolled: a GPU's loop would copy a layer's weights before
    it multiplies by them, which costs a decoded token as much again twice over."""
    return self.decodes(cfg) and implementations.platform() == "gpu"


class DecoderLayer(nnx.Module):
  """What both kinds of layers have: pre-norm projections, output projection, FFN, residuals."""

  def __init__(self, cfg: ModelConfig, kind: str, *, rngs: nnx.Rngs):
    D, N, K, H, Hv = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.v_dim
    self.cfg, self.kind = cfg, kind
    matrix = partial(weight, rngs, in_axes=(0,), out_axes=(1, 2))
    self.attn_norm = weight(rngs, (D,), (None,), init=ones)
    self.wq = matrix((D, N, H), ("embed", "heads", None))
    if cfg.owns_kv(kind):
      self.wk = matrix((D, K, H), ("embed", "kv_heads", None))
      self.wv = matrix((D, K, Hv), ("embed", "kv_heads", None))
    self.wo = weight(rngs, (N, Hv, D), ("heads", None, "embed"), in_axes=(0, 1), out_axes=(2,),
                     init=scaled_normal((2 * cfg.num_layers * N * Hv) ** -0.5))
    if cfg.qk_norm:
      self.q_norm = weight(rngs, (H,), (None,), init=ones)
      if cfg.owns_kv(kind):
        self.k_norm = weight(rngs, (H,), (None,), init=ones)
    self.mlp_norm = weight(rngs, (D,), (None,), init=ones)
    self.mlp = Mlp(cfg, rngs=rngs) if cfg.moe is None else Experts(cfg, rngs=rngs)

  @jax.named_scope("project")
  def project(self, x, context: TokenContext):
    """What the layer attends with.

    Returns:
      q [B, T, N, H]; own k, v [B, T, K, .] or None, None; and what `gates` takes.
    """
    cfg, rope = self.cfg, self.cfg.rope_of(self.kind)
    y = rms_norm(x, self.attn_norm[...], cfg.norm_eps)
    k = v = None
    if hasattr(self, "w_in"):          # `fused`
      q, k, v, gate_inputs = self._from_fused(y)
    else:
      heads = lambda w: product("btd,dnh->btnh", y, w[...])
      q, gate_inputs = heads(self.wq), (y, y)
      if cfg.owns_kv(self.kind):
        k, v = heads(self.wk), heads(self.wv)
    turned = lambda h, gain: rotary(
      rms_norm(h, gain[...], cfg.norm_eps) if cfg.qk_norm else h, context.positions, rope)
    q = turned(q, getattr(self, "q_norm", None))
    if k is not None:
      k = turned(k, getattr(self, "k_norm", None))
    return q, k, v, gate_inputs

  def _from_fused(self, y):
    """q, k, v of one product, and the gates' pre-activations (sparse, local)."""
    cfg = self.cfg
    N, K, H, Hv = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.v_dim
    branches = (self.kind == "sparse", cfg.has_local_branch(self.kind))
    gate = {"elementwise": [(N, Hv)], "per_head": [(N, 1)], "none": []}[cfg.gate]
    kv = [(K, H), (K, Hv)] if cfg.owns_kv(self.kind) else []
    z = product("btd,dx->btx", y, self.w_in[...])
    q, *rest = split(z, (N, H), *kv, *gate * sum(branches))
    k, v = rest[:2] if kv else (None, None)
    gates = iter(rest[len(kv):])
    return q, k, v, tuple(next(gates, None) if there else None for there in branches)

  def finish(self, x, o, context: TokenContext):
    """Adds W_o o, then the FFN: [B, T, D], and the router's statistics or None."""
    with jax.named_scope("out"):
      x = constrain(x + product("btnh,nhd->btd", o, self.wo[...]), *STREAM)
    with jax.named_scope("mlp" if self.cfg.moe is None else "moe"):
      y = rms_norm(x, self.mlp_norm[...], self.cfg.norm_eps)
      out, router = self.mlp(y, context.valid)
      return constrain(x + out, *STREAM), router


class Branch(nnx.Module):
  """The gate and the sink logits of one branch of a sparse layer."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    D, N = cfg.d_model, cfg.num_heads
    if cfg.gate == "elementwise":
      self.gate = weight(rngs, (D, N, cfg.v_dim), ("embed", "heads", None), in_axes=(0,),
                         out_axes=(1, 2))
    elif cfg.gate == "per_head":
      self.gate = weight(rngs, (D, N), ("embed", "heads"), in_axes=(0,), out_axes=(1,))
    else:
      self.gate = None
    self.sinks = weight(rngs, (N,), ("heads",), init=zeros) if cfg.sinks else None

  def __call__(self, y):
    """Sigmoid gates [B, T, N, Hv or 1] and sink logits f32 [N], or None each.

    y is [B, T, D]; of a fused layer the gates before the sigmoid, [B, T, N, Hv or 1] or None.
    """
    gate = sinks = None
    if self.gate is not None:
      w = self.gate[...]
      y = product("btd,dnh->btnh", y, w if w.ndim == 3 else w[..., None])
    if y is not None and y.ndim == 4:
      gate = jax.nn.sigmoid(y)
    if self.sinks is not None:
      sinks = self.sinks[...]
    return gate, sinks
