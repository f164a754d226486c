"""The attention of a sparse layer on NVIDIA GPUs: both branches' kernels, gated and summed.

Where hot and rare picks meet, the kernel that sums their parts also gates that sum and adds the
gated local branch: the sparse branch's output is not read and written once more for the gates.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.block_sparse_attention.gpu import forward as mosaic_gpu
from pallas_kernels.block_sparse_attention.gpu import op as block_sparse
from pallas_kernels.sliding_window_attention.gpu import op as sliding_window

_LOG2E = block_sparse._LOG2E


def _forward(q, k_shared, v_shared, k_local, v_local, gates, sinks, segment_ids, plan, scale,
             window, keep):
  """-> out [B,T,N,H] and, for `keep`, (out_sparse, lse, out_local, lse_local), else None."""
  b, t, n, _ = q.shape
  kv_heads = k_shared.shape[2]
  options = dict(scale=scale, segment_ids=segment_ids)
  local, local_lse = mosaic_gpu.union_forward(
    q, k_local, v_local, sliding_window.window_plan(b, kv_heads, window, t, n // kv_heads),
    sinks=sinks[1], window=window, **options)
  if plan.config.has_hot and plan.config.has_rare:
    from pallas_kernels.block_sparse_attention.gpu import backward as triton

    union = block_sparse.hot_forward(q, k_shared, v_shared, plan, sinks=sinks[0], **options)
    out, lse, sparse = triton.forward(
      q, k_shared, v_shared, plan, union=union, gates=triton.Gates(local, *gates, keep), **options)
  else:                                     # one kernel has all the picks: XLA gates and adds
    sparse, lse = block_sparse.forward(
      q, k_shared, v_shared, sinks[0], segment_ids, plan, scale, None)
    out = (gates[0].astype(jnp.float32) * sparse
           + gates[1].astype(jnp.float32) * local).astype(q.dtype)
  return out, (sparse, lse, local, local_lse) if keep else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _hybrid(q, k_shared, v_shared, k_local, v_local, gates, sinks, segment_ids, plan, scale,
            window):
  return _forward(q, k_shared, v_shared, k_local, v_local, gates, sinks, segment_ids, plan, scale,
                  window, False)[0]


def _hybrid_fwd(*args):
  *arrays, scale, window = args
  out, kept = _forward(*arrays, scale, window, True)
  return out, (arrays, kept)


def _hybrid_bwd(scale, window, saved, dout):
  from pallas_kernels.block_sparse_attention.gpu import backward as triton

  arrays, (out_sparse, lse_sparse, out_local, lse_local) = saved
  q, k_shared, v_shared, k_local, v_local, gates, sinks, segment_ids, plan = arrays
  b, t, n, _ = q.shape
  kv_heads = k_shared.shape[2]
  window_plan = sliding_window.window_plan(b, kv_heads, window, t, n // kv_heads)
  dout = dout.astype(jnp.float32)
  grads, dgates, dsinks = [], [], []
  for k, v, out, lse, gate, sink, own_plan, own_window in (
      (k_shared, v_shared, out_sparse, lse_sparse, gates[0], sinks[0], plan, None),
      (k_local, v_local, out_local, lse_local, gates[1], sinks[1], window_plan, window)):
    out = out.astype(jnp.float32)
    dgate = dout * out
    dbranch = dout * gate.astype(jnp.float32)
    delta = (dbranch * out).sum(-1)
    grads.append(triton.backward(
      q, k, v, dbranch.astype(q.dtype), lse, delta, own_plan, scale=scale,
      segment_ids=segment_ids, window=own_window))
    dgate = dgate.sum(-1, keepdims=True) if gate.shape[-1] == 1 else dgate
    dgates.append(dgate.astype(gate.dtype))
    dsinks.append(None if sink is None else
                  -(jnp.exp2(sink * _LOG2E - lse) * delta).sum((0, 1)))
  (dq, dk_shared, dv_shared), (dq_local, dk_local, dv_local) = grads
  dq = (dq.astype(jnp.float32) + dq_local.astype(jnp.float32)).astype(q.dtype)
  return (dq, dk_shared, dv_shared, dk_local, dv_local, tuple(dgates), tuple(dsinks), None, None)


_hybrid.defvjp(_hybrid_fwd, _hybrid_bwd)


def sparse_layer_attention(q, k_shared, v_shared, block_indices, k_local, v_local, gate_sparse,
                            gate_local, *, sinks_sparse=None, sinks_local=None, block_size=64,
                            window=128, query_offset=0, local_query_offset=0, segment_ids=None,
    kv_segment_ids=None, local_kv_segment_ids=None, scale=None,
    plan=None):
  """The op of `api.py`; `plan` and what is raised as in `block_sparse_attention`."""
  if any(x is None for x in (k_shared, k_local, gate_sparse, gate_local)):
    raise checks.NotCoveredError("sparse_layer_attention: got an absent branch or gate")
  checks.queries_are_keys("sparse_layer_attention", query_offset, segment_ids, kv_segment_ids,
                          (q.shape[1], k_shared.shape[1]))
  checks.queries_are_keys("sparse_layer_attention", local_query_offset, segment_ids,
                          local_kv_segment_ids,
                          (q.shape[1], k_local.shape[1]))
  op = "sparse_layer_attention"
  block_sparse.check_picks(op, block_indices, block_size)
  sliding_window.check_window(op, window)
  block_sparse.check_sizes(op, q, (k_shared, v_shared), (k_local, v_local))
  b, t, n, h = q.shape
  pad = block_sparse.Padding(t, k_shared.shape[2], n // k_shared.shape[2])
  width = max(gate_sparse.shape[-1], gate_local.shape[-1])
  gates = tuple(pad.heads(jnp.broadcast_to(gate, (b, t, n, width)))
                for gate in (gate_sparse, gate_local))
  out = _hybrid(
    pad.heads(q), *map(pad.tail, (k_shared, v_shared, k_local, v_local)), gates,
    (pad.sinks(sinks_sparse), pad.sinks(sinks_local)), pad.tail(segment_ids),
    plan or block_sparse.make_plan(block_indices, pad.group),
    float(h ** -0.5 if scale is None else scale), window)
  return pad.cut(out)
