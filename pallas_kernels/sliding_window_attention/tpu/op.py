"""`sliding_window_attention` on TPU: the causal kernels over the key tiles of the window."""

import functools

import jax

from pallas_kernels.causal_attention_tpu import tiles as tpu_attention
from pallas_kernels.causal_attention_tpu.tiles import Placement

OP = "sliding_window_attention"


def sliding_window_attention(q, k, v, *, window, sinks, segment_ids, scale, query_offset=0,
                             kv_segment_ids=None, interpret=False):
  """See `api.py`. Differentiable in q, k, v and sinks.

  Args:
    q: [B,T,N,H] bfloat16 or float32, H up to 256.
    k: [B,S,K,H].
    v: [B,S,K,E], E up to 256.
    window: tokens, any.
    sinks: f32 [N] or None.
    segment_ids: i32 [B,T] or None.
    scale: multiplies the logits.
    query_offset: int, or i32 [B]: the key index of query 0.
    kv_segment_ids: i32 [B,S] or None; given with `segment_ids`.
    interpret: `tpu.interpret_params()`, or False to compile.

  Raises:
    NotCoveredError: values that this implementation does not cover.
  """
  tpu_attention.check(OP, q, k, v)
  placement, query_offset = Placement.of(segment_ids, kv_segment_ids, query_offset)
  if query_offset is not None:                 # no query has more keys before it
    window = min(window, query_offset + q.shape[1])
  return _attend(q, k, v, placement, sinks, query_offset, window, float(scale), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attend(q, k, v, placement, sinks, *static):
  return _forward(q, k, v, placement, sinks, *static)[0]


def _forward(q, k, v, placement, sinks, query_offset, window, scale, interpret):
  """out [B,T,N,E], lse f32 [B,N,T] with the sinks in it."""
  tiles = tpu_attention.forward_tiles(
    q.shape[1], k.shape[1], q.shape[2] // k.shape[2], tpu_attention.key_unit(OP, 0, 0),
    window=window)
  with jax.named_scope("sliding_window_attention"):
    return tpu_attention.forward(q, k, v, placement, sinks, query_offset=query_offset, tiles=tiles,
                                 scale=scale, window=window, interpret=interpret)[:2]


def _attend_fwd(q, k, v, placement, sinks, *static):
  out, lse = _forward(q, k, v, placement, sinks, *static)
  return out, (q, k, v, placement, sinks, out, lse)


def _attend_bwd(query_offset, window, scale, interpret, residuals, grad_out):
  q, k, v, placement, sinks, out, lse = residuals
  tiles = tpu_attention.backward_tiles(
    q.shape[1], k.shape[1], q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3]), q.dtype,
    window=window)
  with jax.named_scope("sliding_window_attention_backward"):
    dq, dk, dv, dsinks = tpu_attention.backward(
      q, k, v, placement, sinks, out, lse, grad_out, query_offset=query_offset, tiles=tiles,
      scale=scale, window=window, interpret=interpret)
  return dq, dk, dv, None, dsinks


_attend.defvjp(_attend_fwd, _attend_bwd)
