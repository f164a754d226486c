"""The public function of the op."""

from pallas_kernels import checks, implementations
from pallas_kernels.sparse_layer_attention import reference


def _reference(*args, plan, **options):
  del plan
  return reference.sparse_layer_attention(*args, **options)


_AVAILABLE = {
  "reference": _reference,
  "mosaic_gpu": implementations.lazy(
    "pallas_kernels.sparse_layer_attention.gpu.op:sparse_layer_attention"),
  "mosaic_tpu": implementations.lazy(
    "pallas_kernels.sparse_layer_attention.tpu.op:sparse_layer_attention"),
  "triton": implementations.lazy(
    "pallas_kernels.sparse_layer_attention.gpu.op:sparse_layer_attention_triton"),
}
_BY_PLATFORM = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}


def sparse_layer_attention(q, k, v, block_indices, k_local, v_local, gate_sparse=None,
                           gate_local=None, sinks_sparse=None, sinks_local=None, *, block_size=64,
                           window=128, query_offset=0, local_query_offset=None, segment_ids=None,
                           kv_segment_ids=None, local_kv_segment_ids=None, scale=None, plan=None,
                           implementation=None):
  """The attention of a sparse layer: one query, two gated branches, summed.

      gate_sparse * block_sparse_attention(q, k, v, block_indices, sinks=sinks_sparse)
        + gate_local * sliding_window_attention(q, k_local, v_local, sinks=sinks_local)

  (HySparse, sparse layer.) With k, v and block_indices None it is a sliding-window layer, with
  k_local and v_local None a layer without the local branch.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,S,K,H] of the full layer, N a multiple of K; None: no sparse branch. Every key and value
      must be finite, also those that no query sees.
    v: [B,S,K,E]; its head dim E may differ from H.
    block_indices: i32 [B,K,T,P] of the full layer: distinct blocks, -1 for none.
    k_local: [B,L,K,H], the local branch's own keys; None: no local branch.
    v_local: [B,L,K,E].
    gate_sparse: broadcastable to [B,T,N,E]: sigmoid already applied; per-head gates are
      [B,T,N,1]. None is 1.
    gate_local: the same for the local branch. The two need not sum to 1.
    sinks_sparse: f32 [N] or None, of the sparse branch's softmax.
    sinks_local: f32 [N] or None, of the local branch's.
    block_size: keys per block.
    window: tokens of the local branch, the query's own included.
    query_offset: int, i32 [] or i32 [B], at least 0: the index of query 0 among the keys k.
    local_query_offset: the same among the keys k_local; None: query_offset.
    segment_ids: i32 [B,T] or None, the queries' documents; 0 is padding, masked both as query
      (output 0) and as key.
    kv_segment_ids: i32 [B,S], of the keys k; None if T = S and query_offset is 0.
    local_kv_segment_ids: i32 [B,L], of the keys k_local; None if T = L and their offset is 0, or if
      k_local has the length and the offset of k.
    scale: of the logits of both branches; None is 1/sqrt(H).
    plan: what `plan_blocks` returned for these indices and this implementation; None: made here.
    implementation: "reference", "mosaic_gpu" (NVIDIA Hopper; its backward is Triton's), "triton"
      (Triton alone), "mosaic_tpu", or None to pick by platform.

  Returns:
    out [B,T,N,E] in q's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit, no branch at all, or an argument of an absent one.
    NotImplementedError: an implementation that does not exist.
  """
  op = "sparse_layer_attention"
  sizes = {}
  checks.check_shape(op, "q", q, "BTNH", sizes)
  has_sparse, has_local = k is not None, k_local is not None
  checks.require((v is not None) == has_sparse == (block_indices is not None),
                 f"{op}: give k, v and block_indices together, or None for all three")
  checks.require((v_local is not None) == has_local,
                 f"{op}: give k_local and v_local together, or None for both")
  checks.require(has_sparse or has_local, f"{op}: neither k nor k_local; give one of the branches")
  absent = {} if has_sparse else dict(gate_sparse=gate_sparse, sinks_sparse=sinks_sparse,
                                      kv_segment_ids=kv_segment_ids, plan=plan)
  if not has_local:
    absent |= dict(gate_local=gate_local, sinks_local=sinks_local,
                   local_query_offset=local_query_offset, local_kv_segment_ids=local_kv_segment_ids)
  for name, value in absent.items():
    checks.require(value is None, f"{op}: got {name} without its branch; leave it out")
  query_offset = checks.check_offset(op, "query_offset", query_offset, sizes)
  same_offset = local_query_offset is None
  local_query_offset = query_offset if same_offset else checks.check_offset(
    op, "local_query_offset", local_query_offset, sizes)
  query_segments = segment_ids
  if has_sparse:
    checks.check_shape(op, "k", k, "BSKH", sizes)
    checks.check_shape(op, "v", v, "BSKE", sizes)
    checks.check_shape(op, "block_indices", block_indices, "BKTP", sizes, ("int32",))
    query_segments, kv_segment_ids = checks.check_segments(
      op, segment_ids, kv_segment_ids, query_offset, sizes)
  if has_local:
    checks.check_shape(op, "k_local", k_local, "BLKH", sizes)
    checks.check_shape(op, "v_local", v_local, "BLKE", sizes)
    if local_kv_segment_ids is None and has_sparse and same_offset and sizes["L"] == sizes["S"]:
      local_kv_segment_ids = kv_segment_ids
    query_segments, local_kv_segment_ids = checks.check_segments(
      op, segment_ids, local_kv_segment_ids, local_query_offset, sizes, "L", "local_kv_segment_ids")
  checks.check_heads(op, sizes)
  for branch, gate, sinks in (("sparse", gate_sparse, sinks_sparse),
                              ("local", gate_local, sinks_local)):
    if gate is not None:
      checks.check_broadcast(op, f"gate_{branch}", gate, "BTNE", sizes)
    checks.check_sinks(op, f"sinks_{branch}", sinks, sizes)
  checks.check_at_least(op, 1, block_size=block_size, window=window)
  scale = checks.check_scale(op, scale, sizes)
  run = implementations.pick(op, implementation, _AVAILABLE, _BY_PLATFORM, tokens=sizes["T"])
  return run(q, k, v, block_indices, k_local, v_local, gate_sparse, gate_local,
             sinks_sparse=sinks_sparse, sinks_local=sinks_local, block_size=block_size,
             window=window, query_offset=query_offset, local_query_offset=local_query_offset,
             segment_ids=query_segments, kv_segment_ids=kv_segment_ids,
             local_kv_segment_ids=local_kv_segment_ids, scale=scale, plan=plan)


hybrid_sparse_attention = sparse_layer_attention     # its former name, for one release
