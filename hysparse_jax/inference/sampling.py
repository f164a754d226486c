"""Turning logits into text: temperature, top-k, top-p, a seed, stop tokens, a stream."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hysparse_jax import sharding
from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError
from hysparse_jax.inference.text_stream import TextStream
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.transformer import Transformer, check_tokens
from hysparse_jax.seeds import key_of
from pallas_kernels import implementations

# Tokens per prefill call of longer prompts: on the CPU the reference holds a score of each with
# every key before it.
PREFILL_CHUNK = {"cpu": 512, "gpu": 8192, "tpu": 8192}
SHORTEST = 64         # tokens that a cache has room for at least
SMALLEST_VIEW = 2048  # tokens of a cache below which a prefill call looks at all of it


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def sample_token(logits, key, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
  """Draws one token per row.

  Args:
    logits: f32 [B, V].
    key: a PRNG key.
    temperature: 0 takes the most likely token (ties: the lowest).
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p.

  Returns:
    i32 [B]; -1 for a row with a NaN logit.
  """
  broken = jnp.isnan(logits).any(axis=-1)
  if temperature == 0:
    return jnp.where(broken, -1, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
  return jnp.where(broken, -1, _drawn(logits, key, temperature, top_k, top_p))


def sample_rows(logits, keys, temperature, top_k, top_p):
  """Draws one token per row, each with settings and a key of its own, as `sample_token` of the row
  alone.

  Args:
    logits: f32 [B, V].
    keys: PRNG keys [B].
    temperature, top_p: f32 [B].
    top_k: i32 [B].

  Returns:
    i32 [B]; -1 for a row with a NaN logit.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  tokens = jax.lax.cond(
    jnp.any(temperature > 0), lambda: jnp.where(temperature > 0, jax.vmap(_drawn)(
      logits, keys, jnp.where(temperature > 0, temperature, 1), top_k, top_p), greedy),
    lambda: greedy)
  return jnp.where(jnp.isnan(logits).any(axis=-1), -1, tokens)


def _drawn(logits, key, temperature, top_k, top_p):
  """i32 [...] drawn from logits f32 [..., V], the temperature above 0."""
  logits = logits / temperature
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  rank = jnp.arange(ranked.shape[-1])
  keep = (rank < top_k) | (jnp.asarray(top_k) == 0)
  probability = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  # At 1 the sum's rounding would cut the tail.
  keep &= (before < top_p) | (rank == 0) | (jnp.asarray(top_p) >= 1)
  choice = jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf), axis=-1)
  return jnp.take_along_axis(order, choice[..., None], axis=-1)[..., 0].astype(jnp.int32)


def padded_length(tokens: int) -> int:
  """The next of 64, 96, 128, 192, 256, 384, ...: shapes that prompts of many lengths share.

  At most half of it more than asked for, and two programs for each doubling of the length.
  """
  power = 1 << max(tokens - 1, SHORTEST - 1).bit_length()
  return power * 3 // 4 if SHORTEST <= tokens <= power * 3 // 4 else power


def visible_tokens(end: int, room: int) -> int:
  """The smallest of room, room / 4, room / 16, ... that is at least `end` and SMALLEST_VIEW.

  What a prefill call of a prompt's tokens up to `end` looks at: a long prompt's first chunks do not
  pay for its last ones, with few programs.
  """
  while room >= 4 * max(end, SMALLEST_VIEW):
    room //= 4
  return room


class _Programs(NamedTuple):
  """The jitted calls of one model; every cache they return has the same placement."""

  empty_cache: Callable   # (batch, max_tokens) -> DecodeState
  prefill: Callable       # (model, tokens i32 [B, T], cache, lengths, num_pages) -> logits, cache
  decode: Callable        # (model, tokens i32 [B], cache) -> logits, cache


def decode_options() -> dict:
  """XLA's options for a program that decodes.

  On a GPU products read a layer's part of stacked weights in place (only cuBLAS's do, and only with
  dynamic-slice fusion), and none is merged with another by copying both weights side by side.
  """
  if implementations.platform() != "gpu":
    return {}
  return {"xla_gpu_enable_dynamic_slice_fusion": True, "xla_gpu_enable_triton_gemm": False,
          "xla_gpu_dot_merger_threshold_mb": 0}


def mesh_of(model: Transformer) -> jax.sharding.Mesh | None:
  """The mesh that the weights were placed on; None if none was named."""
  place = jax.tree.leaves(model)[0].sharding
  mesh = place.mesh if isinstance(place, NamedSharding) else None
  return mesh if isinstance(mesh, jax.sharding.Mesh) else None


def _programs_of(model: Transformer) -> _Programs:
  return _programs(model.cfg, mesh_of(model))


@functools.lru_cache(maxsize=8)
def _programs(cfg: ModelConfig, mesh: jax.sharding.Mesh | None) -> _Programs:
  """Jits the calls for weights on `mesh`, or for weights that no mesh was named for.

  A cache that is not placed like the one that prefill returns would compile prefill once more.
  """
  places = None
  if mesh is not None:
    rows = sharding.batch_shards()
    places = kv_cache.shardings(jax.eval_shape(lambda: kv_cache.init_cache(cfg, rows, 1)), mesh)
  jit = functools.partial(jax.jit, donate_argnames="cache", out_shardings=(None, places))
  return _Programs(
    empty_cache=jax.jit(functools.partial(kv_cache.init_cache, cfg), static_argnums=(0, 1),
                        out_shardings=places),
    prefill=jit(lambda model, tokens, cache, lengths, num_pages: model.prefill(
      tokens, cache, lengths, num_pages), static_argnames="num_pages"),
    decode=jit(lambda model, tokens, cache: model.decode(tokens, cache),
               compiler_options=decode_options()))


def generate(model: Transformer, prompt, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, stop_tokens: tuple[int, ...] = (),
             on_token: Callable[[np.ndarray], bool | None] | None = None) -> np.ndarray:
  """Continues every row of a prompt.

  Args:
    model: a Transformer.
    prompt: i32 [B, T], T at least 1.
    max_new_tokens: how many to add at most.
    temperature, top_k, top_p: as in `sample_token`.
    seed: of the draws; the same seed gives the same text.
    stop_tokens: a row that draws one of them is done and repeats it from there on.
    on_token: called with each step's tokens, i32 [B], as they come; returning True ends it.

  Returns:
    i32 [B, up to max_new_tokens], shorter when every row is done before.

  Raises:
    UserError: an empty prompt, a token outside the vocabulary, an impossible setting.
    FloatingPointError: the model's logits are NaN.
  """
  prompt = np.asarray(prompt)
  if prompt.ndim != 2:
    raise UserError(f"the prompt has shape {prompt.shape}; give rows of tokens, [B, T]")
  if prompt.size == 0:
    raise UserError(f"the prompt is empty (shape {prompt.shape}); give at least one token per row")
  check_tokens(prompt, model.cfg.vocab_size)
  prompt = prompt.astype(np.int32)
  check_settings(max_new_tokens, temperature, top_k, top_p, seed)
  mesh, rows = mesh_of(model), prompt.shape[0]
  if mesh is not None and mesh.size > 1:      # as many rows as its batch axes can split
    parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    prompt = np.pad(prompt, ((0, -rows % parts), (0, 0)), mode="edge")
  with contextlib.nullcontext() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh):
    return _generate(
      model, prompt, rows, max_new_tokens, key_of(seed), stop_tokens, on_token,
      temperature=temperature, top_k=top_k, top_p=top_p)


def _generate(model, prompt, rows, max_new_tokens, key, stop_tokens, on_token, **settings):
  """`generate` of checked arguments; of the prompt's rows the first `rows` count."""
  batch, length = prompt.shape
  programs = _programs_of(model)
  cache = programs.empty_cache(batch, padded_length(length + max_new_tokens))
  size = min(padded_length(length), PREFILL_CHUNK[implementations.platform()])
  room = cache.max_tokens
  for start in range(0, length, size):
    chunk = prompt[:, start:start + size]
    used = chunk.shape[1]
    chunk = np.pad(chunk, ((0, 0), (0, size - used)))
    logits, cache = programs.prefill(
      model, chunk, cache, np.full((batch,), used, np.int32),
      num_pages=kv_cache.pages_for(model.cfg, visible_tokens(start + used, room)))
  done = np.zeros((rows,), bool)
  out: list[np.ndarray] = []
  for index in range(max_new_tokens):
    tokens = np.asarray(sample_token(logits[:rows], jax.random.fold_in(key, index), **settings))
    if (tokens < 0).any():
      raise FloatingPointError(f"the logits of new token {index} are NaN; the weights are broken")
    if out:
      tokens = np.where(done, out[-1], tokens)
    out.append(tokens)
    ended = on_token is not None and on_token(tokens)
    done |= np.isin(tokens, stop_tokens)
    if ended or done.all() or index == max_new_tokens - 1:
      break
    logits, cache = programs.decode(
      model, np.pad(tokens, (0, batch - rows), mode="edge"), cache)
  return np.stack(out, axis=1)


def generate_text(model: Transformer, tokenizer, prompt: str, max_new_tokens: int, *,
                  stop: str | None = None, on_text: Callable[[str], None] | None = None,
                  **settings) -> str:
  """Continues a text: `decode(prompt + new)` after `decode(prompt)`, without the first `stop`.

      run = load_run("runs/tiny")       # of hysparse_jax.inference.load
      print(generate_text(run.model, run.tokenizer, "def main(", 200, temperature=0.8, seed=1))

  Args:
    model: a Transformer.
    tokenizer: has `encode(str) -> i32 [T]` and `decode(ids) -> str`.
    prompt: at least one token long.
    max_new_tokens: how many to add at most.
    stop: ends the text where it would begin; None: nothing does.
    on_text: called with each further piece of the text as soon as later tokens cannot change it.
    **settings: temperature, top_k, top_p, seed and stop_tokens of `generate`.

  Raises:
    UserError, FloatingPointError: as `generate`, and for an empty stop string.
  """
  if stop == "":
    raise UserError("the stop string is empty; leave it out to stop nowhere")
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"the prompt is not valid Unicode at character {error.start}; give UTF-8 "
                    "text") from error
  ids = np.asarray(tokenizer.encode(prompt))
  stream = TextStream(tokenizer, stop, ids)
  shown = []

  def show(text):
    shown.append(text)
    if on_text is not None and text:
      on_text(text)

  def on_token(tokens):
    show(stream.add(int(tokens[0])))
    return stream.stopped

  generate(model, ids[None], max_new_tokens, on_token=on_token, **settings)
  show(stream.finish())
  return "".join(shown)


def check_settings(max_new_tokens, temperature, top_k, top_p, seed):
  """Raises a UserError naming the first setting of `generate` that is impossible."""
  if max_new_tokens < 1:
    raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
  if not temperature >= 0:
    raise UserError(f"temperature is {temperature}; it must be at least 0")
  if top_k < 0:
    raise UserError(f"top_k is {top_k}; it must be at least 0 (0 keeps all)")
  if not 0 <= seed < 2**63:
    raise UserError(f"seed is {seed}; it must be at least 0 and less than 2**63")
  if not 0 < top_p <= 1:
    raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
