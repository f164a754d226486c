"""Times the attention kernels against the platform's dense attention in the same process.

    python -m experiments.bench_kernels --op=block_sparse_attention --shape=7b_32k --json
    python -m experiments.bench_kernels --platform=tpu_static --op=oracle_attention --shape=7b_32k

One row for each selection and pass: a short table, or with --json one JSON object a line, which
--append also adds to a file. A time is the median of 20 samples of queued calls. `floor_percent`
is the share of PEAK_TFLOPS, a large bf16 matrix product's measured rate, that useful work makes.

--platform=gpu needs a Hopper GPU, its peer is cuDNN; --platform=tpu a TPU, its peer is splash
attention; --platform=tpu_static needs neither: it counts the instruction bundles of the TPU
compiler's schedules (`experiments.tpu_static.cost.row`). Counts are not timings.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
from hysparse_jax.errors import UserError
from pallas_kernels import named_shapes, tpu

from .. import cli, rows
from . import selections

OPS = ("oracle_attention", "block_sparse_attention", "sliding_window_attention",
       "hybrid_sparse_attention", "index_plan")
COUNTED = OPS[:4]
UNSELECTIVE = ("oracle_attention", "sliding_window_attention")   # take no selection
PASSES = {"gpu": ("fwd", "fwd_bwd"), "tpu": ("fwd", "fwd_bwd"), "tpu_static": ("fwd", "bwd")}
KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
PEERS = {"gpu": "cudnn_dense", "tpu": "splash"}
AT_32K = ("trace", "early", "walk r=0.5", "walk r=1", "walk r=2", "random")
ELSEWHERE = ("walk r=1", "random")
PEAK_TFLOPS = 790.0     # H200, 8192 x 8192 x 8192, random bf16

flags.declare_key_flag(cli.JSON)
flags.adopt_module_key_flags(rows)
_PLATFORM = flags.DEFINE_enum("platform", "gpu", list(PASSES), "What runs, or is counted.")
_GENERATION = flags.DEFINE_list("generation", ["v5e", "v5p", "v6e"], "TPUs of tpu_static.")
_OP = flags.DEFINE_list("op", ["block_sparse_attention"], "Which: " + ", ".join(OPS))
_SHAPE = flags.DEFINE_list("shape", ["7b_32k"], "Which of " + ", ".join(named_shapes.LARGE))
_SELECTION = flags.DEFINE_list("selection", None, "Which selections; default all of the shape.")
_PASS = flags.DEFINE_list("pass", None, "Which of fwd and fwd_bwd (tpu_static: bwd); default all.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Samples whose median counts.", lower_bound=1)
_HOT = flags.DEFINE_integer("hot_threshold", None, "Of the GPU's plan, instead of the default.")


def median_ms(run, *arguments):
  """Median over samples of the mean time of a few queued calls, in ms."""
  jax.block_until_ready(run(*arguments))
  start = time.perf_counter()
  jax.block_until_ready(run(*arguments))
  calls = max(1, min(32, int(0.05 / (time.perf_counter() - start))))
  samples = []
  for _ in range(_REPEATS.value):
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


def dense(platform, shape):
  """forward(arrays, _) -> (out, aux): causal attention over every key, by the platform's peer."""
  if platform == "gpu":
    return lambda arrays, _: (jax.nn.dot_product_attention(
      *arrays[:3], is_causal=True, implementation="cudnn"), ())
  from . import splash  # TPU kernels, slow to import

  kernel = splash.causal_attention(shape)
  return lambda arrays, _: (
    kernel(arrays[0] * shape.head_dim ** -0.5, *arrays[1:3]), ())


def make_call(op, shape, arrays, implementation):
  """forward(arrays, (indices, plan)) -> (out, aux) of an op, and the arrays it takes."""
  q, k, v, k_local, v_local, gate, sinks = arrays
  run = functools.partial(getattr(pallas_kernels, op), implementation=implementation)
  if op == "oracle_attention":
    return (lambda a, _: run(*a, num_blocks=shape.num_blocks)), (q, k, v)
  if op == "block_sparse_attention":
    return (lambda a, f: (run(*a[:3], f[0], sinks=a[3], plan=f[1]), ())), (q, k, v, sinks)
  if op == "sliding_window_attention":
    return (lambda a, _: (run(*a[:3], window=shape.window, sinks=a[3]), ())), (q, k, v, sinks)
  return (lambda a, f: (run(*a[:3], f[0], *a[3:7], a[7], a[7], window=shape.window, plan=f[1]),
                        ())), (q, k, v, k_local, v_local, gate, gate, sinks)


def make_planner(shape, implementation):
  """indices -> the plan that the selective ops take, jitted."""
  if _HOT.value is not None:
    from pallas_kernels.block_sparse_attention.gpu import op as gpu
    return jax.jit(functools.partial(
      gpu.make_plan, group=shape.num_heads // shape.num_kv_heads, num_keys=shape.tokens,
      query_offset=0, hot_threshold=_HOT.value))
  return jax.jit(functools.partial(
    pallas_kernels.plan_blocks, num_heads=shape.num_heads, implementation=implementation))


def bench(platform, shape_name, ops, names, passes, emit):
  """Rows of one shape; the dense peer is timed once, here, and shared by them."""
  shape = named_shapes.LARGE[shape_name]
  keys = jax.random.split(jax.random.key(0), 7)
  draw = lambda i, heads: jax.random.normal(
    keys[i], (shape.batch, shape.tokens, heads, shape.head_dim), jnp.bfloat16)
  n, k = shape.num_heads, shape.num_kv_heads
  arrays = (draw(0, n), draw(1, k), draw(2, k), draw(3, k), draw(4, k),
            jax.nn.sigmoid(draw(5, n)), jnp.linspace(-1.0, 2.0, n))
  dout = draw(6, n)
  planner = make_planner(shape, KERNELS[platform])
  whole = dense(platform, shape)
  compiled = {}                      # (op, pass): jitted once, the plan is an argument
  peer = {}
  if "fwd" in passes or "index_plan" in ops:
    peer["fwd"] = median_ms(jax.jit(whole), arrays[:3], None)
  if "fwd_bwd" in passes:
    peer["fwd_bwd"] = median_ms(jax.jit(with_backward(whole)), arrays[:3], None, dout)

  def time_op(op, row, picks, fixed):
    forward, inputs = make_call(op, shape, arrays, KERNELS[platform])
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
      if platform == "gpu":
        row |= {"floor_percent": 100 * tflops / PEAK_TFLOPS}
      emit(row | {"pass": which, "impl": KERNELS[platform], "ms": ms, "peer": PEERS[platform],
                  "peer_ms": peer[which], "speedup": peer[which] / ms, "useful_tflops": tflops,
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
        emit(row | {"pass": "fwd", "impl": "xla", "ms": ms, "peer": PEERS[platform],
                    "peer_ms": peer["fwd"], "speedup": peer["fwd"] / ms})
      else:
        time_op(op, row, picks, (indices, plan))


def count(op, shape_name, generation, which, peers):
  """Rows of `tpu_cost` or `tpu_sparse_cost`, with their ratios to the kernels compared with.

  peer_ms, speedup: dense splash attention's, forward with residuals or its two backward kernels.
  The oracle's forward has too: over_no_maxima and over_splash, its bundles over those of the same
  kernel without maxima and selection and over splash's; step_over_no_maxima and step_over_splash,
  the same of one step, by FLOPs.

  peers: {(op, shape, generation, pass): row} counted so far; grows.
  """
  from ..tpu_static import cost as tpu_cost
  from ..tpu_static import sparse_cost as tpu_sparse_cost

  if (op, which) == ("hybrid_sparse_attention", "bwd"):
    return                  # the backward kernels of the two ops before it, which have their rows

  def beside(peer):
    key = peer, shape_name, generation, which
    if key not in peers:
      peers[key] = tpu_cost.row(*key)
    return peers[key]

  if op in UNSELECTIVE:
    counted = [tpu_cost.row(op, shape_name, generation, which)]
  else:
    counted = tpu_sparse_cost.rows(op, shape_name, generation, which)
  splash = beside("splash_attention")
  for row in counted:
    row |= {"peer": "splash", "peer_ms": splash["estimated_ms"],
            "speedup": splash["estimated_ms"] / row["estimated_ms"]}
    if (op, which) == ("oracle_attention", "fwd"):
      for name, peer in (("no_maxima", beside("causal_attention")), ("splash", splash)):
        row |= {f"over_{name}": row["bundles"] / peer["bundles"],
                f"step_over_{name}": peer["mxu_share"] / row["mxu_share"]}
    yield row


def counted_line(row):
  """A row of `count` for people."""
  line = (f"{row['op']:24} {row['shape']:8} {row.get('selection', ''):8} {row['generation']} "
          f"{row['pass']}{row['bundles_per_step']:6} bundles a step,{100 * row['mxu_share']:4.0f}"
          f" % of the MXU floor,{row['estimated_ms']:8.2f} ms estimated,"
          f"{row['speedup']:6.2f}x splash")
  if "over_no_maxima" in row:
    line += (f"; bundles {row['over_no_maxima']:.3f} of without maxima, "
             f"{row['over_splash']:.3f} of splash with residuals")
  return line


def main(argv):
  """Times or counts what the flags name."""
  del argv
  platform = _PLATFORM.value
  passes = _PASS.value or PASSES[platform]
  ops, shapes = (OPS, named_shapes.LARGE)
  if platform == "tpu_static":
    ops, shapes = COUNTED, named_shapes.PAPER
  for given, known, what in ((_OP.value, ops, "op"), (_SHAPE.value, shapes, "shape"),
                             (passes, PASSES[platform], "pass"),
                             (_GENERATION.value, tpu.GENERATIONS, "generation")):
    if not set(given) <= set(known):
      raise UserError(f"--{what}: got {','.join(given)}, want some of {', '.join(known)}")
  if platform == "tpu_static":
    peers = {}
    for shape_name in _SHAPE.value:
      for generation in _GENERATION.value:
        for op in _OP.value:
          for which in passes:
            for row in count(op, shape_name, generation, which, peers):
              rows.emit(row, counted_line(row), device=None)
    return
  if jax.default_backend() != platform:
    raise UserError(f"--platform={platform}: found {jax.default_backend()}")

  def emit(row):
    rows.emit(row, f"{row['op']:26} {row['shape']:8} {row.get('selection', ''):10} "
                   f"{row['pass']:8}{row['ms']:9.3f} ms {row['speedup']:7.2f}x {PEERS[platform]}"
                   f"{row.get('useful_tflops', 0):8.1f} TFLOP/s{row.get('floor_percent', 0):6.1f} %"
                   f"{row.get('peak_bytes', 0) / 2**30:7.2f} GiB")

  for shape_name in _SHAPE.value:
    bench(platform, shape_name, _OP.value, _SELECTION.value, passes, emit)


if __name__ == "__main__":
  cli.run(main)
