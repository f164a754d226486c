"""The public function of the op."""

from pallas_kernels import checks, implementations
from pallas_kernels.oracle_attention import reference


def _mosaic_gpu(*args, **options):
  from pallas_kernels.oracle_attention.gpu import (
    op as mosaic_gpu,  # its packages only where it is used
  )
  return mosaic_gpu.oracle_attention(*args, **options)


def _mosaic_tpu(*args, **options):
  from pallas_kernels.oracle_attention.tpu import op as mosaic_tpu
  return mosaic_tpu.oracle_attention(*args, **options)


_AVAILABLE = {"reference": reference.oracle_attention, "mosaic_gpu": _mosaic_gpu,
              "mosaic_tpu": _mosaic_tpu}
_BY_PLATFORM = {"gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}


def oracle_attention(q, k, v, *, block_size=64, num_blocks=16, segment_ids=None, scale=None,
                     implementation=None):
  """Causal GQA softmax attention, and the key blocks that mattered most to each query.

  A block's importance to query t and KV head k is its largest softmax weight over the keys
  j <= t of the block and the G query heads of the group, each normalised over its own row
  (HySparse paper). Only blocks with a visible key are candidates; nothing is forced in.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,T,K,H], N a multiple of K.
    v: [B,T,K,E]; its head dim E may differ from H.
    block_size: keys per block; the last block may be short.
    num_blocks: P, blocks to pick. 0 makes this plain causal attention.
    segment_ids: i32 [B,T] or None. Tokens see only their own segment; 0 is padding, which sees
      nothing (output 0, no blocks) and is seen by nobody.
    scale: of the logits; None is 1/sqrt(H).
    implementation: "reference", "mosaic_gpu" (NVIDIA Hopper), "mosaic_tpu", or None to pick by
      platform.

  Returns:
    out [B,T,N,E] in q's dtype, and block_indices i32 [B,K,T,P]: ascending, equal importance
    resolved to the lower block, -1 at the end where there are fewer candidates than P. The
    indices carry no gradient.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "oracle_attention"
  sizes = {}
  checks.check_shape(op, "q", q, "BTNH", sizes)
  checks.check_shape(op, "k", k, "BTKH", sizes)
  checks.check_shape(op, "v", v, "BTKE", sizes)
  checks.check_heads(op, sizes)
  checks.check_segments(op, segment_ids, sizes)
  checks.check_at_least(op, 1, block_size=block_size)
  checks.check_at_least(op, 0, num_blocks=num_blocks)
  checks.check_scale(op, scale)
  run = implementations.pick(op, implementation, _AVAILABLE, _BY_PLATFORM)
  return run(q, k, v, block_size=block_size, num_blocks=num_blocks, segment_ids=segment_ids,
             scale=sizes["H"] ** -0.5 if scale is None else scale)
