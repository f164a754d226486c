"""The public function of the op."""

from pallas_kernels import checks, implementations
from pallas_kernels.sliding_window_attention import reference


def _mosaic_gpu(*args, **options):
  from pallas_kernels.sliding_window_attention.gpu import op as gpu
  return gpu.sliding_window_attention(*args, **options)


def _mosaic_tpu(*args, **options):
  from pallas_kernels.sliding_window_attention.tpu import op as mosaic_tpu
  return mosaic_tpu.sliding_window_attention(*args, **options)


_AVAILABLE = {"reference": reference.sliding_window_attention, "mosaic_gpu": _mosaic_gpu,
              "mosaic_tpu": _mosaic_tpu}
_BY_PLATFORM = {"gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}


def sliding_window_attention(q, k, v, *, window=128, sinks=None, segment_ids=None, scale=None,
                             implementation=None):
  """GQA softmax attention of each query over the last `window` tokens, itself included.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,T,K,H], N a multiple of K.
    v: [B,T,K,E]; its head dim E may differ from H.
    window: tokens, at least 1.
    sinks: f32 [N] or None: a logit per head that joins the softmax denominator only.
    segment_ids: i32 [B,T] or None. Tokens see only their own segment; 0 is padding, which sees
      nothing (output 0) and is seen by nobody.
    scale: of the logits; None is 1/sqrt(H).
    implementation: "reference", "mosaic_gpu" (NVIDIA Hopper), "mosaic_tpu", or None to pick by
      platform.

  Returns:
    out [B,T,N,E] in q's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "sliding_window_attention"
  sizes = {}
  checks.check_shape(op, "q", q, "BTNH", sizes)
  checks.check_shape(op, "k", k, "BTKH", sizes)
  checks.check_shape(op, "v", v, "BTKE", sizes)
  checks.check_heads(op, sizes)
  checks.check_sinks(op, "sinks", sinks, sizes)
  checks.check_segments(op, segment_ids, sizes)
  checks.check_at_least(op, 1, window=window)
  checks.check_scale(op, scale)
  run = implementations.pick(op, implementation, _AVAILABLE, _BY_PLATFORM)
  return run(q, k, v, window=window, sinks=sinks, segment_ids=segment_ids,
             scale=sizes["H"] ** -0.5 if scale is None else scale)
