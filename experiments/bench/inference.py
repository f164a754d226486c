"""Times prefill and decoding of a config and of its baselines on one machine, random weights.

    python -m experiments.bench.inference --config=configs/hysparse_80b_a3b.py \
        --set model.moe=None --set model.d_ff=4096 --what=prefill,decode --length=131072 \
        [--batch=1,fill] [--baselines=full,swa] [--profile=20] [--json]

decode: a token a sequence, at `length` tokens each, greedy, one dispatch a token and no wait
between them: milliseconds a step, tokens/s, and the time over that of its bytes (weights and what
the step reads of the cache, once each, at --memory_tb_s). --batch=fill takes as many sequences as
the memory holds. prefill: a prompt of `length` tokens in chunks of --chunk: seconds.
"""

import functools
import gc
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from hysparse_jax import accounting
from hysparse_jax.errors import UserError
from hysparse_jax.inference.load import with_dtype
from hysparse_jax.inference.sampling import decode_options, visible_tokens
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.fused import fused
from hysparse_jax.model.transformer import Transformer

from .. import cli, rows
from .profile import print_kernels

WHAT = ("decode", "prefill")

for _flag in (cli.CONFIG, cli.SET, cli.JSON):
  flags.declare_key_flag(_flag)
flags.adopt_module_key_flags(rows)
_WHAT = flags.DEFINE_list("what", ["decode"], "Which of " + ", ".join(WHAT))
_BASELINES = flags.DEFINE_list("baselines", ["full"], "Which baselines beside it: full, swa.")
_BATCH = flags.DEFINE_list("batch", ["1"], "Sequences; fill: as many as the memory holds.")
_LENGTH = flags.DEFINE_list("length", ["131072"], "Tokens of each sequence.")
_CHUNK = flags.DEFINE_list("chunk", ["8192"], "Tokens of a prefill call.")
_STEPS = flags.DEFINE_integer("steps", 24, "Decoded tokens of a sample.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 3, "Samples whose median counts.", lower_bound=1)
_MEMORY = flags.DEFINE_float("memory_tb_s", 3.35, "TB/s of the memory (3.35: H100's datasheet).")
_PROFILE = flags.DEFINE_integer("profile", 0, "Kernels to list, longest first.")
_NAME = flags.DEFINE_string("name", None, "Name of the rows; default the config's.")


def random_model(cfg) -> Transformer:
  """A model with random bfloat16 weights, fused as for decoding."""
  return fused(jax.jit(lambda key: with_dtype(Transformer(cfg, rngs=nnx.Rngs(key)), "bfloat16"))(
    jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def filled_cache(cfg, batch: int, length: int) -> kv_cache.DecodeState:
  """A cache with `length` tokens a sequence and room for 128 more, all of them noise."""
  empty = functools.partial(kv_cache.init_cache, cfg, batch, length + 128)
  table = empty().page_table           # of the empty cache nothing else is made

  def noise(x):
    index = sum(jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(prime)
                for axis, prime in enumerate((7919, 104729, 1299709, 15485863, 179424673)))
    bits = (index * jnp.uint32(0x9E3779B9)) ^ (index >> 7)
    return ((bits >> 16).astype(jnp.float32) / 32768 - 1).astype(x.dtype)

  return kv_cache.DecodeState(jnp.full((batch,), length, jnp.int32), table,
                              jax.tree.map(noise, jax.eval_shape(empty).groups))


def weight_bytes(model) -> int:
  """Of what a decoded token reads: all weights but the embedding's other rows."""
  total = sum(x.nbytes for x in jax.tree.leaves(model))
  return total if model.cfg.tied_embeddings else total - model.embedding[...].nbytes


def filling_batch(cfg, model, length: int) -> int:
  """Sequences whose caches fit beside the weights, 4 % of the memory left to the step."""
  stats = jax.local_devices()[0].memory_stats()
  one = jax.eval_shape(lambda: kv_cache.init_cache(cfg, 1, length + 128))
  bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
  free = 0.96 * stats["bytes_limit"] - sum(x.nbytes for x in jax.tree.leaves(model))
  return max(int(free // bytes_), 0)


def profiled(run):
  """Runs `run()`; with --profile, prints its kernels."""
  if not _PROFILE.value:
    return run()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      result = run()
    print_kernels(folder, _PROFILE.value)
  return result


def decode(cfg, model, batch: int, length: int) -> dict:
  """The fields of a row that decoding at `length` tokens a sequence measures."""
  @functools.partial(jax.jit, donate_argnums=2, compiler_options=decode_options())
  def step(model, tokens, cache):
    logits, cache = model.decode(tokens, cache)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

  tokens, cache = jnp.zeros((batch,), jnp.int32), filled_cache(cfg, batch, length)
  compiled = step.lower(model, tokens, cache).compile()
  memory = compiled.memory_analysis()
  samples = []

  def sample():
    nonlocal tokens, cache
    for _ in range(_STEPS.value):
      tokens, cache = compiled(model, tokens, cache)
    jax.block_until_ready(tokens)

  for _ in range(_SAMPLES.value + 1):
    cache = cache._replace(length=jnp.full((batch,), length, jnp.int32))
    start = time.perf_counter()
    sample()
    samples.append((time.perf_counter() - start) / _STEPS.value)
  cache = cache._replace(length=jnp.full((batch,), length, jnp.int32))
  profiled(sample)
  seconds = statistics.median(samples[1:])
  read = weight_bytes(model) + batch * accounting.account(
    cfg, length).kv_read_bytes_per_decoded_token
  floor = read / (_MEMORY.value * 1e12)
  return {"ms": seconds * 1e3, "tokens_per_second": batch / seconds, "floor_ms": floor * 1e3,
          "over_floor": seconds / floor, "temp_bytes": memory.temp_size_in_bytes}


def prefill(cfg, model, batch: int, length: int, chunk: int) -> dict:
  """The fields of a row that a prompt of `length` tokens measures."""
  step = jax.jit(lambda model, tokens, cache, num_pages: model.prefill(
    tokens, cache, num_pages=num_pages), static_argnums=3, donate_argnums=2)
  tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, cfg.vocab_size, jnp.int32)
  programs, temporaries = {}, 0

  def prompt():
    nonlocal temporaries
    cache = jax.jit(kv_cache.init_cache, static_argnums=(0, 1, 2))(cfg, batch, length)
    for start in range(0, length, chunk):
      part = tokens[:, start:start + chunk]
      seen = visible_tokens(min(start + chunk, length), length)
      key = kv_cache.pages_for(cfg, seen), part.shape[1]
      if key not in programs:
        programs[key] = step.lower(model, part, cache, key[0]).compile()
        temporaries = max(temporaries, programs[key].memory_analysis().temp_size_in_bytes)
      logits, cache = programs[key](model, part, cache)
    return jax.block_until_ready(logits)

  prompt()
  start = time.perf_counter()
  logits = prompt()
  seconds = time.perf_counter() - start
  profiled(prompt)
  if jnp.isnan(logits).any():
    raise FloatingPointError("the logits are NaN")
  return {"seconds": seconds, "tokens_per_second": batch * length / seconds, "chunk": chunk,
          "temp_bytes": temporaries}


def main(argv):
  """Times what the flags name."""
  del argv
  cfg = cli.load_config().model
  known = accounting.baselines(cfg)
  for name, values, allowed in (("baselines", _BASELINES.value, known),
                                ("what", _WHAT.value, WHAT)):
    unknown = sorted(set(values) - set(allowed))
    if unknown:
      raise UserError(f"--{name}: got {','.join(unknown)}, want some of {', '.join(allowed)}")
  for attention, of in ({cfg.attention: cfg} | {n: known[n] for n in _BASELINES.value}).items():
    model = random_model(of)
    for what in _WHAT.value:
      for length in map(int, _LENGTH.value):
        for given in _BATCH.value:
          batch = filling_batch(of, model, length) if given == "fill" else int(given)
          row = {"op": what, "shape": _NAME.value or cli.CONFIG.value, "attention": attention,
                 "layers": of.num_layers, "tokens": length, "batch": batch, "fill": given == "fill"}
          if what == "decode":
            row |= decode(of, model, batch, length)
            rows.emit(row, f"{attention:9}decode  {length:8,} x {batch:<4}{row['ms']:9.2f} ms"
                           f"{row['over_floor']:7.2f}x its bytes"
                           f"{row['tokens_per_second']:10.1f} tokens/s"
                           f"{row['temp_bytes'] / 2**30:8.2f} GiB temporaries")
            continue
          for chunk in map(int, _CHUNK.value):
            rows.emit(row | (found := prefill(of, model, batch, length, chunk)),
                      f"{attention:9}prefill {length:8,} x {batch:<4}{found['seconds']:9.2f} s"
                      f"  chunks of {chunk:<6}{found['tokens_per_second']:10,.0f} tokens/s"
                      f"{found['temp_bytes'] / 2**30:8.2f} GiB temporaries")
          gc.collect()
    del model
    gc.collect()
    jax.clear_caches()


if __name__ == "__main__":
  cli.run(main)
