"""The compiled calls of the engine: on one slot of the cache, or on all of them at once.

Every call takes the cache's arrays, donated, and returns them; lengths, page table and settings
come from the host. No shape depends on which requests are running.

Axis letters: B slots, T new tokens of one slot, U pages a sequence has room for, V vocab, W window.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hysparse_jax.config import ModelConfig
from hysparse_jax.inference.sampling import decode_options, sample_rows
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.cache import DecodeState


class Settings(NamedTuple):
  """How each row's next token is drawn."""

  key: np.ndarray            # u32 [B, .], data of the request's PRNG key
  number: np.ndarray         # i32 [B], of the token among the request's new ones, from 0
  temperature: np.ndarray    # f32 [B]
  top_k: np.ndarray          # i32 [B]
  top_p: np.ndarray          # f32 [B]
  logprobs: np.ndarray       # bool [B], whether they are wanted


class Drawn(NamedTuple):
  """Tokens drawn, and log-probabilities of the model's own distribution (0 if none are wanted)."""

  token: jax.Array           # i32 [B], -1 for a row with a NaN logit
  logprob: jax.Array         # f32 [B], the token's
  top_tokens: jax.Array      # i32 [B, n], the most likely
  top_logprobs: jax.Array    # f32 [B, n], theirs, descending


class Programs(NamedTuple):
  """The jitted calls of one model; `groups` is `DecodeState.groups`, `last` i32 [B] what each slot
  drew last: a token need not come to the host before the next one is decoded."""

  empty: Callable        # (slots, max_tokens, num_pages) -> groups, last
  prefill: Callable      # (model, groups, last, slot, tokens [1, T], start, used, table [1, U],
                         #  settings, num_pages) -> Drawn of B = 1, groups, last
  decode: Callable       # (model, groups, last, tokens [B], lengths, active, table [B, U],
                         #  settings) -> Drawn, groups, last; a token of -1 is `last`
  take_rings: Callable   # (groups, slot) -> rings
  put_rings: Callable    # (groups, slot, rings) -> groups


@functools.lru_cache(maxsize=8)
def programs(cfg: ModelConfig, mesh: jax.sharding.Mesh | None, most_logprobs: int) -> Programs:
  """Jits the calls for weights on `mesh`, or for weights that no mesh was named for."""
  places = None
  if mesh is not None:
    places = kv_cache.shardings(
      jax.eval_shape(lambda: kv_cache.init_cache(cfg, 1, 1)), mesh).groups
  drawn = functools.partial(_drawn, most_logprobs=most_logprobs)

  def empty(slots, max_tokens, num_pages):
    groups = kv_cache.init_cache(cfg, slots, max_tokens, num_pages).groups
    return groups, jnp.zeros((slots,), jnp.int32)

  def prefill(model, groups, last, slot, tokens, start, used, table, settings, num_pages):
    state = DecodeState(start[None], table, _with_rings(groups, _take_rings(groups, slot)))
    logits, state = model.prefill(tokens, state, used[None], num_pages)
    rings, out = [group.rings for group in state.groups], drawn(logits, settings)
    return (out, _put_rings(state.groups, slot, rings, groups),
            jax.lax.dynamic_update_slice(last, out.token, (slot,)))

  def decode(model, groups, last, tokens, lengths, active, table, settings):
    logits, state = model.decode(jnp.where(tokens < 0, last, tokens),
                                 DecodeState(lengths, table, groups), active)
    out = drawn(logits, settings)
    return out, state.groups, jnp.where(active > 0, out.token, last)

  whole = (None if mesh is None else
           jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  jit = functools.partial(jax.jit, donate_argnames="groups", out_shardings=(None, places, whole))
  return Programs(
    empty=jax.jit(empty, static_argnums=(0, 1, 2), out_shardings=(places, whole)),
    prefill=jit(prefill, static_argnames="num_pages"),
    decode=jit(decode, compiler_options=decode_options()),
    take_rings=jax.jit(_take_rings),
    put_rings=jax.jit(lambda groups, slot, rings: _put_rings(groups, slot, rings, groups),
                      donate_argnames="groups", out_shardings=places))


def _take_rings(groups, slot):
  """Rings [L, 1, K, W, .] of one slot, per group."""
  take = lambda ring: jax.lax.dynamic_slice_in_dim(ring, slot, 1, axis=1)
  return [jax.tree.map(take, group.rings) for group in groups]


def _put_rings(groups, slot, rings, into):
  """`groups` with the rings of `into`, in which those of one slot are replaced."""
  put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)
  return _with_rings(groups, [jax.tree.map(put, group.rings, new)
                              for group, new in zip(into, rings)])


def _with_rings(groups, rings):
  return tuple(group._replace(rings=new) for group, new in zip(groups, rings))


@jax.named_scope("sample")
def _drawn(logits, settings: Settings, most_logprobs: int) -> Drawn:
  """Draws from logits f32 [B, V]."""
  keys = jax.random.wrap_key_data(jnp.asarray(settings.key))
  keys = jax.vmap(jax.random.fold_in)(keys, settings.number)
  token = sample_rows(logits, keys, settings.temperature, settings.top_k, settings.top_p)

  def measured():
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    best, which = jax.lax.top_k(logprobs, most_logprobs)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
    return Drawn(token, chosen, which.astype(jnp.int32), best)

  def unmeasured():
    rows = token.shape[0]
    return Drawn(token, jnp.zeros((rows,)), jnp.zeros((rows, most_logprobs), jnp.int32),
                 jnp.zeros((rows, most_logprobs)))

  return jax.lax.cond(jnp.any(settings.logprobs), measured, unmeasured)
