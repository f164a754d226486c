"""The attention of a sparse layer on NVIDIA GPUs: both branches' kernels, gated and summed.

Where hot and rare selections meet, the kernel that sums their parts also gates that sum and adds
the gated local branch: the sparse branch's output is not read and written once more for the gates.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.gpu import op as block_sparse
from pallas_kernels.block_sparse_attention.gpu.visibility import visibility
from pallas_kernels.gpu_padding import Padding, check_sizes, pad_tokens
from pallas_kernels.sliding_window_attention.gpu import op as sliding_window


def _gated(gate, out):
  out = out.astype(jnp.float32)
  return out if gate is None else gate.astype(jnp.float32) * out


def _forward(q, keys_values, gates, sinks, visible, plans, scale, keep):
  """-> out [B,T,N,H] and, for `keep`, (out, lse) of both branches, else None."""
  (k, v), (k_local, v_local) = keys_values
  plan = plans[0]
  with jax.named_scope("local_branch"):
    local = block_sparse.forward(q, k_local, v_local, sinks[1], visible[1], plans[1], scale)
  with jax.named_scope("sparse_branch"):
    if plan.config.has_hot and plan.config.has_rare:
      from pallas_kernels.block_sparse_attention.gpu.forward_rare import Gates

      hot = block_sparse.hot_forward(q, k, v, plan, visible[0], scale=scale, sinks=sinks[0])
      out, lse, sparse = block_sparse.rare_forward(
        q, k, v, plan, visible[0], scale=scale, hot=hot, gates=Gates(local[0], *gates, keep))
    else:                                     # one kernel has all selections: XLA gates and adds
      sparse, lse = block_sparse.forward(q, k, v, sinks[0], visible[0], plan, scale)
      out = (_gated(gates[0], sparse) + _gated(gates[1], local[0])).astype(q.dtype)
  return out, ((sparse, lse), local) if keep else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _layer(q, keys_values, gates, sinks, visible, plans, scale):
  """Both branches at padded sizes; pairs are (sparse, local)."""
  return _forward(q, keys_values, gates, sinks, visible, plans, scale, False)[0]


def _layer_fwd(*args):
  *arrays, scale = args
  out, kept = _forward(*arrays, scale, True)
  return out, (arrays, kept)


def _layer_bwd(scale, saved, dout):
  (q, keys_values, gates, sinks, visible, plans), kept = saved
  dout = dout.astype(jnp.float32)
  dq, dkeys_values, dgates, dsinks = 0.0, [], [], []
  for (k, v), gate, sink, own_visible, plan, (out, lse), name in zip(
      keys_values, gates, sinks, visible, plans, kept, ("sparse_branch", "local_branch"),
      strict=True):
    with jax.named_scope(name):
      dbranch, dgate = dout, None
      if gate is not None:
        dgate = dout * out.astype(jnp.float32)
        dgate = dgate.sum(-1, keepdims=True) if gate.shape[-1] == 1 else dgate
        dgate = dgate.astype(gate.dtype)
        dbranch = dout * gate.astype(jnp.float32)
      dq_branch, dk, dv, dsink = block_sparse.backward(
        q, k, v, sink, own_visible, plan, out, lse, dbranch, scale)
    dq = dq + dq_branch.astype(jnp.float32)
    dkeys_values.append((dk, dv))
    dgates.append(dgate)
    dsinks.append(dsink)
  return (dq.astype(q.dtype), tuple(dkeys_values), tuple(dgates), tuple(dsinks), None, None)


_layer.defvjp(_layer_fwd, _layer_bwd)


def sparse_layer_attention(q, k, v, block_indices, k_local, v_local, gate_sparse, gate_local, *,
                           sinks_sparse, sinks_local, block_size, window, query_offset,
                           local_query_offset, segment_ids, kv_segment_ids, local_kv_segment_ids,
                           scale, plan, hot_threshold=None):
  """The op of `api.py`; `plan`, `hot_threshold` and errors as in `block_sparse_attention`."""
  op = "sparse_layer_attention"
  all_rare = hot_threshold == block_sparse.ALL_RARE
  if k is None:
    out = sliding_window.sliding_window_attention(
      q, k_local, v_local, window=window, sinks=sinks_local, query_offset=local_query_offset,
      segment_ids=segment_ids, kv_segment_ids=local_kv_segment_ids, scale=scale,
      all_rare=all_rare)
    return _gated(gate_local, out).astype(q.dtype)
  if k_local is None:
    out = block_sparse.block_sparse_attention(
      q, k, v, block_indices, block_size=block_size, sinks=sinks_sparse,
      query_offset=query_offset, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids,
      scale=scale, plan=plan, hot_threshold=hot_threshold)
    return _gated(gate_sparse, out).astype(q.dtype)
  block_sparse.check_selection(op, block_indices, block_size)
  sliding_window.check_window(op, window)
  check_sizes(op, q, (k, v), (k_local, v_local))
  b, t, n, _ = q.shape
  pad = Padding(t, k.shape[2], n // k.shape[2])
  visible = (visibility(t, k.shape[1], query_offset, segment_ids, kv_segment_ids),
             visibility(t, k_local.shape[1], local_query_offset, segment_ids, local_kv_segment_ids,
                        window))
  if plan is None:
    plan = block_sparse.make_plan(block_indices, pad.group, k.shape[1], query_offset,
                                  hot_threshold)
  gates = tuple(
    None if gate is None else pad.heads(jnp.broadcast_to(gate, (b, t, n, gate.shape[-1])))
    for gate in (gate_sparse, gate_local))
  q, k, v, k_local, v_local = pad.heads(q), *map(pad_tokens, (k, v, k_local, v_local))
  block_sparse.check_plan(op, plan, q, k, visible[0])
  local_plan = sliding_window.plan_config(all_rare, q.shape[2] // k.shape[2])
  with jax.named_scope(op):
    return pad.cut(_layer(
      q, ((k, v), (k_local, v_local)), gates, (pad.sinks(sinks_sparse), pad.sinks(sinks_local)),
      visible, (plan, local_plan), float(scale)))


def sparse_layer_attention_triton(*args, **options):
  """`sparse_layer_attention` by the Triton kernels alone."""
  return sparse_layer_attention(*args, **options, hot_threshold=block_sparse.ALL_RARE)
