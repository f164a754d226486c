"""Runs every attention op on this machine's device and compares it with the float32 reference.

    python -m experiments.check_kernels --implementation=mosaic_tpu [--json]

Per op and shape: the relative error of the output and of every gradient, how many rows picked
other blocks than the reference (they may only where two blocks tie within float32's rounding), and
whether two runs gave the same bits. Exits with 1 if an error is larger than bfloat16's rounding
explains or if a pick is wrong.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
from hysparse_jax.errors import UserError
from pallas_kernels.named_shapes import AttentionShape
from pallas_kernels.oracle_attention.reference import pad_keys
from pallas_kernels.reference.block_selection import select_blocks
from pallas_kernels.reference.masked_attention import (
  causal_arrays,
  causal_mask,
  masked_attention,
)

from .. import cli

SHAPES = {
  "g4": AttentionShape(tokens=1000, num_heads=8, num_kv_heads=2, head_dim=128, num_blocks=8),
  "g16": AttentionShape(tokens=1024, num_heads=16, num_kv_heads=1, head_dim=128, num_blocks=8),
  "g1_narrow": AttentionShape(batch=2, tokens=520, num_heads=2, head_dim=64, num_blocks=4),
}
OPS = ("oracle_attention", "block_sparse_attention", "sliding_window_attention",
       "hybrid_sparse_attention")
LIMIT = 1e-2      # ||x - ref|| / ||ref||; operands, probabilities and result have 8 bits each
TIE = 2e-5        # closer log weights are equal: float32 sums of 128 products in another order

PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu", "triton": "gpu"}

flags.declare_key_flag(cli.JSON)
_IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Of the ops; None: the platform's.")


def inputs(shape: AttentionShape, segmented: bool):
  """(q, k, v, k_local, v_local, gates, sinks, dout, segment_ids or None), bfloat16."""
  keys = iter(jax.random.split(jax.random.key(0), 10))
  draw = lambda heads: jax.random.normal(
    next(keys), (shape.batch, shape.tokens, heads, shape.head_dim), jnp.bfloat16)
  n, k = shape.num_heads, shape.num_kv_heads
  segments = None
  if segmented:     # two documents, padding, one more
    part = jnp.searchsorted(jnp.asarray([0.4, 0.7, 0.8]) * shape.tokens, jnp.arange(shape.tokens))
    segments = jnp.broadcast_to(jnp.asarray([1, 2, 0, 3], jnp.int32)[part],
                                (shape.batch, shape.tokens))
  return (draw(n), draw(k), draw(k), draw(k), draw(k), jax.nn.sigmoid(draw(n)),
          jnp.linspace(-1.0, 2.0, n), draw(n), segments)


def log_weights(q, k, segment_ids, kv_segment_ids=None, query_offset=0):
  """f32 [B,K,T,C]: each block's largest log softmax weight, -inf where no key is visible."""
  kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
  queries, keys = causal_arrays(
    q, k, k, query_offset=query_offset, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids,
    scale=q.shape[-1] ** -0.5)
  keys = pad_keys(keys, -k.shape[1] % 64)
  return masked_attention(queries["q"], keys["k"], keys["v"], causal_mask(queries, keys),
                          block_size=64)[1]


def wrong_picks(picked, scores) -> tuple[int, int]:
  """(rows that picked other blocks than float32 would, those of them that no tie excuses)."""
  picked, scores = np.asarray(picked), np.asarray(scores)
  want = np.asarray(select_blocks(jnp.asarray(scores), picked.shape[-1]))
  other = list(zip(*np.nonzero((picked != want).any(-1))))
  wrong = 0
  for at in other:
    got, expected = set(picked[at].tolist()) - {-1}, set(want[at].tolist()) - {-1}
    missed, extra = sorted(expected - got), sorted(got - expected)
    fits = (len(got) == len(expected) and missed
            and scores[at][missed].max() - scores[at][extra].min() < TIE)
    wrong += not fits
  return len(other), wrong


def check(op: str, shape: AttentionShape, segmented: bool, implementation: str | None) -> dict:
  """One op at one shape, forward and gradients; the fields of a row."""
  q, k, v, k_local, v_local, gates, sinks, dout, segments = inputs(shape, segmented)
  scores = jax.jit(log_weights)(q, k, segments)
  picks = select_blocks(scores, shape.num_blocks)
  arrays, fixed = {
    "oracle_attention": ((q, k, v), dict(num_blocks=shape.num_blocks)),
    "block_sparse_attention": ((q, k, v), dict(block_indices=picks, sinks=sinks)),
    "sliding_window_attention": ((q, k, v), dict(window=shape.window, sinks=sinks)),
    "hybrid_sparse_attention": (
      (q, k, v, k_local, v_local, gates, 1 - gates),
      dict(block_indices=picks, window=shape.window, sinks_sparse=sinks, sinks_local=-sinks)),
  }[op]

  @functools.partial(jax.jit, static_argnums=0)
  def run(name, arrays, fixed_arrays, dout):
    options = dict(fixed) | fixed_arrays
    indices = (options.pop("block_indices"),) if "block_indices" in options else ()
    def forward(q, k, v, *rest):
      out = getattr(pallas_kernels, op)(q, k, v, *indices, *rest, segment_ids=segments,
                                        implementation=name, **options)
      return out if isinstance(out, tuple) else (out, jnp.zeros((0,), jnp.int32))
    out, pullback, aux = jax.vjp(forward, *arrays, has_aux=True)
    return out, aux, pullback(dout.astype(out.dtype))

  traced = {key: value for key, value in fixed.items() if isinstance(value, jax.Array)}
  first, again = (run(implementation, arrays, traced, dout) for _ in range(2))
  single = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, dout))
  want = run("reference", single[0], traced, single[1])
  errors = [_relative(x, y) for x, y in zip((first[0], *first[2]), (want[0], *want[2]))]
  same = all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), first, again)))
  row = {"op": op, "segmented": segmented, "error": errors[0], "gradient_error": max(errors[1:]),
         "same_bits_twice": same, "ok": bool(max(errors) < LIMIT)}
  if op == "oracle_attention":
    row["other_picks"], row["wrong_picks"] = wrong_picks(first[1], scores)
    row["ok"] &= row["wrong_picks"] == 0
  return row


def _relative(got, want) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def main(argv):
  """Checks every op at every shape, with and without segments."""
  del argv
  needed, found = PLATFORMS.get(_IMPLEMENTATION.value), jax.default_backend()
  if needed not in (None, found):
    raise UserError(f"--implementation={_IMPLEMENTATION.value} needs a {needed}, found {found}")
  failed = 0
  for name, shape in SHAPES.items():
    for op in OPS:
      for segmented in (False, True):
        row = {"shape": name} | check(op, shape, segmented, _IMPLEMENTATION.value)
        failed += not row["ok"]
        print(cli.to_json(row) if cli.JSON.value else
              f"{'ok ' if row['ok'] else 'BAD'} {op:26} {name:10} "
              f"{'segments' if segmented else '        '} out {row['error']:.1e} gradients "
              f"{row['gradient_error']:.1e} same bits {row['same_bits_twice']}", flush=True)
  if failed:
    print(f"error: {failed} comparisons failed", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
