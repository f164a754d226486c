"""The public functions of the op: the attention, and the plan that its calls can share."""

from pallas_kernels import checks, implementations
from pallas_kernels.block_sparse_attention import reference

_GPU = "pallas_kernels.block_sparse_attention.gpu.op"
_TPU = "pallas_kernels.block_sparse_attention.tpu.op"


def _reference(*args, plan, **options):
  del plan
  return reference.block_sparse_attention(*args, **options)


def _plan_tpu(block_indices, group, num_keys, block_size, query_offset):
  from pallas_kernels.block_sparse_attention.tpu import op as mosaic_tpu
  return mosaic_tpu.make_plan(block_indices, group, block_size=block_size, num_keys=num_keys,
                              query_offset=query_offset)


_AVAILABLE = {"reference": _reference,
              "mosaic_gpu": implementations.lazy(_GPU + ":block_sparse_attention"),
              "mosaic_tpu": implementations.lazy(_TPU + ":block_sparse_attention"),
              "triton": implementations.lazy(_GPU + ":block_sparse_attention_triton")}
_PLANS = {
  "reference": lambda *_: None,
  "mosaic_gpu": implementations.lazy(_GPU + ":plan_blocks"),
  "mosaic_tpu": _plan_tpu,
  "triton": implementations.lazy(_GPU + ":plan_triton"),
}
_BY_PLATFORM = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}


def plan_blocks(block_indices, *, num_heads, num_keys=None, block_size=64, query_offset=0,
                implementation=None):
  """What the kernels derive from the selected blocks, computed once per hybrid block.

  Args:
    block_indices: i32 [B,K,T,P] as `oracle_attention` returns them.
    num_heads: N of the queries that will use them.
    num_keys: S; None: T.
    block_size: keys per block.
    query_offset: int, i32 [] or i32 [B], as the calls that take the plan get it.
    implementation: as the calls that take the plan get it.

  Returns:
    A pytree for the `plan` argument of `block_sparse_attention` and `sparse_layer_attention`, whose
    leaves lead with [B,K], so that it shards like the KV; None where the implementation needs none.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: a named implementation that does not exist or cannot run these sizes.
  """
  op = "plan_blocks"
  sizes = {"N": num_heads}
  checks.check_shape(op, "block_indices", block_indices, "BKTP", sizes, ("int32",))
  checks.check_heads(op, sizes)
  num_keys = sizes["T"] if num_keys is None else num_keys
  checks.check_at_least(op, 1, block_size=block_size, num_keys=num_keys)
  query_offset = checks.check_offset(op, "query_offset", query_offset, sizes)
  plan = implementations.pick(op, implementation, _PLANS, _BY_PLATFORM, tokens=sizes["T"])
  return plan(block_indices, num_heads // sizes["K"], num_keys, block_size, query_offset)


def block_sparse_attention(q, k, v, block_indices, *, block_size=64, sinks=None, query_offset=0,
                           segment_ids=None, kv_segment_ids=None, scale=None, plan=None,
                           implementation=None):
  """Causal GQA softmax attention of each query over its selected key blocks only.

  All G heads of a group use the same blocks; inside the query's own block the mask is causal
  (HySparse, sparse branch).

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,S,K,H], N a multiple of K. Every key and value must be finite, also those that no query
      sees: they take part with weight 0, and 0 * NaN is NaN.
    v: [B,S,K,E]; its head dim E may differ from H.
    block_indices: i32 [B,K,T,P] as `oracle_attention` returns them: distinct blocks, -1 for none.
    block_size: keys per block.
    sinks: f32 [N] or None: a logit per head that joins the softmax denominator only.
    query_offset: int, i32 [] or i32 [B], at least 0: the key index of query 0. Query t of row b
      sees the keys up to query_offset[b] + t, which may lie beyond the last key.
    segment_ids: i32 [B,T] or None, the queries' documents. A query attends within its document
      only. Segment 0 is padding and is masked both as query (output 0) and as key.
    kv_segment_ids: i32 [B,S], the keys' documents; None if T = S and query_offset is 0.
    scale: of the logits; None is 1/sqrt(H).
    plan: what `plan_blocks` returned for these indices and this implementation; None: made here.
    implementation: "reference", "mosaic_gpu" (NVIDIA Hopper; its backward is Triton's), "triton"
      (Triton alone), "mosaic_tpu", or None to pick by platform.

  Returns:
    out [B,T,N,E] in q's dtype; 0 where a query sees no key. No gradient reaches block_indices.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "block_sparse_attention"
  sizes, shared = checks.check_attention(op, q, k, v, query_offset, segment_ids, kv_segment_ids,
                                         scale)
  checks.check_shape(op, "block_indices", block_indices, "BKTP", sizes, ("int32",))
  checks.check_sinks(op, "sinks", sinks, sizes)
  checks.check_at_least(op, 1, block_size=block_size)
  run = implementations.pick(op, implementation, _AVAILABLE, _BY_PLATFORM, tokens=sizes["T"])
  return run(q, k, v, block_indices, block_size=block_size, sinks=sinks, plan=plan, **shared)
