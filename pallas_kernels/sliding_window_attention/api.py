"""The public function of the op."""

from pallas_kernels import checks, implementations
from pallas_kernels.sliding_window_attention import reference

_AVAILABLE = {
  "reference": reference.sliding_window_attention,
  "mosaic_gpu": implementations.lazy(
    "pallas_kernels.sliding_window_attention.gpu.op:sliding_window_attention"),
  "mosaic_tpu": implementations.lazy(
    "pallas_kernels.sliding_window_attention.tpu.op:sliding_window_attention"),
  "triton": implementations.lazy(
    "pallas_kernels.sliding_window_attention.gpu.op:sliding_window_attention_triton"),
}
_BY_PLATFORM = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}


def sliding_window_attention(q, k, v, *, window=128, sinks=None, query_offset=0, segment_ids=None,
                             kv_segment_ids=None, scale=None, implementation=None):
  """GQA softmax attention of each query over the last `window` tokens, itself included.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,S,K,H], N a multiple of K. Every key and value must be finite, also those that no query
      sees: they take part with weight 0, and 0 * NaN is NaN.
    v: [B,S,K,E]; its head dim E may differ from H.
    window: tokens, at least 1.
    sinks: f32 [N] or None: a logit per head that joins the softmax denominator only.
    query_offset: int, i32 [] or i32 [B], at least 0: the key index of query 0. Query t of row b
      sees the keys up to query_offset[b] + t, which may lie beyond the last key.
    segment_ids: i32 [B,T] or None, the queries' documents. A query attends within its document
      only. Segment 0 is padding and is masked both as query (output 0) and as key.
    kv_segment_ids: i32 [B,S], the keys' documents; None if T = S and query_offset is 0.
    scale: of the logits; None is 1/sqrt(H).
    implementation: "reference", "mosaic_gpu" (NVIDIA Hopper; its backward is Triton's), "triton"
      (Triton alone), "mosaic_tpu", or None to pick by platform.

  Returns:
    out [B,T,N,E] in q's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "sliding_window_attention"
  sizes, shared = checks.check_attention(op, q, k, v, query_offset, segment_ids, kv_segment_ids,
                                         scale)
  checks.check_sinks(op, "sinks", sinks, sizes)
  checks.check_at_least(op, 1, window=window)
  run = implementations.pick(op, implementation, _AVAILABLE, _BY_PLATFORM, tokens=sizes["T"])
  return run(q, k, v, window=window, sinks=sinks, **shared)
