"""The public functions of the paged ops: one token per sequence, its keys already in the cache."""

from pallas_kernels import checks, implementations
from pallas_kernels.paged_attention import reference

_KERNELS = {"triton": "pallas_kernels.paged_attention.gpu.op",
            "mosaic_tpu": "pallas_kernels.paged_attention.tpu.op"}

_AVAILABLE = {
  name: {"reference": getattr(reference, name),
         **{of: implementations.lazy(f"{module}:{name}") for of, module in _KERNELS.items()}}
  for name in ("paged_oracle_attention", "paged_sparse_layer_attention")}
_BY_PLATFORM = {name: {"gpu": ("triton",), "tpu": ("mosaic_tpu",)} for name in _AVAILABLE}


def paged_oracle_attention(q, k_pages, v_pages, page_table, lengths, *, layer, num_blocks=16,
                           scale=None, implementation=None):
  """Attention of each sequence's last token over all its tokens, and the token's top-P blocks.

  The cache is paged: token p of sequence b is slot p % S of page `page_table[b, p // S]`, where a
  page is a block of S tokens (64 in the Triton kernels). The slots, pages and table entries after
  the last token are never read: they may hold anything, NaN included. Rows of any lengths may stand
  together: work is split by pages, not by rows.

  Args:
    q: [B,N,H] float32, bfloat16 or float16: the query of token lengths[b] - 1.
    k_pages: [C,R,K,S,H], N a multiple of K: R pages in each of C layers.
    v_pages: [C,R,K,S,E]; its head dim E may differ from H.
    page_table: i32 [B,U], pages below R; U * S is the longest sequence there is room for.
    lengths: i32 [B], tokens of each sequence, the query's own included; 0 for an idle row, whose
      result is 0 and -1.
    layer: i32 [], of k_pages and v_pages.
    num_blocks: P, blocks to select; 0 selects none.
    scale: of the logits; None is 1/sqrt(H).
    implementation: "reference", "triton" (NVIDIA GPUs), "mosaic_tpu", or None to pick by platform.

  Returns:
    out [B,N,E] in q's dtype, and block_indices i32 [B,K,P]: numbers of blocks in the sequence (not
    of pages), ascending, -1 at the end.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist or does not take these sizes.
  """
  op, sizes = "paged_oracle_attention", {}
  checks.check_shape(op, "q", q, "BNH", sizes)
  _check_pages(op, k_pages, v_pages, page_table, lengths, layer, sizes)
  checks.check_heads(op, sizes)
  checks.check_at_least(op, 0, num_blocks=num_blocks)
  scale = checks.check_scale(op, scale, sizes)
  run = implementations.pick(op, implementation, _AVAILABLE[op], _BY_PLATFORM[op])
  return run(q, k_pages, v_pages, page_table, lengths, layer=layer, num_blocks=num_blocks,
             scale=scale)


def paged_sparse_layer_attention(q, k_pages, v_pages, block_indices, page_table, lengths, k_ring,
                                 v_ring, gate_sparse=None, gate_local=None, sinks_sparse=None,
                                 sinks_local=None, *, layer=None, ring_layer=None, scale=None,
                                 implementation=None):
  """`sparse_layer_attention` of each sequence's last token over a paged cache and a window ring.

      gate_sparse * attention over the selected blocks of the full layer's pages
        + gate_local * attention over the last W tokens, from the layer's own ring

  Ring slot p % W holds token p, the query's own included; slots that no token was written to may
  hold anything, NaN included, as may all that `paged_oracle_attention` does not read. With k_pages,
  v_pages, block_indices, page_table and layer None it is a sliding-window layer, with k_ring,
  v_ring and ring_layer None a layer without the local branch.

  Args:
    q: [B,N,H] float32, bfloat16 or float16.
    k_pages: [C,R,K,S,H], N a multiple of K: the full layers' pages.
    v_pages: [C,R,K,S,E]; its head dim E may differ from H.
    block_indices: i32 [B,K,P]: distinct blocks of the sequence, -1 for none.
    page_table: i32 [B,U], pages below R.
    lengths: i32 [B], tokens of each sequence, the query's own included; 0 for an idle row.
    k_ring: [L,B,K,W,H]: the rings of L layers; W is the window, the query's own token included.
    v_ring: [L,B,K,W,E].
    gate_sparse: [B,N,E] or, per head, [B,N,1], sigmoid already applied; None is 1.
    gate_local: the same for the local branch.
    sinks_sparse: f32 [N] or None, of the sparse branch's softmax.
    sinks_local: f32 [N] or None, of the local branch's.
    layer: i32 [], of k_pages and v_pages.
    ring_layer: i32 [], of k_ring and v_ring.
    scale: of the logits of both branches; None is 1/sqrt(H).
    implementation: "reference", "triton" (NVIDIA GPUs), "mosaic_tpu", or None to pick by platform.

  Returns:
    out [B,N,E] in q's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit, no branch at all, or an argument of an absent one.
    NotImplementedError: an implementation that does not exist or does not take these sizes.
  """
  op, sizes = "paged_sparse_layer_attention", {}
  checks.check_shape(op, "q", q, "BNH", sizes)
  sparse = dict(k_pages=k_pages, v_pages=v_pages, block_indices=block_indices,
                page_table=page_table, layer=layer)
  local = dict(k_ring=k_ring, v_ring=v_ring, ring_layer=ring_layer)
  for needed in (sparse, local):
    checks.require(len({x is None for x in needed.values()}) == 1,
                   f"{op}: give {', '.join(needed)} together, or None for all of them")
  checks.require(k_pages is not None or k_ring is not None,
                 f"{op}: neither k_pages nor k_ring; give one of the branches")
  if k_pages is not None:
    _check_pages(op, k_pages, v_pages, page_table, lengths, layer, sizes)
    checks.check_shape(op, "block_indices", block_indices, "BKP", sizes, ("int32",))
  if k_ring is not None:
    checks.check_shape(op, "k_ring", k_ring, "LBKWH", sizes)
    checks.check_shape(op, "v_ring", v_ring, "LBKWE", sizes)
    checks.check_shape(op, "ring_layer", ring_layer, "", sizes, ("int32",))
  checks.check_shape(op, "lengths", lengths, "B", sizes, ("int32",))
  checks.check_heads(op, sizes)
  for branch, present, gate, sinks in (("sparse", k_pages, gate_sparse, sinks_sparse),
                                       ("local", k_ring, gate_local, sinks_local)):
    checks.require(present is not None or (gate is None and sinks is None),
                   f"{op}: got gate_{branch} or sinks_{branch} without its branch; leave them out")
    if gate is not None:
      checks.check_shape(op, f"gate_{branch}", gate,
                         "BNE" if gate.shape[-1] != 1 else "BN1", sizes | {"1": 1})
    checks.check_sinks(op, f"sinks_{branch}", sinks, sizes)
  scale = checks.check_scale(op, scale, sizes)
  run = implementations.pick(op, implementation, _AVAILABLE[op], _BY_PLATFORM[op])
  return run(q, k_pages, v_pages, block_indices, page_table, lengths, k_ring, v_ring, gate_sparse,
             gate_local, sinks_sparse=sinks_sparse, sinks_local=sinks_local, layer=layer,
             ring_layer=ring_layer, scale=scale)


def _check_pages(op, k_pages, v_pages, page_table, lengths, layer, sizes):
  checks.check_shape(op, "k_pages", k_pages, "CRKSH", sizes)
  checks.check_shape(op, "v_pages", v_pages, "CRKSE", sizes)
  checks.check_shape(op, "page_table", page_table, "BU", sizes, ("int32",))
  checks.check_shape(op, "lengths", lengths, "B", sizes, ("int32",))
  checks.check_shape(op, "layer", layer, "", sizes, ("int32",))
