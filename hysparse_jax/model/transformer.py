"""Embedding, hybrid stack and head: one forward for training, prefill and decoding.

Axis letters: B batch, T tokens, D model, V vocab.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.cache import DecodeState
from hysparse_jax.model.decoder_layer import TokenContext
from hysparse_jax.model.hybrid import HybridStack
from hysparse_jax.model.layers import (
  ones,
  positions_within,
  product,
  rms_norm,
  scaled_normal,
  weight,
)
from hysparse_jax.sharding import STREAM, constrain
from pallas_kernels import implementations


class Transformer(nnx.Module):
  """A decoder-only language model with the layer pattern of `cfg.layer_kinds`.

      logits = model(tokens, segment_ids)                              # i32 [B,T] -> f32 [B,T,V]
      logits, cache = model.prefill(tokens, model.init_cache(B, S))    # last token's, f32 [B,V]
      logits, cache = model.decode(next_tokens, cache)                 # i32 [B] -> f32 [B,V]
  """

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    D, V = cfg.d_model, cfg.vocab_size
    self.cfg = cfg
    self.embedding = weight(rngs, (V, D), ("vocab", "embed"), init=scaled_normal(0.02))
    self.stack = HybridStack(cfg, rngs=rngs)
    self.final_norm = weight(rngs, (D,), (None,), init=ones)
    if not cfg.tied_embeddings:
      self.head = weight(rngs, (D, V), ("embed", "vocab"), in_axes=(0,), out_axes=(1,))

  def __call__(self, tokens, segment_ids=None, positions=None):
    """i32 [B, T] -> logits f32 [B, T, V].

    Args:
      tokens: i32 [B, T]. A token outside [0, V) makes its row NaN.
      segment_ids: i32 [B, T], documents never see each other; 0 is padding. None: one per row.
      positions: i32 [B, T]. None: counted from the start of each document.
    """
    hidden, _ = self.hidden(tokens, segment_ids, positions)
    return self.logits(hidden)

  def hidden(self, tokens, segment_ids=None, positions=None):
    """i32 [B, T] -> (normed last hidden state [B, T, D], `LayerStats` of the stack)."""
    if positions is None:
      positions = positions_within(segment_ids, tokens.shape)
    valid = None if segment_ids is None else segment_ids != 0
    x, _, stats = self.stack(self.embed(tokens), TokenContext(positions, segment_ids, valid))
    return rms_norm(x, self.final_norm[...], self.cfg.norm_eps), stats

  @jax.named_scope("embed")
  def embed(self, tokens):
    """i32 [B, T] -> [B, T, D] in the compute dtype."""
    inside = jnp.where(tokens < 0, self.cfg.vocab_size, tokens)      # so that -1 is no last row
    # Rounded after the look-up: the gradient of a row adds up in float32, over every such token.
    x = self.embedding[...].at[inside].get(mode="fill", fill_value=jnp.nan)
    return constrain(x.astype(self.cfg.dtype), *STREAM)

  @jax.named_scope("head")
  def logits(self, hidden):
    """[..., D] -> f32 [..., V]."""
    head = self.embedding[...].T if self.cfg.tied_embeddings else self.head[...]
    return _scores(hidden, head.astype(hidden.dtype))

  def init_cache(self, batch: int, max_tokens: int, num_pages: int | None = None) -> DecodeState:
    """An empty cache for `batch` sequences of at most `max_tokens` tokens each; see `cache.py`."""
    return kv_cache.init_cache(self.cfg, batch, max_tokens, num_pages)

  def prefill(self, tokens, cache: DecodeState, lengths=None, num_pages: int | None = None):
    """Appends a chunk of tokens to the cache; call it again for the next chunk.

    Args:
      tokens: i32 [B, T], padded at the end where `lengths` is shorter than T.
      cache: what `init_cache` or an earlier call returned.
      lengths: i32 [B], tokens of each row that count; 0 leaves the row as it is, and its logits
        mean nothing; None: all.
      num_pages: pages that hold every row after this call: the work is in proportion to them. None:
        all that the page table has room for.

    Returns:
      f32 [B, V], the logits after each row's last token, and the cache.

    Raises:
      UserError: a token outside the vocabulary or a row without room. Under `jax.jit`, where
        values are not known, the logits of such a row are NaN instead.
    """
    batch, count = tokens.shape
    lengths = jnp.full((batch,), count if lengths is None else lengths, jnp.int32)
    self._check(tokens, cache, lengths)
    steps = jnp.arange(count, dtype=jnp.int32)[None]
    table = cache.page_table[:, :num_pages]
    context = TokenContext(cache.length[:, None] + steps, valid=steps < lengths[:, None],
                           page_table=table)
    x, groups, _ = self.stack(self.embed(tokens), context, cache.groups)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    logits = self.logits(rms_norm(last, self.final_norm[...], self.cfg.norm_eps))[:, 0]
    length = cache.length + lengths
    overflow = (lengths < 0) | (lengths > count)
    if cache.block_size is not None:
      overflow |= length > jnp.sum(table >= 0, axis=1) * cache.block_size
    return (jnp.where(overflow[:, None], jnp.nan, logits),
            cache._replace(length=length, groups=groups))

  def decode(self, tokens, cache: DecodeState, lengths=None):
    """Appends one token per sequence: i32 [B] -> f32 [B, V], the cache. As `prefill` in the rest:
    lengths i32 [B] are 1, or 0 for a row that has no token."""
    return self.prefill(tokens[:, None], cache, lengths)

  def _check(self, tokens, cache, lengths):
    known = [x for x in (tokens, cache.length, lengths) if not isinstance(x, jax.core.Tracer)]
    if len(known) < 3:
      return
    tokens, used, lengths = (np.asarray(x) for x in known)
    check_tokens(tokens, self.cfg.vocab_size)
    if used.shape != (tokens.shape[0],):
      raise UserError(f"the cache holds {used.shape[0]} sequences, got {tokens.shape[0]} rows")
    if (lengths < 0).any() or (lengths > tokens.shape[1]).any():
      raise UserError(f"lengths {lengths.tolist()} must be between 0 and the {tokens.shape[1]} "
                      "tokens given")
    if (used + lengths > cache.max_tokens).any():
      raise UserError(f"the cache has room for {cache.max_tokens} tokens, {int(used.max())} are "
                      f"in it and {int(lengths.max())} more were given; make it larger with "
                      "init_cache(batch, max_tokens)")


@jax.custom_vjp
def _scores(hidden, head):
  """[..., D] x [D, V] -> f32 [..., V]; the cotangent is rounded to the operands' dtype.

  Left in float32 it would turn both products of the backward pass, a tenth of a training step,
  into float32 ones.
  """
  return product("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def _scores_bwd(saved, grad):
  hidden, head = saved
  grad = grad.astype(hidden.dtype)
  rows = tuple(range(hidden.ndim - 1))
  return jnp.einsum("...v,dv->...d", grad, head), jnp.tensordot(hidden, grad, axes=(rows, rows))


_scores.defvjp(lambda hidden, head: (_scores(hidden, head), (hidden, head)), _scores_bwd)


def check_tokens(tokens, vocab_size: int):
  """Raises a UserError naming the first token (of a NumPy array) outside the vocabulary."""
  tokens = np.asarray(tokens)
  outside = (tokens < 0) | (tokens >= vocab_size)
  if outside.any():
    raise UserError(f"token {int(tokens[outside][0])} is outside the vocabulary of "
                    f"{vocab_size}; tokens are 0 to {vocab_size - 1}")


def implementations_of(cfg: ModelConfig, batch: int, tokens: int, *,
                       decode: bool = False) -> dict[str, str]:
  """{op: the implementation that runs}, found by tracing; nothing is compiled or run.

  Call it under the mesh (`jax.set_mesh`) or the default device of the run.

  Args:
    cfg: of the model.
    batch: B, rows over all devices.
    tokens: T of a training step, forward and backward; or S, the room of the cache.
    decode: of one decoded token instead of a training step.

  Raises:
    NotImplementedError: an op has no implementation for these sizes.
  """
  model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  with implementations.recorded() as names:
    if decode:
      cache = jax.eval_shape(lambda: kv_cache.init_cache(cfg, batch, tokens))
      jax.eval_shape(lambda model, ids, cache: model.decode(ids, cache), model, ids(batch), cache)
    else:
      total = lambda model, ids: jnp.sum(model.hidden(ids, ids)[0].astype(jnp.float32))
      jax.eval_shape(jax.grad(total), model, ids(batch, tokens))
  return {op: " and ".join(chosen) for op, chosen in names.items()}
