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
from hysparse_jax.model.layers import Mlp, ones, rms_norm, rotary, scaled_normal, weight, zeros
from hysparse_jax.model.moe import Experts
from hysparse_jax.sharding import STREAM, constrain


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
    """The normed input y [B, T, D], q [B, T, N, H] and own k, v [B, T, K, .] or None, None."""
    cfg, rope = self.cfg, self.cfg.rope_of(self.kind)
    y = rms_norm(x, self.attn_norm[...], cfg.norm_eps)
    heads = lambda w: jnp.einsum("btd,dnh->btnh", y, w[...].astype(y.dtype))
    norm = lambda h, gain: rms_norm(h, gain[...], cfg.norm_eps)
    q = heads(self.wq)
    q = rotary(norm(q, self.q_norm) if cfg.qk_norm else q, context.positions, rope)
    if not cfg.owns_kv(self.kind):
      return y, q, None, None
    k = heads(self.wk)
    k = rotary(norm(k, self.k_norm) if cfg.qk_norm else k, context.positions, rope)
    return y, q, k, heads(self.wv)

  def finish(self, x, o, context: TokenContext):
    """Adds W_o o, then the FFN: [B, T, D], and the router's statistics or None."""
    with jax.named_scope("out"):
      x = constrain(x + jnp.einsum("btnh,nhd->btd", o, self.wo[...].astype(o.dtype)), *STREAM)
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
    """y [B, T, D] -> sigmoid gates [B, T, N, Hv or 1] and sink logits f32 [N], or None each."""
    gate = sinks = None
    if self.gate is not None:
      w = self.gate[...].astype(y.dtype)
      gate = jax.nn.sigmoid(jnp.einsum("btd,dnh->btnh", y, w if w.ndim == 3 else w[..., None]))
    if self.sinks is not None:
      sinks = self.sinks[...]
    return gate, sinks
