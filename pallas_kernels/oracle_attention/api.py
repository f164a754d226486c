"""The public function of the op."""

from pallas_kernels import checks, implementations
from pallas_kernels.oracle_attention import reference

_AVAILABLE = {
  "reference": reference.oracle_attention,
  "mosaic_gpu": implementations.lazy("pallas_kernels.oracle_attention.gpu.op:oracle_attention"),
  "mosaic_tpu": implementations.lazy("pallas_kernels.oracle_attention.tpu.op:oracle_attention"),
}
_BY_PLATFORM = {"gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}


def oracle_attention(q, k, v, *, block_size=64, num_blocks=16, query_offset=0, segment_ids=None,
                     kv_segment_ids=None, scale=None, implementation=None):
  """Causal GQA softmax attention that also returns each query's top-P key blocks.

  A block's importance to query t and KV head k is its largest softmax weight over the
  visible keys of the block and the G query heads of the group, each normalised over its own row
  (HySparse paper). Only blocks with a visible key are candidates; nothing is forced in.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,S,K,H], N a multiple of K. Every key and value must be finite, also those that no query
      sees: they take part with weight 0, and 0 * NaN is NaN.
    v: [B,S,K,E]; its head dim E may differ from H.
    block_size: keys per block; the last block may be short.
    num_blocks: P, blocks to select. 0 makes this plain causal attention.
    query_offset: int, i32 [] or i32 [B], at least 0: the key index of query 0. Query t of row b
      sees the keys up to query_offset[b] + t, which may lie beyond the last key.
    segment_ids: i32 [B,T] or None, the queries' documents. A query attends within its document
      only. Segment 0 is padding and is masked both as query (output 0, no blocks) and as key.
    kv_segment_ids: i32 [B,S], the keys' documents; None if T = S and query_offset is 0.
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
  sizes, shared = checks.check_attention(op, q, k, v, query_offset, segment_ids, kv_segment_ids,
                                         scale)
  checks.check_at_least(op, 1, block_size=block_size)
  checks.check_at_least(op, 0, num_blocks=num_blocks)
  run = implementations.pick(op, implementation, _AVAILABLE, _BY_PLATFORM, tokens=sizes["T"])
  return run(q, k, v, block_size=block_size, num_blocks=num_blocks, **shared)
