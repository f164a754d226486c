"""Key-major backward in Triton: gradients of all selections, hot and rare alike."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.gpu import key_major
from pallas_kernels.block_sparse_attention.gpu.key_major import LOG2E, visible


@triton.jit
def backward_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, entry_ptr, block_ptr,
                    start_ptr, end_ptr, first_ptr, segment_ptr, kv_segment_ptr, offset_ptr,
                    _old_dq_ptr, _old_dk_ptr, _old_dv_ptr, first_row, dq_ptr, dk_ptr, dv_ptr,
                    W: tl.constexpr, E: tl.constexpr,
                    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
                    SCALE: tl.constexpr, OFFSET: tl.constexpr, KEYS: tl.constexpr,
                    WINDOW: tl.constexpr, LAUNCH: tl.constexpr):
  """dK and dV of one program's selections of one block, and each selection's part of dQ."""
  part_row = tl.program_id(1).to(tl.int64)
  row = first_row + part_row
  if tl.program_id(0) >= tl.load(first_ptr + row * (C + 1) + C):
    return
  program = row * W + tl.program_id(0)
  start = tl.load(start_ptr + program)
  end = tl.load(end_ptr + program)
  batch = row // K
  kv = row % K
  local = tl.arange(0, 64)
  key = tl.load(block_ptr + program) * 64 + local
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
  dkeys = tl.zeros([64, H], tl.float32)
  dvalues = tl.zeros([64, H], tl.float32)
  for base in range(start, end, TOKENS):
    at = base + lane // G
    live = at < end
    entry = tl.load(entries + at, mask=live, other=0)
    token = entry // P
    query = (batch * T + token) * (K * G) + kv * G + head
    queries = tl.load(q_ptr + query[:, None] * H + d[None, :])
    douts = tl.load(dout_ptr + query[:, None] * H + d[None, :])
    lse = tl.load(lse_ptr + query) * LOG2E
    delta = tl.load(delta_ptr + query)
    scores = tl.dot(queries, tl.trans(keys)) * (SCALE * LOG2E)
    see = visible(token, key, batch, theirs, segment_ptr, offset_ptr, T, OFFSET, KEYS, WINDOW,
                  LAUNCH) & live[:, None]
    weights = tl.where(see, tl.exp2(scores - lse[:, None]), 0.0)
    dvalues += tl.dot(tl.trans(weights.to(values.dtype)), douts)
    dscores = weights * (tl.dot(douts, tl.trans(values)) - delta[:, None])
    dscores = dscores.to(keys.dtype)
    dkeys += tl.dot(tl.trans(dscores), queries)
    dquery = tl.dot(dscores, keys) * SCALE
    to = (part_row * (T * P) + entry) * G + head
    tl.store(dq_ptr + to[:, None] * H + d[None, :], dquery.to(dq_ptr.dtype.element_ty),
             mask=live[:, None])
  to = ((part_row * W + tl.program_id(0)) * 64 + local)[:, None] * H + d[None, :]
  tl.store(dk_ptr + to, dkeys * SCALE)
  tl.store(dv_ptr + to, dvalues)


@triton.jit
def sum_queries_kernel(part_ptr, valid_ptr, _old_ptr, first_row, dq_ptr, T: tl.constexpr,
                       K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
                       TOKENS: tl.constexpr):
  """dQ of a token: the sum of its selections' parts, in the order of their slots."""
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
                    dk_ptr, dv_ptr, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
                    H: tl.constexpr, C: tl.constexpr):
  """dK and dV of a quarter of a block: its programs' sums, in the order of the programs."""
  part_row = (tl.program_id(0) // C).to(tl.int64)
  row = first_row + part_row
  block = tl.program_id(0) % C
  begin = tl.load(first_ptr + row * (C + 1) + block)
  end = tl.load(first_ptr + row * (C + 1) + block + 1)
  local = tl.program_id(1) * 16 + tl.arange(0, 16)
  d = tl.arange(0, H)
  within = local[:, None] * H + d[None, :]
  dkeys = tl.zeros([16, H], tl.float32)
  dvalues = tl.zeros([16, H], tl.float32)
  for program in range(begin, end):
    at = (part_row * W + program) * (64 * H) + within
    dkeys += tl.load(dk_part_ptr + at)
    dvalues += tl.load(dv_part_ptr + at)
  to = ((row // K * S + block * 64 + local) * K + row % K)[:, None] * H + d[None, :]
  tl.store(dk_ptr + to, dkeys.to(dk_ptr.dtype.element_ty))
  tl.store(dv_ptr + to, dvalues.to(dv_ptr.dtype.element_ty))


def backward(q, k, v, dout, lse, delta, plan, visibility, *, scale):
  """Gradients of q, k and v.

  Args:
    q: [B,T,N,H], T a multiple of 64.
    k: [B,S,K,H], S a multiple of 64.
    v: [B,S,K,H].
    dout: [B,T,N,H].
    lse: f32 [B,T,N], natural, sinks included.
    delta: f32 [B,T,N], sum_h out * dout.
    plan: SelectionPlan.
    visibility: Visibility.
    scale: of the logits.

  Returns:
    dq [B,T,N,H], dk [B,S,K,H], dv [B,S,K,H].
  """
  config = key_major.KeyMajorConfig()
  sizes = key_major.sizes_of(q, k, plan)
  masks, constants = key_major.visible_inputs(visibility)
  rows, group, h = q.shape[0] * sizes["K"], sizes["G"], sizes["H"]
  each = key_major.rows_per_pass(q, rows, sizes, config)
  entries = sizes["T"] * sizes["P"]
  work = plan.all_work
  programs = work.starts.shape[-1]
  tokens = max(config.combine_rows // group, 1)
  parts = jax.ShapeDtypeStruct((each, programs, 64, h), jnp.float32)
  dq, dkv, none = (), (), jnp.zeros((1,), q.dtype)
  for first_row in range(0, rows, each):
    if first_row:
      q, k, v = key_major.after((q, k, v), (dq, dkv))
    found = ()
    for launch in key_major.launches(visibility):
      found = key_major.call(
        backward_kernel, q, k, v, dout, lse, delta, plan.entries, work.block, work.starts,
        work.ends, work.first, *masks, *(found or (none, none, none)), first_row,
        out_shape=(jax.ShapeDtypeStruct((each, entries, group, h), q.dtype), parts, parts),
        input_output_aliases={14: 0, 15: 1, 16: 2} if found else None,
        grid=(programs, each), num_warps=config.backward_warps,
        num_stages=config.backward_stages, W=programs, E=plan.entries.shape[-1],
        SCALE=float(scale), TOKENS=max(config.backward_rows // group, 1), LAUNCH=launch,
        **constants, **sizes)
    dq_part, dk_part, dv_part = found
    dq = (key_major.call(
      sum_queries_kernel, dq_part, plan.valid, *(dq or (jnp.zeros((1,), q.dtype),)), first_row,
      out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
      input_output_aliases={2: 0} if dq else None, grid=(sizes["T"] // tokens, each),
      num_warps=config.combine_warps, num_stages=1, TOKENS=tokens,
      **{name: sizes[name] for name in "TKGHP"}),)
    dkv = tuple(key_major.call(
      sum_keys_kernel, dk_part, dv_part, work.first,
      *(dkv or (jnp.zeros((1,), k.dtype), jnp.zeros((1,), v.dtype))), first_row,
      out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
      input_output_aliases={3: 0, 4: 1} if dkv else None, grid=(each * sizes["C"], 4),
      num_warps=4, num_stages=1, W=programs, **{name: sizes[name] for name in "SKHC"}))
  return dq[0], *dkv
