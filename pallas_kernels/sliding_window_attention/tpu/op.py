"""`sliding_window_attention` on TPU: the kernels of `tpu_attention` over the tiles of the band."""

import functools

import jax

from pallas_kernels import checks
from pallas_kernels.causal_attention_tpu import tiles as tpu_attention

OP = "sliding_window_attention"


def sliding_window_attention(q, k, v, *, window, sinks, segment_ids, scale, query_offset=0,
                     kv_segment_ids=None, interpret=False):
  """See `api.py`. Differentiable in q, k, v and sinks.

  Args:
    q: [B,T,N,H] bfloat16 or float32, H up to 256.
    k: [B,T,K,H].
    v: [B,T,K,E], E up to 256.
    window: tokens, any.
    sinks: f32 [N] or None.
    segment_ids: i32 [B,T] or None.
    scale: multiplies the logits.
    interpret: `tpu.interpret_params()`, or False to compile.

  Raises:
    NotImplementedError: values that this implementation does not cover.
  """
  checks.queries_are_keys("sliding_window_attention", query_offset, segment_ids, kv_segment_ids,
                          (q.shape[1], k.shape[1]))
  tpu_attention.check(OP, q, k, v)
  window = min(window, q.shape[1])
  return _attend(q, k, v, segment_ids, sinks, window, float(scale), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, segment_ids, sinks, window, scale, interpret):
  return _forward(q, k, v, segment_ids, sinks, window, scale, interpret)[0]


def _forward(q, k, v, segment_ids, sinks, window, scale, interpret):
  """out [B,T,N,E], lse f32 [B,N,T] with the sinks in it."""
  tiles = tpu_attention.forward_tiles(
    q.shape[1], q.shape[2] // k.shape[2], tpu_attention.key_unit(OP, 0, 0), window=window)
  return tpu_attention.forward(q, k, v, segment_ids, sinks, tiles=tiles, scale=scale,
                               window=window, interpret=interpret)[:2]


def _attend_fwd(q, k, v, segment_ids, sinks, window, scale, interpret):
  out, lse = _forward(q, k, v, segment_ids, sinks, window, scale, interpret)
  return out, (q, k, v, segment_ids, sinks, out, lse)


def _attend_bwd(window, scale, interpret, residuals, grad_out):
  q, k, v, segment_ids, sinks, out, lse = residuals
  tiles = tpu_attention.backward_tiles(
    q.shape[1], q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3]), q.dtype, window=window)
  dq, dk, dv, dsinks = tpu_attention.backward(
    q, k, v, segment_ids, sinks, out, lse, grad_out, tiles=tiles, scale=scale, window=window,
    interpret=interpret)
  return dq, dk, dv, None, dsinks


_attend.defvjp(_attend_fwd, _attend_bwd)
