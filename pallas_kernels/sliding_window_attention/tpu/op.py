"""`sliding_window_attention` on TPU: the causal kernels over the key tiles of the window."""

from pallas_kernels.causal_attention_tpu.tiles import Options, Placement, attend, check

OP = "sliding_window_attention"


def sliding_window_attention(q, k, v, *, window, sinks, segment_ids, scale, query_offset=0,
                             kv_segment_ids=None, interpret=False):
  """See `api.py`. Differentiable in q, k, v and sinks.

  Args:
    interpret: `tpu.interpret_params()`, or False to compile. The others as in `api.py`.

  Raises:
    NotCoveredError: dtypes other than bfloat16 and float32, head dims over 256.
  """
  check(OP, q, k, v)
  placement, query_offset = Placement.of(segment_ids, kv_segment_ids, query_offset)
  if query_offset is not None:                 # no query has more keys before it
    window = min(window, query_offset + q.shape[1])
  return attend(q, k, v, placement, sinks, Options(
    OP, query_offset, float(scale), window=window, interpret=interpret))[0]
