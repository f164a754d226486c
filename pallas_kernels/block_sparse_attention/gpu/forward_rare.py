"""Key-major forward in Triton: the rare selections, and one softmax of them and the hot ones."""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.gpu import key_major
from pallas_kernels.block_sparse_attention.gpu.key_major import (
  EMPTY_LSE,
  LN2,
  LOG2E,
  M_FLOOR,
  MASKED,
  visible,
)


@triton.jit
def forward_kernel(q_ptr, k_ptr, v_ptr, entry_ptr, block_ptr, start_ptr, end_ptr, first_ptr,
                   segment_ptr, kv_segment_ptr, offset_ptr, _old_part_ptr, _old_lse_ptr, first_row,
                   part_ptr, lse_ptr,
                   W: tl.constexpr, E: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                   K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
                   C: tl.constexpr, TOKENS: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
                   KEYS: tl.constexpr, WINDOW: tl.constexpr, LAUNCH: tl.constexpr):
  """Partial outputs and log-sum-exps of one program's selections of one block.

  A token's parts are stored side by side, one for each of its rare selections.
  """
  part_row = tl.program_id(1).to(tl.int64)
  row = first_row + part_row
  if tl.program_id(0) >= tl.load(first_ptr + row * (C + 1) + C):
    return
  program = row * W + tl.program_id(0)
  start = tl.load(start_ptr + program)
  end = tl.load(end_ptr + program)
  batch = row // K
  kv = row % K
  key = tl.load(block_ptr + program) * 64 + tl.arange(0, 64)
  d = tl.arange(0, H)
  kv_at = ((batch * S + key) * K + kv)[:, None] * H + d[None, :]
  entries = entry_ptr + row * E
  theirs = key
  if LAUNCH != 0:
    theirs = tl.load(kv_segment_ptr + batch * S + key)
    if (tl.min(theirs, 0) != tl.max(theirs, 0)) != (LAUNCH == 2):
      return
  keys = tl.load(k_ptr + kv_at)
  values = tl.load(v_ptr + kv_at)
  lane = tl.arange(0, TOKENS * G)
  head = lane % G
  for base in range(start, end, TOKENS):
    at = base + lane // G
    live = at < end
    entry = tl.load(entries + at, mask=live, other=0)
    token = entry // P
    query = (batch * T + token) * (K * G) + kv * G + head
    queries = tl.load(q_ptr + query[:, None] * H + d[None, :])
    scores = tl.dot(queries, tl.trans(keys)) * (SCALE * LOG2E)
    see = visible(token, key, batch, theirs, segment_ptr, offset_ptr, T, OFFSET, KEYS, WINDOW,
                  LAUNCH)
    scores = tl.where(see, scores, MASKED)
    m = tl.maximum(tl.max(scores, 1), M_FLOOR)
    weights = tl.exp2(scores - m[:, None])
    l = tl.sum(weights, 1)
    safe = tl.where(l > 0, l, 1.0)
    out = tl.dot(weights.to(values.dtype), values) * (1.0 / safe)[:, None]
    to = (part_row * (T * P) + entry) * G + head
    tl.store(part_ptr + to[:, None] * H + d[None, :], out.to(part_ptr.dtype.element_ty),
             mask=live[:, None])
    tl.store(lse_ptr + to, tl.where(l > 0, (m + tl.log2(safe)) * LN2, EMPTY_LSE), mask=live)


@triton.jit
def _gate(gate_ptr, query, at, H: tl.constexpr, WIDTH: tl.constexpr):
  """f32 [rows, H]: gates per element, or per head where WIDTH is 1."""
  if WIDTH == 1:
    at = query[:, None] + tl.zeros([1, H], tl.int32)
  return tl.load(gate_ptr + at).to(tl.float32)


@triton.jit
def combine_kernel(part_ptr, part_lse_ptr, rare_ptr, sink_ptr, local_ptr, gate_sparse_ptr,
                   gate_local_ptr, sparse_ptr, old_lse_ptr, old_out_ptr, first_row, out_ptr,
                   lse_ptr, kept_ptr, T: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                   H: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
                   HOT: tl.constexpr, SINKS: tl.constexpr, GATED: tl.constexpr,
                   GATE_SPARSE: tl.constexpr, GATE_LOCAL: tl.constexpr, KEEP: tl.constexpr):
  """One softmax out of a token's rare parts and, with HOT, of the hot selections' output.

  With GATED the hot selections' output is at `sparse_ptr`; the sum is gated and added to the gated
  local branch, and KEEP stores it before the gates too. GATE_SPARSE and GATE_LOCAL are the gates'
  widths, 0 for none. Else the hot selections' output is what `out` holds already, and tokens
  without rare selections are left alone. A program takes STEPS times TOKENS tokens.
  """
  row = first_row + tl.program_id(1).to(tl.int64)
  batch = row // K
  kv = row % K
  if HOT and not GATED:
    counts = tl.load(rare_ptr + row * T + tl.program_id(0) * (STEPS * TOKENS)
                     + tl.arange(0, STEPS * TOKENS))
    if tl.max(counts, 0) == 0:
      return
  lane = tl.arange(0, TOKENS * G)
  head = lane % G
  d = tl.arange(0, H)
  for step in range(STEPS):
    token = (tl.program_id(0) * STEPS + step) * TOKENS + lane // G
    count = tl.load(rare_ptr + row * T + token)
    most = tl.max(count, 0)
    if not HOT or GATED or most > 0:
      query = (batch * T + token) * (K * G) + kv * G + head
      at = query[:, None] * H + d[None, :]
      first = (tl.program_id(1).to(tl.int64) * T + token) * (P * G) + head
      m = tl.full([TOKENS * G], M_FLOOR, tl.float32)
      if HOT:
        hot_lse = tl.load(old_lse_ptr + query) * LOG2E
        m = tl.maximum(m, hot_lse)
      if SINKS:
        sink = tl.load(sink_ptr + kv * G + head) * LOG2E
        m = tl.maximum(m, sink)
      for p in range(most):
        part_lse = tl.load(part_lse_ptr + first + p * G, mask=p < count, other=EMPTY_LSE)
        m = tl.maximum(m, part_lse * LOG2E)
      l = tl.zeros([TOKENS * G], tl.float32)
      acc = tl.zeros([TOKENS * G, H], tl.float32)
      if HOT:
        weight = tl.exp2(hot_lse - m)
        l += weight
        if GATED:
          hot = tl.load(sparse_ptr + at)
        else:
          hot = tl.load(old_out_ptr + at)
        acc += weight[:, None] * hot.to(tl.float32)
      if SINKS:
        l += tl.exp2(sink - m)
      for p in range(most):
        has = p < count
        part_at = first + p * G
        part_lse = tl.load(part_lse_ptr + part_at, mask=has, other=EMPTY_LSE)
        weight = tl.exp2(part_lse * LOG2E - m)
        l += weight
        part = tl.load(part_ptr + part_at[:, None] * H + d[None, :], mask=has[:, None], other=0.0)
        acc += weight[:, None] * part.to(tl.float32)
      safe = tl.where(l > 0, l, 1.0)
      acc = acc * (1.0 / safe)[:, None]
      tl.store(lse_ptr + query, tl.where(l > 0, (m + tl.log2(safe)) * LN2, EMPTY_LSE))
      if GATED:
        if KEEP:
          tl.store(kept_ptr + at, acc.to(kept_ptr.dtype.element_ty))
        local = tl.load(local_ptr + at).to(tl.float32)
        if GATE_LOCAL > 0:
          local *= _gate(gate_local_ptr, query, at, H, GATE_LOCAL)
        if GATE_SPARSE > 0:
          acc *= _gate(gate_sparse_ptr, query, at, H, GATE_SPARSE)
        acc += local
      tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty))


@dataclasses.dataclass(frozen=True)
class Gates:
  """What turns the sparse branch's output into the layer's, in the sum of the parts.

  local [B,T,N,H]: the other branch; sparse_gate, local_gate [B,T,N,H] or [B,T,N,1], None is 1.
  `keep`: also return the sparse branch before its gate.
  """

  local: jax.Array
  sparse_gate: jax.Array | None
  local_gate: jax.Array | None
  keep: bool


def _width(gate):
  return 0 if gate is None else gate.shape[-1]


def forward(q, k, v, plan, visibility, *, scale, hot=None, sinks=None, gates=None):
  """The rare selections of the plan, and `hot` = (out, lse) of the hot ones, as one softmax.

  Args:
    q: [B,T,N,H], T a multiple of 64.
    k: [B,S,K,H], S a multiple of 64.
    v: [B,S,K,H].
    plan: SelectionPlan.
    visibility: Visibility.
    scale: of the logits.
    hot: out [B,T,N,H] and lse f32 [B,T,N] of the hot selections, or None. Its memory is reused, and
      only the tokens with rare selections are touched.
    sinks: f32 [N] or None: `hot` counts them already, so give one of the two.
    gates: Gates, for which there must be `hot`, or None.

  Returns:
    out [B,T,N,H], 0 where a row sees no key, and its natural lse f32 [B,T,N], sinks included. With
    `gates` the layer's out, lse, and the sparse branch's out or None.
  """
  config = key_major.KeyMajorConfig()
  sizes = key_major.sizes_of(q, k, plan)
  masks, constants = key_major.visible_inputs(visibility)
  rows, group = q.shape[0] * sizes["K"], sizes["G"]
  each = key_major.rows_per_pass(q, rows, sizes, config)
  entries = sizes["T"] * sizes["P"]
  work = plan.rare_work
  combine_tokens = max(config.combine_rows // group, 1)
  steps = min(config.combine_steps, 64 // combine_tokens)
  sink_values = jnp.zeros((1,), jnp.float32) if sinks is None else sinks
  none, keep = jnp.zeros((1,), q.dtype), gates is not None and gates.keep
  out, lse = (None, None) if hot is None else hot
  sparse, branches, widths = none, (none,) * 3, (0, 0)
  if gates is not None:
    out, sparse = None, out
    branches = [none if x is None else x for x in (gates.local, gates.sparse_gate,
                                                   gates.local_gate)]
    widths = _width(gates.sparse_gate), _width(gates.local_gate)
  for first_row in range(0, rows, each):
    if first_row:
      q, k, v = key_major.after((q, k, v), (out, lse))
    found = ()
    for launch in key_major.launches(visibility):
      found = key_major.call(
        forward_kernel, q, k, v, plan.entries, work.block, work.starts, work.ends, work.first,
        *masks, *(found or (none, none)), first_row,
        out_shape=(jax.ShapeDtypeStruct((each, entries, group, sizes["H"]), q.dtype),
                   jax.ShapeDtypeStruct((each, entries, group), jnp.float32)),
        input_output_aliases={11: 0, 12: 1} if found else None,
        grid=(work.starts.shape[-1], each), num_warps=config.forward_warps,
        num_stages=config.forward_stages, W=work.starts.shape[-1], E=plan.entries.shape[-1],
        SCALE=float(scale), TOKENS=max(config.forward_rows // group, 1), LAUNCH=launch,
        **constants, **sizes)
    part, part_lse = found
    aliases = ({} if lse is None else {8: 1}) | ({} if out is None else {9: 0})
    combine_sizes = {name: sizes[name] for name in "TKGHP"}
    out, lse, kept = key_major.call(
      combine_kernel, part, part_lse, plan.rare, sink_values, *branches, sparse,
      jnp.zeros((1,), jnp.float32) if lse is None else lse, none if out is None else out,
      first_row,
      out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),
                 jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
                 jax.ShapeDtypeStruct(q.shape if keep else (1,), q.dtype)),
      input_output_aliases=aliases | ({7: 2} if keep else {}),
      grid=(sizes["T"] // (combine_tokens * steps), each), num_warps=config.combine_warps,
      num_stages=1, TOKENS=combine_tokens, STEPS=steps, HOT=hot is not None,
      SINKS=sinks is not None, GATED=gates is not None, GATE_SPARSE=widths[0],
      GATE_LOCAL=widths[1], KEEP=keep, **combine_sizes)
    sparse = kept if keep else sparse
  return (out, lse) if gates is None else (out, lse, kept if keep else None)
