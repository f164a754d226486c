"""The public function of the op."""

from pallas_kernels import checks, implementations
from pallas_kernels.sparse_layer_attention import reference


def _reference(*args, plan, **options):
  del plan
  return reference.hybrid_sparse_attention(*args, **options)


def _mosaic_gpu(*args, **options):
  from pallas_kernels.sparse_layer_attention.gpu import (
    op as gpu,  # its packages only where it is used
  )
  return gpu.hybrid_sparse_attention(*args, **options)


def _mosaic_tpu(*args, **options):
  from pallas_kernels.sparse_layer_attention.tpu import op as mosaic_tpu
  return mosaic_tpu.hybrid_sparse_attention(*args, **options)


_AVAILABLE = {"reference": _reference, "mosaic_gpu": _mosaic_gpu,
              "mosaic_tpu": _mosaic_tpu}
_BY_PLATFORM = {"gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}


def hybrid_sparse_attention(q, k_shared, v_shared, block_indices, k_local, v_local, gate_sparse,
                            gate_local, sinks_sparse=None, sinks_local=None, *, block_size=64,
                            window=128, segment_ids=None, scale=None, plan=None,
                            implementation=None):
  """The whole attention of a sparse layer: one query, two branches, gated and summed.

      gate_sparse * block_sparse_attention(q, k_shared, v_shared, block_indices)
        + gate_local * sliding_window_attention(q, k_local, v_local)        (HySparse paper)

  Args:
    q: [B,T,N,H] float32, bfloat16 or float16.
    k_shared: [B,T,K,H] of the full layer, N a multiple of K.
    v_shared: [B,T,K,E]; its head dim E may differ from H.
    block_indices: i32 [B,K,T,P] of the full layer: distinct blocks, -1 for none.
    k_local: [B,T,K,H] of this layer.
    v_local: [B,T,K,E] of this layer.
    gate_sparse: broadcastable to [B,T,N,E]: sigmoid already applied; per-head gates are [B,T,N,1].
    gate_local: the same for the local branch. The two need not sum to 1.
    sinks_sparse: f32 [N] or None, of the sparse branch's softmax.
    sinks_local: f32 [N] or None, of the local branch's.
    block_size: keys per block.
    window: tokens of the local branch, the query's own included.
    segment_ids: i32 [B,T] or None; 0 is padding, see `block_sparse_attention`.
    scale: of the logits of both branches; None is 1/sqrt(H).
    plan: what `plan_blocks` returned for these indices and this implementation; None: made here.
    implementation: "reference", "mosaic_gpu" (NVIDIA Hopper), "mosaic_tpu", or None to pick by
      platform.

  Returns:
    out [B,T,N,E] in q's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: an implementation that does not exist.
  """
  op = "hybrid_sparse_attention"
  sizes = {}
  checks.check_shape(op, "q", q, "BTNH", sizes)
  checks.check_shape(op, "k_shared", k_shared, "BTKH", sizes)
  checks.check_shape(op, "v_shared", v_shared, "BTKE", sizes)
  checks.check_shape(op, "block_indices", block_indices, "BKTP", sizes, ("int32",))
  checks.check_shape(op, "k_local", k_local, "BTKH", sizes)
  checks.check_shape(op, "v_local", v_local, "BTKE", sizes)
  checks.check_heads(op, sizes)
  checks.check_broadcast(op, "gate_sparse", gate_sparse, "BTNE", sizes)
  checks.check_broadcast(op, "gate_local", gate_local, "BTNE", sizes)
  checks.check_sinks(op, "sinks_sparse", sinks_sparse, sizes)
  checks.check_sinks(op, "sinks_local", sinks_local, sizes)
  checks.check_segments(op, segment_ids, sizes)
  checks.check_at_least(op, 1, block_size=block_size, window=window)
  checks.check_scale(op, scale)
  run = implementations.pick(op, implementation, _AVAILABLE, _BY_PLATFORM)
  return run(q, k_shared, v_shared, block_indices, k_local, v_local, gate_sparse, gate_local,
             sinks_sparse=sinks_sparse, sinks_local=sinks_local, block_size=block_size,
             window=window, segment_ids=segment_ids,
             scale=sizes["H"] ** -0.5 if scale is None else scale, plan=plan)
