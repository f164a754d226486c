"""The public functions of the cached ops. No segments: a cache row holds one document."""

from pallas_kernels import checks, implementations
from pallas_kernels.cached_attention import reference

_TPU = "pallas_kernels.cached_attention.tpu.op"

_AVAILABLE = {
  "cached_oracle_attention": {"reference": reference.cached_oracle_attention,
                              "mosaic_tpu": implementations.lazy(
                                _TPU + ":cached_oracle_attention")},
  "cached_block_sparse_attention": {"reference": reference.cached_block_sparse_attention,
                                    "mosaic_tpu": implementations.lazy(
                                      _TPU + ":cached_block_sparse_attention")},
  "cached_sliding_window_attention": {"reference": reference.cached_sliding_window_attention},
}
_BY_PLATFORM = {
  "cached_oracle_attention": {"tpu": ("mosaic_tpu",)},
  "cached_block_sparse_attention": {"tpu": ("mosaic_tpu",)},
  "cached_sliding_window_attention": {},
}


def cached_oracle_attention(q, k, v, query_positions, *, block_size=64, num_blocks=16, scale=None,
                            layer=None, implementation=None):
  """`oracle_attention` of some queries over a cache that already holds their own keys.

  Slot j holds position j; a query sees the slots j <= its position. Later slots may hold
  anything, NaN included.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,S,K,H], N a multiple of K.
    v: [B,S,K,E]; its head dim E may differ from H.
    query_positions: i32 [B,T], below S.
    block_size: keys per block.
    num_blocks: P, blocks to select; 0 selects none.
    scale: of the logits; None is 1/sqrt(H).
    layer: i32 [] or None. Given, k and v are stacked caches [C,B,S,K,.], of which this one is
      used: a kernel reads it in place, where cutting it out first would copy it.
    implementation: "reference", "mosaic_tpu" (T=1), or None to pick by platform.

  Returns:
    out [B,T,N,E] in q's dtype, and block_indices i32 [B,K,T,P]: ascending, -1 at the end.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "cached_oracle_attention"
  sizes = _check_cache(op, q, k, v, query_positions, layer)
  checks.check_at_least(op, 1, block_size=block_size)
  checks.check_at_least(op, 0, num_blocks=num_blocks)
  run = implementations.pick(op, implementation, _AVAILABLE[op], _BY_PLATFORM[op],
                             tokens=sizes["T"])
  return run(q, k, v, query_positions, block_size=block_size, num_blocks=num_blocks,
             scale=checks.check_scale(op, scale, sizes), layer=layer)


def cached_block_sparse_attention(q, k, v, block_indices, query_positions, *, block_size=64,
                                  sinks=None, scale=None, layer=None, implementation=None):
  """`block_sparse_attention` of some queries over a cache that already holds their own keys.

  With one query per row (T=1) only the selected blocks are read.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k: [B,S,K,H], N a multiple of K; slot j holds position j, slots after the query's are not seen.
    v: [B,S,K,E]; its head dim E may differ from H.
    block_indices: i32 [B,K,T,P]: distinct blocks, -1 for none.
    query_positions: i32 [B,T], below S.
    block_size: keys per block.
    sinks: f32 [N] or None: a logit per head that joins the softmax denominator only.
    scale: of the logits; None is 1/sqrt(H).
    layer: i32 [] or None. Given, k and v are stacked caches [C,B,S,K,.], of which this one is
      used: a kernel reads it in place, where cutting it out first would copy it.
    implementation: "reference", "mosaic_tpu" (T=1), or None to pick by platform.

  Returns:
    out [B,T,N,E] in q's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "cached_block_sparse_attention"
  sizes = _check_cache(op, q, k, v, query_positions, layer)
  checks.check_shape(op, "block_indices", block_indices, "BKTP", sizes, ("int32",))
  checks.check_sinks(op, "sinks", sinks, sizes)
  checks.check_at_least(op, 1, block_size=block_size)
  run = implementations.pick(op, implementation, _AVAILABLE[op], _BY_PLATFORM[op],
                             tokens=sizes["T"])
  return run(q, k, v, block_indices, query_positions, block_size=block_size, sinks=sinks,
             scale=checks.check_scale(op, scale, sizes), layer=layer)


def cached_sliding_window_attention(q, k_ring, v_ring, k_new, v_new, query_positions, *, window,
                                    sinks=None, scale=None, implementation=None):
  """`sliding_window_attention` of new tokens over the ring of the last W tokens and themselves.

  Slot s of the ring holds the newest position p < query_positions[:,0] with p % W == s; a slot
  with no such p >= 0 may hold anything, NaN included. The ring is read only: writing the new
  keys into it is left to the caller.

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k_ring: [B,W,K,H], N a multiple of K, W = window.
    v_ring: [B,W,K,E]; its head dim E may differ from H.
    k_new: [B,T,K,H], the keys of the queries' own tokens.
    v_new: [B,T,K,E].
    query_positions: i32 [B,T], consecutive in each row.
    window: tokens a query sees, itself included.
    sinks: f32 [N] or None: a logit per head that joins the softmax denominator only.
    scale: of the logits; None is 1/sqrt(H).
    implementation: "reference", or None to pick by platform.

  Returns:
    out [B,T,N,E] in q's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "cached_sliding_window_attention"
  checks.check_at_least(op, 1, window=window)
  sizes = {"W": window}
  checks.check_shape(op, "q", q, "BTNH", sizes)
  checks.check_shape(op, "k_ring", k_ring, "BWKH", sizes)
  checks.check_shape(op, "v_ring", v_ring, "BWKE", sizes)
  checks.check_shape(op, "k_new", k_new, "BTKH", sizes)
  checks.check_shape(op, "v_new", v_new, "BTKE", sizes)
  checks.check_shape(op, "query_positions", query_positions, "BT", sizes, ("int32",))
  checks.check_heads(op, sizes)
  checks.check_sinks(op, "sinks", sinks, sizes)
  run = implementations.pick(op, implementation, _AVAILABLE[op], _BY_PLATFORM[op],
                             tokens=sizes["T"])
  return run(q, k_ring, v_ring, k_new, v_new, query_positions, window=window, sinks=sinks,
             scale=checks.check_scale(op, scale, sizes))


def _check_cache(op, q, k, v, query_positions, layer):
  sizes = {}
  checks.check_shape(op, "q", q, "BTNH", sizes)
  stack = "" if layer is None else "C"
  checks.check_shape(op, "k", k, stack + "BSKH", sizes)
  checks.check_shape(op, "v", v, stack + "BSKE", sizes)
  if layer is not None:
    checks.check_shape(op, "layer", layer, "", sizes, ("int32",))
  checks.check_shape(op, "query_positions", query_positions, "BT", sizes, ("int32",))
  checks.check_heads(op, sizes)
  return sizes
