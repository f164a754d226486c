"""Times decode attention over a paged cache against cuDNN without a selection, on one NVIDIA GPU.

    python -m experiments.bench.decode --op=full,sparse --batch=1,8,32 --shape=80b,7b
    python -m experiments.bench.decode --op=full --batch=1,8 --variants

A time is the median of samples of one jitted chain of calls, each call's output the next one's
query, divided by their number: launches count, dispatch does not. `tb_s` counts the keys and values
of every visible token once. `full` selects 16 blocks too; its peer selects none: cuDNN over a
contiguous cache, through `jax.nn.dot_product_attention`. `sparse` is both branches with gates and
sinks; the calls of a chain have a ring each and share their selected blocks, as the layers of a
hybrid block do; with --fresh each has blocks of its own. --check compares each result with the
reference first. --variants times other launch sizes.
"""

import dataclasses
import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
from hysparse_jax.errors import UserError
from pallas_kernels.paged_attention.shapes import SHAPES

from .. import cli, rows

OPS = ("full", "sparse")

_OP = flags.DEFINE_list("op", ["full", "sparse"], "Which of " + ", ".join(OPS))
_BATCH = flags.DEFINE_list("batch", ["1", "8"], "Sequences.")
_LENGTH = flags.DEFINE_list("length", ["131072"], "Tokens of each sequence.")
_SHAPE = flags.DEFINE_list("shape", ["80b"], "Which of " + ", ".join(SHAPES))
_CALLS = flags.DEFINE_integer("calls", 20, "Calls of a chain.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 10, "Samples whose median counts.", lower_bound=1)
_RAGGED = flags.DEFINE_bool("ragged", False, "Rows of length/B, 2 length/B, ... length tokens.")
_FRESH = flags.DEFINE_bool("fresh", False, "sparse: every call reads blocks of its own.")
_PEER = flags.DEFINE_bool("peer", True, "full: time cuDNN too.")
_CHECK = flags.DEFINE_bool("check", False, "Compare with the reference first.")
_VARIANTS = flags.DEFINE_bool("variants", False, "Time other launch sizes too.")


def median_us(chain, *arguments):
  """Median time of a call of `chain`, a jitted function of --calls calls, in microseconds."""
  run = jax.jit(chain).lower(*arguments).compile()
  jax.block_until_ready(run(*arguments))
  samples = []
  for _ in range(_SAMPLES.value):
    start = time.perf_counter()
    out = [run(*arguments) for _ in range(4)]
    jax.block_until_ready(out)
    samples.append((time.perf_counter() - start) / 4 / _CALLS.value * 1e6)
  return statistics.median(samples)


def draw(seed, *shape):
  """Standard normal bfloat16 on the device."""
  return jax.jit(functools.partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16))(
    jax.random.key(seed))


def lengths_of(batch, length):
  """Tokens of each row."""
  if not _RAGGED.value:
    return [length] * batch
  return [max(length * (b + 1) // batch, 1) for b in range(batch)]


def variants(op):
  """Launch configs: the default, and with --variants others around it."""
  from pallas_kernels.paged_attention.gpu import full, sparse

  if op == "full":
    found = [full.FullConfig()]
    if _VARIANTS.value:
      found += [full.FullConfig(programs=132 * each, num_warps=warps, num_stages=stages)
                for each, stages, warps in ((1, 5, 4), (1, 7, 4), (1, 7, 8), (2, 3, 4), (2, 4, 8),
                                            (3, 3, 4), (4, 2, 4), (5, 2, 4))]
      found += [full.FullConfig(finish_warps=warps) for warps in (4, 16)]
  else:
    found = [sparse.SparseConfig()]
    if _VARIANTS.value:
      found += [sparse.SparseConfig(tiles=tiles, num_warps=warps, num_stages=stages)
                for tiles, (stages, warps) in itertools.product(
                  (1, 2, 4, 9, 18), ((3, 4), (4, 4), (4, 8), (6, 4)))
                if not (tiles == 1 and stages > 3)]
      found += [sparse.SparseConfig(tiles=1, num_stages=1), sparse.SparseConfig(merge_warps=2)]
  return list(dict.fromkeys(found))


def cache_of(shape, batch, length):
  """k_pages, v_pages [1,R,K,64,H], a shuffled page table [B,U] and lengths [B]."""
  pages = -(-length // shape.block_size)
  table = np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages)
  pages = [draw(seed, 1, batch * pages, shape.num_kv_heads, shape.block_size, shape.head_dim)
           for seed in (1, 2)]
  return (*pages, jnp.asarray(table, jnp.int32), jnp.asarray(lengths_of(batch, length), jnp.int32))


def check(name, got, want):
  """Prints the error of `got` against `want`, both (out,) or (out, block_indices)."""
  error = jnp.linalg.norm((got[0] - want[0]).astype(jnp.float32)) / jnp.linalg.norm(
    want[0].astype(jnp.float32))
  line = f"check {name}: relative error {float(error):.2e}"
  if len(got) > 1:
    same = np.mean([len(np.intersect1d(a, b)) / a.size for a, b in zip(
      *(np.asarray(x).reshape(-1, x.shape[-1]) for x in (got[1], want[1])))])
    line += f", {100 * same:.2f} % of the selected blocks the same"
  print(line, flush=True)


def bench_full(shape, batch, length, emit):
  """Rows of the full layer's attention with selection."""
  from pallas_kernels.paged_attention.gpu import full

  q = draw(0, batch, shape.num_heads, shape.head_dim)
  cache = cache_of(shape, batch, length)
  options = dict(layer=jnp.int32(0), num_blocks=shape.num_blocks)
  if _CHECK.value:
    got = jax.jit(functools.partial(pallas_kernels.paged_oracle_attention, implementation="triton",
                                    **options))(q, *cache)
    want = jax.jit(functools.partial(pallas_kernels.paged_oracle_attention,
                                     implementation="reference", **options))(q, *cache)
    check("full", got, want)
  nbytes = sum(lengths_of(batch, length)) * shape.num_kv_heads * shape.head_dim * 2 * 2
  for config in variants("full"):
    def chain(q, *cache, config=config):
      for _ in range(_CALLS.value):
        q, blocks = full.paged_oracle_attention(q, *cache, scale=shape.head_dim ** -0.5,
                                                config=config, **options)
      return q, blocks

    emit(config, median_us(chain, q, *cache), nbytes)
  if not _PEER.value:
    return
  del cache
  contiguous = [draw(seed, batch, length, shape.num_kv_heads, shape.head_dim) for seed in (1, 2)]
  seen = jnp.asarray(lengths_of(batch, length), jnp.int32) if _RAGGED.value else None

  def cudnn(q, k, v):
    q = q[:, None]
    for _ in range(_CALLS.value):
      q = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=seen, implementation="cudnn")
    return q

  emit(None, median_us(cudnn, q, *contiguous), nbytes)


def bench_sparse(shape, batch, length, emit):
  """Rows of the sparse layer's attention."""
  from pallas_kernels.paged_attention.gpu import sparse

  q = draw(0, batch, shape.num_heads, shape.head_dim)
  k_pages, v_pages, table, lengths = cache_of(shape, batch, length)
  kv_heads, calls = shape.num_kv_heads, _CALLS.value
  rings = [draw(seed, calls, batch, kv_heads, shape.window, shape.head_dim) for seed in (3, 4)]
  gates = [jax.nn.sigmoid(draw(seed, batch, shape.num_heads, shape.head_dim)) for seed in (5, 6)]
  sinks = dict(sinks_sparse=jnp.linspace(-1.0, 2.0, shape.num_heads),
               sinks_local=jnp.linspace(2.0, -1.0, shape.num_heads))
  rng = np.random.default_rng(1)
  blocks = []
  for _ in range(calls if _FRESH.value else 1):
    picked = np.full((batch, kv_heads, shape.num_blocks), -1, np.int32)
    for b, k in np.ndindex(batch, kv_heads):
      some = rng.permutation(-(-int(lengths[b]) // shape.block_size))[:shape.num_blocks]
      picked[b, k, :some.size] = np.sort(some)
    blocks.append(jnp.asarray(picked))
  # Arguments, so that no call copies a slice of them.
  layers = [jnp.int32(i) for i in range(calls)]
  options = dict(layer=jnp.int32(0), scale=shape.head_dim ** -0.5, **sinks)

  def call(q, k_pages, v_pages, blocks, table, lengths, rings, gates, layer, config=None):
    return sparse.paged_sparse_layer_attention(
      q, k_pages, v_pages, blocks, table, lengths, *rings, *gates, ring_layer=layer, config=config,
      **options)

  if _CHECK.value:
    arguments = (q, k_pages, v_pages, blocks[0], table, lengths, *rings, *gates)
    want = jax.jit(functools.partial(
      pallas_kernels.paged_sparse_layer_attention, implementation="reference",
      ring_layer=layers[0], **options))(*arguments)
    got = jax.jit(call)(*arguments[:6], rings, gates, layers[0])
    check("sparse", (got,), (want,))
  picked_tokens = sum(int((b >= 0).sum()) for b in blocks) / len(blocks) * shape.block_size
  nbytes = (picked_tokens + batch * kv_heads * shape.window) * shape.head_dim * 2 * 2
  for config in variants("sparse"):
    def chain(q, k_pages, v_pages, blocks, table, lengths, rings, gates, layers, config=config):
      for i in range(calls):
        q = call(q, k_pages, v_pages, blocks[i % len(blocks)], table, lengths, rings, gates,
                 layers[i], config)
      return q

    emit(config, median_us(chain, q, k_pages, v_pages, blocks, table, lengths, rings, gates,
                           layers), nbytes)


def report(found, batch, config, us, nbytes):
  """Prints a timing and adds it to `found`: config (None: cuDNN), us, TB/s."""
  found.append((config, us, nbytes / us / 1e6))
  settings = "cuDNN" if config is None else " ".join(
    f"{key}={value}" for key, value in dataclasses.asdict(config).items())
  print(f"  {us:9.2f} us {us / batch:8.2f} a sequence {nbytes / us / 1e6:6.3f} TB/s  {settings}",
        flush=True)


def main(argv):
  """Times what the flags name."""
  del argv
  for given, known, what in ((_OP.value, OPS, "op"), (_SHAPE.value, SHAPES, "shape")):
    if not set(given) <= set(known):
      raise UserError(f"--{what}: got {','.join(given)}, want some of {', '.join(known)}")
  if jax.default_backend() != "gpu":
    raise UserError(f"found {jax.default_backend()}; these kernels need an NVIDIA GPU")
  for name, batch, length, op in itertools.product(_SHAPE.value, map(int, _BATCH.value),
                                                   map(int, _LENGTH.value), _OP.value):
    print(f"{jax.devices()[0].device_kind}: {op} {name} batch {batch} length {length}", flush=True)
    found = []
    emit = functools.partial(report, found, batch)
    {"full": bench_full, "sparse": bench_sparse}[op](SHAPES[name], batch, length, emit)
    best = min((x for x in found if x[0] is not None), key=lambda x: x[1])
    peer = next((x for x in found if x[0] is None), None)
    default = found[0]
    row = dict(op=op, shape=name, batch=batch, length=length, ragged=_RAGGED.value,
               fresh=op == "sparse" and _FRESH.value, us=default[1], tb_s=default[2],
               best_us=best[1], best=str(best[0]), peer="cudnn_dense" if peer else None,
               peer_us=peer and peer[1], speedup=peer and peer[1] / default[1])
    rows.emit(row, f"  default {default[1]:.2f} us, {default[2]:.3f} TB/s; best {best[1]:.2f} us"
                   + (f"; cuDNN {peer[1]:.2f} us, {peer[2]:.3f} TB/s" if peer else ""))


if __name__ == "__main__":
  cli.run(main)
