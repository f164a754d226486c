"""Times the attention kernels against cuDNN's dense attention in the same process.

    python -m experiments.bench_kernels --op=block_sparse_attention --shape=7b_32k --json

One row for each selection and pass: a short table, or with --json one JSON object a line, which
--append also adds to a file. A time is the median of 20 samples of queued calls. `floor_percent`
is the share of PEAK_TFLOPS, a large bf16 matrix product's measured rate, that useful work makes.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, rows, selections
from hysparse_jax.errors import UserError
from pallas_kernels import named_shapes
from pallas_kernels.block_sparse_attention import gpu as block_sparse_gpu
from pallas_kernels.hybrid_sparse_attention import gpu as hybrid_gpu
from pallas_kernels.oracle_attention import mosaic_gpu as oracle_gpu
from pallas_kernels.sliding_window_attention import gpu as window_gpu

OPS = ("oracle_attention", "block_sparse_attention", "sliding_window_attention",
       "hybrid_sparse_attention", "index_plan")
UNSELECTIVE = ("oracle_attention", "sliding_window_attention")   # take no picks
IMPL = {"oracle_attention": "mosaic_gpu+cudnn_backward"}
AT_32K = ("trace", "early", "walk r=0.5", "walk r=1", "walk r=2", "random")
ELSEWHERE = ("walk r=1", "random")
PEAK_TFLOPS = 790.0     # H200, 8192 x 8192 x 8192, random bf16

_OP = flags.DEFINE_list("op", ["block_sparse_attention"], "Which: " + ", ".join(OPS))
_SHAPE = flags.DEFINE_list("shape", ["7b_32k"], "Which of " + ", ".join(named_shapes.LARGE))
_SELECTION = flags.DEFINE_list("selection", None, "Which selections; default all of the shape.")
_PASS = flags.DEFINE_list("pass", ["fwd", "fwd_bwd"], "fwd, fwd_bwd or both.")
_SAMPLES = flags.DEFINE_integer("samples", 20, "Samples whose median counts.", lower_bound=1)
_HOT = flags.DEFINE_integer("hot_threshold", None, "Overrides the plan's default.")


def median_ms(run, *arguments):
  """Median over samples of the mean time of a few queued calls, in ms."""
  jax.block_until_ready(run(*arguments))
  start = time.perf_counter()
  jax.block_until_ready(run(*arguments))
  calls = max(1, min(32, int(0.05 / (time.perf_counter() - start))))
  samples = []
  for _ in range(_SAMPLES.value):
    start = time.perf_counter()
    for _ in range(calls):
      out = run(*arguments)
    jax.block_until_ready(out)
    samples.append((time.perf_counter() - start) / calls * 1e3)
  return statistics.median(samples)


def with_backward(forward):
  """forward(arrays, fixed) -> (out, aux); a function that also pulls dout back to every array."""
  def run(arrays, fixed, dout):
    out, pullback, aux = jax.vjp(lambda *a: forward(a, fixed), *arrays, has_aux=True)
    return out, aux, pullback(dout)
  return run


def useful_flops(picks, shape, name):
  """Multiply-adds x 2 of the visible (query, key) pairs: QK and PV, or with 2.5 times more."""
  token = np.arange(shape.tokens)
  group = shape.num_heads // shape.num_kv_heads
  if name == "oracle_attention":
    return 4.0 * (token + 1.0).sum() * shape.num_heads * shape.head_dim
  keys = np.zeros((), np.float64)
  if picks is not None:
    own = picks == (token // 64)[:, None]
    keys = keys + (picks >= 0).sum() * 64.0 - (own.any(-1) * (63 - token % 64)).sum()
  if name != "block_sparse_attention":
    keys = keys + np.minimum(token + 1, shape.window).sum() * shape.num_kv_heads
  return 4.0 * keys * group * shape.head_dim


def dense(arrays, _):
  """cuDNN's causal attention over every key."""
  return jax.nn.dot_product_attention(*arrays[:3], is_causal=True, implementation="cudnn"), ()


def make_call(op, shape, arrays):
  """forward(arrays, (indices, plan)) -> (out, aux) of an op, and the arrays it takes."""
  q, k, v, k_local, v_local, gate, sinks = arrays
  if op == "oracle_attention":
    return (lambda a, _: oracle_gpu.oracle_attention(
      *a, block_size=64, num_blocks=shape.num_blocks, segment_ids=None,
      scale=shape.head_dim ** -0.5)), (q, k, v)
  if op == "block_sparse_attention":
    return (lambda a, f: (block_sparse_gpu.block_sparse_attention(
      *a[:3], f[0], sinks=a[3], plan=f[1]), ())), (q, k, v, sinks)
  if op == "sliding_window_attention":
    return (lambda a, _: (window_gpu.sliding_window_attention(
      *a[:3], window=shape.window, sinks=a[3]), ())), (q, k, v, sinks)
  return (lambda a, f: (hybrid_gpu.hybrid_sparse_attention(
    a[0], a[1], a[2], f[0], a[3], a[4], a[5], a[6], sinks_sparse=a[7], sinks_local=a[7],
    window=shape.window, plan=f[1]), ())), (q, k, v, k_local, v_local, gate, gate, sinks)


def bench(shape_name, ops, names, passes, emit):
  """Rows of one shape; the dense peer is timed once, here, and shared by them."""
  shape = named_shapes.LARGE[shape_name]
  keys = jax.random.split(jax.random.key(0), 7)
  draw = lambda i, heads: jax.random.normal(
    keys[i], (shape.batch, shape.tokens, heads, shape.head_dim), jnp.bfloat16)
  n, k = shape.num_heads, shape.num_kv_heads
  arrays = (draw(0, n), draw(1, k), draw(2, k), draw(3, k), draw(4, k),
            jax.nn.sigmoid(draw(5, n)), jnp.linspace(-1.0, 2.0, n))
  dout = draw(6, n)
  planner = jax.jit(functools.partial(
    block_sparse_gpu.make_plan, group=n // k, hot_threshold=_HOT.value))
  compiled = {}                      # (op, pass): jitted once, the plan is an argument
  peer = {}
  if "fwd" in passes or "index_plan" in ops:
    peer["fwd"] = median_ms(jax.jit(dense), arrays[:3], None)
  if "fwd_bwd" in passes:
    peer["fwd_bwd"] = median_ms(jax.jit(with_backward(dense)), arrays[:3], None, dout)

  def time_op(op, row, picks, fixed):
    forward, inputs = make_call(op, shape, arrays)
    flops = useful_flops(picks, shape, op)
    for which in passes:
      given = (inputs, fixed) + (() if which == "fwd" else (dout,))
      if (op, which) not in compiled:
        run = jax.jit(forward if which == "fwd" else with_backward(forward))
        compiled[op, which] = run.lower(*given).compile()
      run = compiled[op, which]
      memory = run.memory_analysis()
      ms = median_ms(run, *given)
      tflops = flops * (1 if which == "fwd" else 3.5) / ms / 1e9
      emit(row | {"pass": which, "impl": IMPL.get(op, "mosaic_gpu+triton"), "ms": ms,
                  "peer": "cudnn_dense", "peer_ms": peer[which], "speedup": peer[which] / ms,
                  "useful_tflops": tflops, "floor_percent": 100 * tflops / PEAK_TFLOPS,
                  "temp_bytes": memory.temp_size_in_bytes,
                  "peak_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes
                  + memory.argument_size_in_bytes})

  for op in ops:
    if op in UNSELECTIVE:
      time_op(op, dict(op=op, shape=shape_name), None, ())
  selective = [op for op in ops if op not in UNSELECTIVE]
  for name in names or (AT_32K if shape.tokens == 32768 else ELSEWHERE) if selective else ():
    picks = selections.selection(name, k, shape.tokens)
    indices = jnp.asarray(picks)[None]
    plan = planner(indices)
    for op in selective:
      row = dict(op=op, shape=shape_name, selection=name)
      if op == "index_plan":
        ms = median_ms(planner, indices)
        emit(row | {"pass": "fwd", "impl": "xla", "ms": ms, "peer": "cudnn_dense",
                    "peer_ms": peer["fwd"], "speedup": peer["fwd"] / ms})
      else:
        time_op(op, row, picks, (indices, plan))


def main(argv):
  """Times what the flags name."""
  del argv
  for given, known, what in ((_OP.value, OPS, "op"), (_SHAPE.value, named_shapes.LARGE, "shape"),
                             (_PASS.value, ("fwd", "fwd_bwd"), "pass")):
    if not set(given) <= set(known):
      raise UserError(f"--{what}: got {','.join(given)}, want some of {', '.join(known)}")
  if jax.default_backend() != "gpu":
    raise UserError(f"needs a GPU, found {jax.default_backend()}")

  def emit(row):
    rows.emit(row, f"{row['op']:26} {row['shape']:8} {row.get('selection', ''):10} "
                   f"{row['pass']:8}{row['ms']:9.3f} ms {row['speedup']:7.2f}x dense"
                   f"{row.get('useful_tflops', 0):8.1f} TFLOP/s{row.get('floor_percent', 0):6.1f} %"
                   f"{row.get('peak_bytes', 0) / 2**30:7.2f} GiB")

  for shape_name in _SHAPE.value:
    bench(shape_name, _OP.value, _SELECTION.value, _PASS.value, emit)


if __name__ == "__main__":
  cli.run(main)
