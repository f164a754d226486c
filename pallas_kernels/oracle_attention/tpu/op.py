"""`oracle_attention` on TPU: one forward kernel that also selects blocks, one backward kernel."""

from pallas_kernels.causal_attention_tpu.tiles import Options, Placement, attend, check, key_unit

OP = "oracle_attention"


def oracle_attention(q, k, v, *, block_size, num_blocks, segment_ids, scale, query_offset=0,
                     kv_segment_ids=None, interpret=False):
  """See `api.py`. Differentiable in q, k and v.

  Under `jax.checkpoint` with a policy that saves the names `oracle_out`, `oracle_lse` and
  `oracle_block_indices`, the backward pass runs no forward kernel again.

  Args:
    interpret: `tpu.interpret_params()`, or False to compile. The others as in `api.py`.

  Raises:
    NotCoveredError: dtypes other than bfloat16 and float32, head dims over 256; with num_blocks, a
      block_size that is no multiple of 8 with lcm(8*block_size, 128) at most 2048 (8 to 64 in
      steps of 8, 96, 112, 128 and more are).
  """
  check(OP, q, k, v)
  key_unit(OP, block_size, num_blocks)
  placement, query_offset = Placement.of(segment_ids, kv_segment_ids, query_offset)
  return attend(q, k, v, placement, None, Options(
    OP, query_offset, float(scale), block_size=block_size, num_blocks=num_blocks,
    interpret=interpret))
