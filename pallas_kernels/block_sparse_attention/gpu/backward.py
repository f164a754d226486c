"""Key-major block-sparse attention: Triton kernels through jax-triton, for their pointer gathers.

A program owns one key block and gathers the tokens that picked it, packed: no row is multiplied
for nothing, whatever the selection looks like. Each (token, pick) gives a partial output (or
query gradient) of its own, summed per token by a second kernel in the order of the picks;
key and value gradients of a block's programs are summed in the order of the programs. No atomics:
results repeat bit for bit.

Imported only when a GPU runs it: jax-triton 0.3.1 raises on import without one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LOW = tl.constexpr(-1e20)          # floor of a running maximum
_MASKED = tl.constexpr(-1e30)       # score of an invisible key, log-sum-exp of an empty row


@dataclasses.dataclass(frozen=True)
class KeyMajorConfig:
  """Tile sizes of the key-major kernels; the defaults are for H200 (LOG.md)."""

  forward_rows: int = 128          # query rows (tokens x G heads) of a step
  forward_warps: int = 4
  forward_stages: int = 2
  backward_rows: int = 128
  backward_warps: int = 8
  backward_stages: int = 2
  combine_rows: int = 16
  combine_warps: int = 2
  combine_steps: int = 8            # times combine_rows that a program of the sum takes
  partial_bytes: int = 6 << 30      # of one pass: more KV heads than fit take further passes

  def __post_init__(self):
    for name in ("forward_rows", "backward_rows"):
      if getattr(self, name) not in (16, 32, 64, 128, 256):
        raise ValueError(f"{name}: got {getattr(self, name)}, want a power of two in 16..256")


@triton.jit
def _visible(token, key, batch, segment_ptr, T: tl.constexpr, SEGMENTS: tl.constexpr,
             WINDOW: tl.constexpr):
  """bool [rows, 64]: causal, of the last WINDOW tokens (0: of all), and of the same segment."""
  see = key[None, :] <= token[:, None]
  if WINDOW > 0:
    see = see & (token[:, None] < key[None, :] + WINDOW)
  if SEGMENTS:
    mine = tl.load(segment_ptr + batch * T + token)
    theirs = tl.load(segment_ptr + batch * T + key)
    see = see & (mine[:, None] == theirs[None, :]) & (mine[:, None] != 0)
  return see


@triton.jit
def forward_kernel(q_ptr, k_ptr, v_ptr, entry_ptr, group_ptr, start_ptr, end_ptr, first_ptr,
                   segment_ptr, first_row, part_ptr, lse_ptr, T: tl.constexpr,
                   K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
                   C: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                   SCALE: tl.constexpr, SEGMENTS: tl.constexpr):
  """Partial outputs and log-sum-exps of one program's picks of one block.

  A token's parts are stored side by side, one for each of its rare picks.
  """
  program = tl.program_id(0) + tl.load(first_ptr + first_row * C)
  if program >= tl.load(first_ptr + (first_row + ROWS) * C):
    return
  start = tl.load(start_ptr + program)
  end = tl.load(end_ptr + program)
  group = tl.load(group_ptr + program)
  row = (group // C).to(tl.int64)
  batch = row // K
  kv = row % K
  key = (group % C) * 64 + tl.arange(0, 64)
  d = tl.arange(0, H)
  kv_at = ((batch * T + key) * K + kv)[:, None] * H + d[None, :]
  keys = tl.load(k_ptr + kv_at)
  values = tl.load(v_ptr + kv_at)
  lane = tl.arange(0, TOKENS * G)
  head = lane % G
  for base in range(start, end, TOKENS):
    at = base + lane // G
    live = at < end
    entry = tl.load(entry_ptr + at, mask=live, other=0)
    token = entry // P
    query = (batch * T + token) * (K * G) + kv * G + head
    queries = tl.load(q_ptr + query[:, None] * H + d[None, :])
    scores = tl.dot(queries, tl.trans(keys)) * (SCALE * _LOG2E)
    scores = tl.where(_visible(token, key, batch, segment_ptr, T, SEGMENTS, 0), scores, _MASKED)
    high = tl.maximum(tl.max(scores, 1), _LOW)
    weights = tl.exp2(scores - high[:, None])
    total = tl.sum(weights, 1)
    safe = tl.where(total > 0, total, 1.0)
    out = tl.dot(weights.to(values.dtype), values) * (1.0 / safe)[:, None]
    to = ((row - first_row) * (T * P) + entry) * G + head
    tl.store(part_ptr + to[:, None] * H + d[None, :], out.to(part_ptr.dtype.element_ty),
             mask=live[:, None])
    tl.store(lse_ptr + to, tl.where(total > 0, high + tl.log2(safe), _MASKED), mask=live)


@triton.jit
def combine_kernel(part_ptr, part_lse_ptr, rare_ptr, sink_ptr, local_ptr, gate_sparse_ptr,
                   gate_local_ptr, sparse_ptr, old_lse_ptr, old_out_ptr, first_row, out_ptr,
                   lse_ptr, kept_ptr, T: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                   H: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
                   UNION: tl.constexpr, SINKS: tl.constexpr, GATED: tl.constexpr,
                   GATE_HEADS: tl.constexpr, KEEP: tl.constexpr):
  """One softmax out of a token's rare parts and, with UNION, of the hot picks' output.

  With GATED the hot picks' output is at `sparse_ptr`; the sum is gated and added to the gated
  local branch, and KEEP stores it before the gates too. Else the hot picks' output is what `out`
  holds already, and tokens without rare picks are left alone. A program takes STEPS times TOKENS
  tokens.
  """
  row = first_row + tl.program_id(1).to(tl.int64)
  batch = row // K
  kv = row % K
  if UNION and not GATED:
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
    if not UNION or GATED or most > 0:
      query = (batch * T + token) * (K * G) + kv * G + head
      at = query[:, None] * H + d[None, :]
      first = (tl.program_id(1).to(tl.int64) * T + token) * (P * G) + head
      high = tl.full([TOKENS * G], _LOW, tl.float32)
      if UNION:
        union_lse = tl.load(old_lse_ptr + query)
        high = tl.maximum(high, union_lse)
      if SINKS:
        sink = tl.load(sink_ptr + kv * G + head) * _LOG2E
        high = tl.maximum(high, sink)
      for p in range(most):
        high = tl.maximum(
          high, tl.load(part_lse_ptr + first + p * G, mask=p < count, other=_MASKED))
      total = tl.zeros([TOKENS * G], tl.float32)
      acc = tl.zeros([TOKENS * G, H], tl.float32)
      if UNION:
        weight = tl.exp2(union_lse - high)
        total += weight
        if GATED:
          union = tl.load(sparse_ptr + at)
        else:
          union = tl.load(old_out_ptr + at)
        acc += weight[:, None] * union.to(tl.float32)
      if SINKS:
        total += tl.exp2(sink - high)
      for p in range(most):
        has = p < count
        part_at = first + p * G
        weight = tl.exp2(tl.load(part_lse_ptr + part_at, mask=has, other=_MASKED) - high)
        total += weight
        part = tl.load(part_ptr + part_at[:, None] * H + d[None, :], mask=has[:, None], other=0.0)
        acc += weight[:, None] * part.to(tl.float32)
      safe = tl.where(total > 0, total, 1.0)
      acc = acc * (1.0 / safe)[:, None]
      tl.store(lse_ptr + query, tl.where(total > 0, high + tl.log2(safe), _MASKED))
      if GATED:
        if KEEP:
          tl.store(kept_ptr + at, acc.to(kept_ptr.dtype.element_ty))
        gate_at = at
        if GATE_HEADS:
          gate_at = query[:, None] + tl.zeros([1, H], tl.int32)
        local = tl.load(local_ptr + at).to(tl.float32)
        gate_local = tl.load(gate_local_ptr + gate_at).to(tl.float32)
        acc = acc * tl.load(gate_sparse_ptr + gate_at).to(tl.float32) + local * gate_local
      tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty))


@triton.jit
def backward_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, entry_ptr, group_ptr,
                    start_ptr, end_ptr, first_ptr, segment_ptr, first_row, dq_ptr, dk_ptr, dv_ptr,
                    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
                    P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                    SCALE: tl.constexpr, SEGMENTS: tl.constexpr, WINDOW: tl.constexpr):
  """dK and dV of one program's picks of one block, and each pick's part of dQ."""
  program = tl.program_id(0) + tl.load(first_ptr + first_row * C)
  if program >= tl.load(first_ptr + (first_row + ROWS) * C):
    return
  start = tl.load(start_ptr + program)
  end = tl.load(end_ptr + program)
  group = tl.load(group_ptr + program)
  row = (group // C).to(tl.int64)
  batch = row // K
  kv = row % K
  local = tl.arange(0, 64)
  key = (group % C) * 64 + local
  d = tl.arange(0, H)
  kv_at = ((batch * T + key) * K + kv)[:, None] * H + d[None, :]
  keys = tl.load(k_ptr + kv_at)
  values = tl.load(v_ptr + kv_at)
  lane = tl.arange(0, TOKENS * G)
  head = lane % G
  dkeys = tl.zeros([64, H], tl.float32)
  dvalues = tl.zeros([64, H], tl.float32)
  for base in range(start, end, TOKENS):
    at = base + lane // G
    live = at < end
    entry = tl.load(entry_ptr + at, mask=live, other=0)
    token = entry // P
    query = (batch * T + token) * (K * G) + kv * G + head
    queries = tl.load(q_ptr + query[:, None] * H + d[None, :])
    douts = tl.load(dout_ptr + query[:, None] * H + d[None, :])
    lse = tl.load(lse_ptr + query)
    delta = tl.load(delta_ptr + query)
    scores = tl.dot(queries, tl.trans(keys)) * (SCALE * _LOG2E)
    see = _visible(token, key, batch, segment_ptr, T, SEGMENTS, WINDOW) & live[:, None]
    weights = tl.where(see, tl.exp2(scores - lse[:, None]), 0.0)
    dvalues += tl.dot(tl.trans(weights.to(values.dtype)), douts)
    dscores = weights * (tl.dot(douts, tl.trans(values)) - delta[:, None])
    dscores = dscores.to(keys.dtype)
    dkeys += tl.dot(tl.trans(dscores), queries)
    dquery = tl.dot(dscores, keys) * SCALE
    to = ((row - first_row) * (T * P) + entry) * G + head
    tl.store(dq_ptr + to[:, None] * H + d[None, :], dquery.to(dq_ptr.dtype.element_ty),
             mask=live[:, None])
  to = (tl.program_id(0).to(tl.int64) * 64 + local)[:, None] * H + d[None, :]
  tl.store(dk_ptr + to, dkeys * SCALE)
  tl.store(dv_ptr + to, dvalues)


@triton.jit
def sum_queries_kernel(part_ptr, valid_ptr, _old_ptr, first_row, dq_ptr, T: tl.constexpr,
                       K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
                       TOKENS: tl.constexpr):
  """dQ of a token: the sum of its picks' parts, in the order of the picks."""
  row = first_row + tl.program_id(1).to(tl.int64)
  lane = tl.arange(0, TOKENS * G)
  token = tl.program_id(0) * TOKENS + lane // G
  head = lane % G
  d = tl.arange(0, H)
  count = tl.load(valid_ptr + row * T + token)
  first = (tl.program_id(1).to(tl.int64) * T + token) * (P * G) + head
  acc = tl.zeros([TOKENS * G, H], tl.float32)
  for p in range(tl.max(count, 0)):
    has = p < count
    part = tl.load(part_ptr + (first + p * G)[:, None] * H + d[None, :], mask=has[:, None],
                   other=0.0)
    acc += part.to(tl.float32)
  query = (row // K * T + token) * (K * G) + row % K * G + head
  tl.store(dq_ptr + query[:, None] * H + d[None, :], acc.to(dq_ptr.dtype.element_ty))


@triton.jit
def sum_keys_kernel(dk_part_ptr, dv_part_ptr, first_ptr, _old_dk_ptr, _old_dv_ptr, first_row,
                    dk_ptr, dv_ptr, T: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                    C: tl.constexpr):
  """dK and dV of a quarter of a block: its programs' sums, in the order of the programs."""
  group = tl.program_id(0) + first_row * C
  origin = tl.load(first_ptr + first_row * C)
  begin = (tl.load(first_ptr + group) - origin).to(tl.int64)
  end = (tl.load(first_ptr + group + 1) - origin).to(tl.int64)
  local = tl.program_id(1) * 16 + tl.arange(0, 16)
  d = tl.arange(0, H)
  within = local[:, None] * H + d[None, :]
  dkeys = tl.zeros([16, H], tl.float32)
  dvalues = tl.zeros([16, H], tl.float32)
  for program in range(begin, end):
    at = program * (64 * H) + within
    dkeys += tl.load(dk_part_ptr + at)
    dvalues += tl.load(dv_part_ptr + at)
  row = (group // C).to(tl.int64)
  to = ((row // K * T + group % C * 64 + local) * K + row % K)[:, None] * H + d[None, :]
  tl.store(dk_ptr + to, dkeys.to(dk_ptr.dtype.element_ty))
  tl.store(dv_ptr + to, dvalues.to(dv_ptr.dtype.element_ty))


def _call(kernel, *args, **kwargs):
  import jax_triton

  return jax_triton.triton_call(*args, kernel=kernel, name=kernel.fn.__name__, **kwargs)


def _sizes(q, k, plan):
  n, kv_heads = q.shape[2], k.shape[2]
  return dict(T=q.shape[1], K=kv_heads, G=n // kv_heads, H=q.shape[3], P=plan.picks)


def _passes(q, rows, sizes, config):
  """(batch, KV head) rows of a pass: as many as keep the partials within `partial_bytes`."""
  row_bytes = sizes["T"] * sizes["P"] * sizes["G"] * sizes["H"] * q.dtype.itemsize
  each = max(1, min(rows, config.partial_bytes // row_bytes))
  while rows % each:
    each -= 1
  return each


def _after(arrays, done):
  """`arrays`, not available before `done` is: keeps one pass's partials alive at a time."""
  return jax.lax.optimization_barrier((arrays, done))[0]


@dataclasses.dataclass(frozen=True)
class Gates:
  """What turns the sparse branch's output into the layer's, in the sum of the parts.

  local [B,T,N,H]: the other branch; gate_sparse, gate_local [B,T,N,H] or [B,T,N,1]. `keep`: also
  return the sparse branch before its gate.
  """

  local: jax.Array
  gate_sparse: jax.Array
  gate_local: jax.Array
  keep: bool


def forward(q, k, v, plan, *, scale, union=None, sinks=None, segment_ids=None, gates=None,
            config=None):
  """The rare picks of the plan, and `union` = (out, lse) of the hot ones, as one softmax.

  q [B,T,N,H], k, v [B,T,K,H], sinks f32 [N] -> out [B,T,N,H], base-2 lse f32 [B,T,N], the sink
  included; a row that sees no key has out 0. `union` counts the sinks already: give one of them.
  Its memory is reused, and only the tokens with rare picks are touched. With `gates`, for which
  there must be a `union` -> the layer's out, lse, and the sparse branch's out or None.
  """
  config = config or KeyMajorConfig()
  sizes = _sizes(q, k, plan)
  rows, group = q.shape[0] * sizes["K"], sizes["G"]
  each = _passes(q, rows, sizes, config)
  entries = sizes["T"] * sizes["P"]
  work, blocks = plan.rare_work, sizes["T"] // 64
  combine_tokens = max(config.combine_rows // group, 1)
  steps = min(config.combine_steps, 64 // combine_tokens)
  segments = jnp.zeros((1,), jnp.int32) if segment_ids is None else segment_ids
  sink_values = jnp.zeros((1,), jnp.float32) if sinks is None else sinks
  none, keep = jnp.zeros((1,), q.dtype), gates is not None and gates.keep
  out, lse = (None, None) if union is None else union
  sparse, branches = none, (none,) * 3
  if gates is not None:
    out, sparse = None, out
    branches = gates.local, gates.gate_sparse, gates.gate_local
  for first_row in range(0, rows, each):
    if first_row:
      q, k, v = _after((q, k, v), (out, lse))
    part, part_lse = _call(
      forward_kernel, q, k, v, plan.entries, work.group, work.starts, work.ends, work.first,
      segments, first_row,
      out_shape=(jax.ShapeDtypeStruct((each, entries, group, sizes["H"]), q.dtype),
                 jax.ShapeDtypeStruct((each, entries, group), jnp.float32)),
      grid=(each * (entries // plan.config.forward_entries + blocks),),
      num_warps=config.forward_warps, num_stages=config.forward_stages, C=blocks, ROWS=each,
      SCALE=float(scale), TOKENS=max(config.forward_rows // group, 1),
      SEGMENTS=segment_ids is not None, **sizes)
    aliases = ({} if lse is None else {8: 1}) | ({} if out is None else {9: 0})
    out, lse, kept = _call(
      combine_kernel, part, part_lse, plan.rare, sink_values, *branches, sparse,
      jnp.zeros((1,), jnp.float32) if lse is None else lse, none if out is None else out,
      first_row,
      out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),
                 jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
                 jax.ShapeDtypeStruct(q.shape if keep else (1,), q.dtype)),
      input_output_aliases=aliases | ({7: 2} if keep else {}),
      grid=(sizes["T"] // (combine_tokens * steps), each), num_warps=config.combine_warps,
      num_stages=1, TOKENS=combine_tokens, STEPS=steps, UNION=union is not None,
      SINKS=sinks is not None, GATED=gates is not None,
      GATE_HEADS=gates is not None and gates.gate_sparse.shape[-1] == 1, KEEP=keep, **sizes)
    sparse = kept if keep else sparse
  return (out, lse) if gates is None else (out, lse, kept if keep else None)


def backward(q, k, v, dout, lse, delta, plan, *, scale, segment_ids=None, window=None,
             config=None):
  """Gradients of q, k and v; lse (base 2) and delta = sum_h out * dout are f32 [B,T,N]."""
  config = config or KeyMajorConfig()
  sizes = _sizes(q, k, plan)
  rows, group, h = q.shape[0] * sizes["K"], sizes["G"], sizes["H"]
  each = _passes(q, rows, sizes, config)
  entries = sizes["T"] * sizes["P"]
  work, blocks = plan.all_work, sizes["T"] // 64
  programs = each * (entries // plan.config.backward_entries + blocks)
  tokens = max(config.combine_rows // group, 1)
  segments = jnp.zeros((1,), jnp.int32) if segment_ids is None else segment_ids
  parts = jax.ShapeDtypeStruct((programs, 64, h), jnp.float32)
  dq, dkv = (), ()
  for first_row in range(0, rows, each):
    if first_row:
      q, k, v = _after((q, k, v), (dq, dkv))
    dq_part, dk_part, dv_part = _call(
      backward_kernel, q, k, v, dout, lse, delta, plan.entries, work.group, work.starts,
      work.ends, work.first, segments, first_row,
      out_shape=(jax.ShapeDtypeStruct((each, entries, group, h), q.dtype), parts, parts),
      grid=(programs,), num_warps=config.backward_warps, num_stages=config.backward_stages,
      C=blocks, ROWS=each, SCALE=float(scale), TOKENS=max(config.backward_rows // group, 1),
      SEGMENTS=segment_ids is not None, WINDOW=window or 0, **sizes)
    dq = (_call(
      sum_queries_kernel, dq_part, plan.valid, *(dq or (jnp.zeros((1,), q.dtype),)), first_row,
      out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
      input_output_aliases={2: 0} if dq else None, grid=(sizes["T"] // tokens, each),
      num_warps=config.combine_warps, num_stages=1, TOKENS=tokens, **sizes),)
    dkv = tuple(_call(
      sum_keys_kernel, dk_part, dv_part, work.first,
      *(dkv or (jnp.zeros((1,), k.dtype), jnp.zeros((1,), v.dtype))), first_row,
      out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
      input_output_aliases={3: 0, 4: 1} if dkv else None, grid=(each * blocks, 4), num_warps=4,
      num_stages=1, T=sizes["T"], K=sizes["K"], H=h, C=blocks))
  return dq[0], *dkv
