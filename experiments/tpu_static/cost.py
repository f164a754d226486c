"""What a TPU kernel should cost, from its schedule: bundles times how often each part runs.

    rows = [tpu_cost.row("oracle_attention", "7b_32k", "v5e", "fwd")]

Counts, not timings: no wait for HBM, for DMA or between grid steps is in them. A schedule may pack
a product into fewer bundles than its FLOPs take at the published peak; the estimate then takes
the larger.
"""

import dataclasses
import functools

from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu import block_topk
from pallas_kernels.causal_attention_tpu import forward as forward_kernel
from pallas_kernels.causal_attention_tpu import tiles as tpu_attention
from pallas_kernels.named_shapes import PAPER

from . import cases as tpu_cases
from . import count as tpu_static


@dataclasses.dataclass(frozen=True)
class Cost:
  """One kernel at one shape, all cores together.

  Attributes:
    kernel: its name.
    bundles_per_step: of the part that runs most: all heads of a step on one key tile.
    steps: how often that part runs, its masked version included.
    flops_per_step: of its matmuls.
    mxu_busy: share of the matrix units' slots taken in it, by the compiler's own count.
    bundles: of everything.
    selection_bundles: of these, for selecting blocks.
  """

  kernel: str
  bundles_per_step: float
  steps: int
  flops_per_step: int
  mxu_busy: float
  bundles: float
  selection_bundles: float = 0.0


def _is_vector(span):
  return any(span.share[u] > 0.05 for u in ("MXU", "XLU", "VALU", "VSTORE"))


def _sum(spans):
  return sum(s.bundles for s in spans)


def _loops(spans):
  """The runs of neighbouring spans inside loops of the kernel body."""
  runs = []
  for before, span in zip([None, *spans], spans):
    if span.depth > 1:
      if before is None or before.depth == 1:
        runs.append([])
      runs[-1].append(span)
  return runs


def forward_cost(shape, spans, kernel, tiles, *, window=None, num_blocks=0):
  """`Cost` of the forward kernel; spans in address order."""
  tokens = tpu_attention.round_up(shape.tokens, max(tiles.block_q, tiles.block_kv))
  group = shape.num_heads // shape.num_kv_heads
  parts = group // tiles.heads
  matmuls = [i for i, s in enumerate(spans) if s.share["MXU"] > 0.1]
  hot, masked = spans[matmuls[0]], spans[matmuls[-1]]
  per_step = lambda s: s.bundles * (1 if s.depth == 1 else tiles.heads)
  straight = [s for s in spans if s.depth == 1 and s.share["MXU"] <= 0.1]
  overhead = _sum(s for s in straight if not _is_vector(s))             # of every grid step
  once = _sum(s for s in straight if _is_vector(s))                     # of every query tile
  loops = _loops(spans[matmuls[-1] + 1:])
  if loops and masked.depth > 1:
    loops = loops[1:]                                                   # its own end
  full, edge, chunks = 0, 0, 0
  for i in range(tokens // tiles.block_q):
    last = ((i + 1) * tiles.block_q - 1) // tiles.block_kv
    first = 0 if window is None else max(i * tiles.block_q - window + 1, 0) // tiles.block_kv
    whole = i * tiles.block_q // tiles.block_kv if window is None else first
    full, edge = full + whole - first, edge + last + 1 - whole
    chunks += -(-(last + 1) * tiles.block_kv // shape.block_size // block_topk.ROWS)
  tiles_count = tokens // tiles.block_q
  rows, steps = forward_kernel.GridWalk(
    tiles, tiles_count, -(-tokens // tiles.block_kv), parts, window).grid()
  bundles = rows * steps * overhead + parts * (
    full * per_step(hot) + edge * per_step(masked) + tiles_count * once)
  selection = 0
  if num_blocks:
    scores, picks, ascending = loops
    inner = _sum(s for s in picks if s.depth > 2)
    selection = (parts * chunks * _sum(scores)
                 + num_blocks * (tiles_count * _sum(s for s in picks if s.depth == 2)
                                 + chunks * inner + tiles_count * _sum(ascending)))
  kv_heads = shape.batch * shape.num_kv_heads
  return Cost(
    kernel, per_step(hot), kv_heads * parts * (full + edge),
    4 * tiles.heads * tiles.block_q * tiles.block_kv * shape.head_dim, hot.share["MXU"],
    kv_heads * (bundles + selection), kv_heads * selection)


def backward_cost(shape, spans, kernel, tiles, *, window=None):
  """`Cost` of the backward kernel over all chunks."""
  tokens = tpu_attention.round_up(shape.tokens, tiles.chunk)
  parts = shape.num_heads // shape.num_kv_heads // tiles.heads
  matmuls = [i for i, s in enumerate(spans) if s.share["MXU"] > 0.1]
  hot, masked = spans[matmuls[0]], spans[matmuls[-1]]
  straight = [s for s in spans if s.depth == 1]
  before = [s for s in spans[:matmuls[0]] if s.depth == 1 and _is_vector(s)]
  after = [s for s in spans[matmuls[-1]:] if s.depth == 1 and _is_vector(s)]
  zero = max(before, key=lambda s: s.bundles)
  per_chunk = [zero, after[-1]]                                        # zero and write dK, dV
  per_tile = [s for s in before + after[:-1] if s is not zero]         # zero and write dQ
  overhead = _sum(s for s in straight if not _is_vector(s))
  full, edge, visits, grid = 0, 0, 0, 0
  for c in range(tokens // tiles.chunk):
    steps = tokens // tiles.block_q
    if window is not None:
      steps = min(steps, (tiles.chunk + window - 2) // tiles.block_q + 1)
    grid += steps
    low = c * tiles.chunk // tiles.block_kv
    for i in range(c * tiles.chunk // tiles.block_q,
                   min(c * tiles.chunk // tiles.block_q + steps, tokens // tiles.block_q)):
      visits += 1
      first = 0 if window is None else max(i * tiles.block_q - window + 1, 0) // tiles.block_kv
      start = max(first, low)
      stop = min(((i + 1) * tiles.block_q - 1) // tiles.block_kv + 1,
                 low + tiles.chunk // tiles.block_kv)
      whole = start if window is not None else min(i * tiles.block_q // tiles.block_kv, stop)
      full, edge = full + whole - start, edge + max(stop - whole, 0)
  kv_heads = shape.batch * shape.num_kv_heads
  edge_unroll = 1 if window is None else tiles.unroll
  bundles = parts * (tiles.heads * (full * hot.bundles / tiles.unroll
                                    + edge * masked.bundles / edge_unroll)
                     + grid * overhead + visits * _sum(per_tile))
  bundles += tokens // tiles.chunk * _sum(per_chunk)
  return Cost(kernel, tiles.heads * hot.bundles / tiles.unroll, kv_heads * parts * (full + edge),
              10 * tiles.heads * tiles.block_q * tiles.block_kv * shape.head_dim, hot.share["MXU"],
              kv_heads * bundles)


def _attention(shape, which, spans_of, generation, *, op, window=None, num_blocks=0):
  group = shape.num_heads // shape.num_kv_heads
  if which == "bwd":
    tiles = tpu_attention.backward_tiles(
      shape.tokens, shape.tokens, group, shape.head_dim, "bfloat16", window=window)
    return backward_cost(shape, spans_of("attention_backward"), "attention_backward", tiles,
                         window=window)
  unit = tpu_attention.key_unit(op, shape.block_size, num_blocks)
  tiles = tpu_attention.forward_tiles(
    shape.tokens, shape.tokens, group, unit, block_size=shape.block_size,
    num_blocks=num_blocks, window=window,
    vmem_bytes=tpu.GENERATIONS[generation].vmem_bytes)
  kernel = "oracle_attention_forward" if num_blocks else "attention_forward"
  return forward_cost(shape, spans_of(kernel), kernel, tiles, window=window,
                      num_blocks=num_blocks)


def splash_cost(shape, spans, tiles, matmuls, resident_tiles):
  """`Cost` of one of splash attention's kernels over the causal tiles, idle grid steps included.

  Args:
    spans: in address order.
    tiles: has `.block_q` and `.block_kv`.
    matmuls: products of a step.
    resident_tiles: how often, over all heads, a result is begun and written.
  """
  hot = max(spans, key=lambda s: s.units["MXU"])
  scalar = _sum(s for s in spans if not _is_vector(s))
  once = _sum(s for s in spans if _is_vector(s) and s is not hot)
  tokens = shape.tokens
  heads = shape.batch * shape.num_heads
  steps = heads * sum(
    ((i + 1) * tiles.block_q - 1) // tiles.block_kv + 1 for i in range(tokens // tiles.block_q))
  grid = heads * (tokens // tiles.block_q) * (tokens // tiles.block_kv)
  return Cost("", hot.bundles, steps, 2 * matmuls * tiles.block_q * tiles.block_kv * shape.head_dim,
              hot.share["MXU"], steps * hot.bundles + grid * scalar + resident_tiles * once)


def _splash(shape, which, spans_of, generation):
  """Forward with residuals, or its two backward kernels together; bundles per step of one head."""
  del generation
  tiles, heads = forward_kernel.ForwardTiles(), shape.batch * shape.num_heads
  query_tiles = heads * (shape.tokens // tiles.block_q)
  if which == "fwd":
    kernel = "splash_mha_fwd_residuals"
    return dataclasses.replace(
      splash_cost(shape, spans_of(kernel), tiles, 2, query_tiles), kernel=kernel)
  key_tiles = shape.batch * shape.num_kv_heads * (shape.tokens // tiles.block_kv)
  kernels = "splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals"
  dkv = splash_cost(shape, spans_of(kernels[0]), tiles, 4, key_tiles)
  dq = splash_cost(shape, spans_of(kernels[1]), tiles, 3, query_tiles)
  step = dkv.bundles_per_step + dq.bundles_per_step
  busy = (dkv.mxu_busy * dkv.bundles_per_step + dq.mxu_busy * dq.bundles_per_step) / step
  return Cost(kernels[0], step, dkv.steps, dkv.flops_per_step + dq.flops_per_step, busy,
              dkv.bundles + dq.bundles)


COSTS = {
  "oracle_attention": lambda shape, *how: _attention(
    shape, *how, op="oracle_attention", num_blocks=shape.num_blocks),
  "causal_attention": functools.partial(_attention, op="oracle_attention"),
  "sliding_window_attention": lambda shape, *how: _attention(
    shape, *how, op="sliding_window_attention", window=shape.window),
  "splash_attention": _splash,
}


def row(op, shape_name, generation, which):
  """Compiles one op for one shape and generation and counts it.

  Args:
    op: a key of `COSTS` and of `tpu_cases.CASES`.
    shape_name: a key of `named_shapes.PAPER`.
    generation: a key of `tpu.GENERATIONS`.
    which: "fwd" or "bwd".

  Returns:
    A dict: op, shape, generation, pass, impl, bundles_per_step, steps, mxu_floor_bundles (a step's
    FLOPs at the published peak), mxu_share (floor over bundles), mxu_busy, selection_share, bundles
    (all, of one core), estimated_ms, vmem_bytes (windows and scratch), temp_bytes (of HBM;
    for "bwd", and for splash attention, of forward and backward together).
  """
  shape, facts = PAPER[shape_name], tpu.GENERATIONS[generation]
  compiled = shape
  if op == "splash_attention":      # the same kernels at any length; at 128k 64 heads fit no v5e
    compiled = dataclasses.replace(shape, tokens=min(shape.tokens, 32_768))
  alone = which == "fwd" and op != "splash_attention"      # whose lse is saved under a vjp only
  fn, arrays = tpu_cases.case(op, compiled, "fwd" if alone else "fwd_bwd")
  with tpu_static.dump(generation, fn, *arrays) as (directory, memory):
    cost = COSTS[op](shape, which, lambda kernel: tpu_static.spans(directory, kernel), generation)
    vmem = tpu_static.vmem_bytes(directory, cost.kernel)
  floor = cost.flops_per_step / facts.flops_per_bundle
  bundles = cost.bundles + cost.steps * max(floor - cost.bundles_per_step, 0)
  seconds = bundles / facts.cores / facts.clock_hz
  return {
    "op": op, "shape": shape_name, "generation": generation, "pass": which,
    "impl": "splash" if op == "splash_attention" else "mosaic_tpu",
    "bundles_per_step": round(cost.bundles_per_step), "steps": cost.steps,
    "mxu_floor_bundles": round(floor), "mxu_share": round(floor / cost.bundles_per_step, 3),
    "mxu_busy": round(cost.mxu_busy, 3), "bundles": round(bundles / facts.cores),
    "selection_share": round(cost.selection_bundles / bundles, 4),
    "estimated_ms": round(seconds * 1e3, 3),
    "vmem_bytes": vmem, "temp_bytes": memory["temp_bytes"],
  }
