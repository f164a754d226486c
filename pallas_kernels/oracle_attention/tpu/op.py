"""`oracle_attention` on TPU: one forward kernel that also selects blocks, one backward kernel."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.causal_attention_tpu import tiles as tpu_attention
from pallas_kernels.causal_attention_tpu.tiles import Placement

OP = "oracle_attention"


def oracle_attention(q, k, v, *, block_size, num_blocks, segment_ids, scale, query_offset=0,
                     kv_segment_ids=None, interpret=False):
  """See `api.py`. Differentiable in q, k and v.

  Under `jax.checkpoint` with a policy that saves the names `oracle_out`, `oracle_lse` and
  `oracle_block_indices`, the backward pass runs no forward kernel again.

  Args:
    q: [B,T,N,H] bfloat16 or float32, H up to 256.
    k: [B,S,K,H].
    v: [B,S,K,E], E up to 256.
    block_size: a multiple of 8 with lcm(8*block_size, 128) at most 2048: 8 to 64 in steps of 8,
      96, 112, 128 and more.
    num_blocks: P; 0 for plain attention.
    segment_ids: i32 [B,T] or None.
    scale: multiplies the logits.
    query_offset: int, or i32 [B]: the key index of query 0.
    kv_segment_ids: i32 [B,S] or None; given with `segment_ids`.
    interpret: `tpu.interpret_params()`, or False to compile.

  Raises:
    NotCoveredError: values that this implementation does not cover.
  """
  tpu_attention.check(OP, q, k, v)
  tpu_attention.key_unit(OP, block_size, num_blocks)
  placement, query_offset = Placement.of(segment_ids, kv_segment_ids, query_offset)
  return _attend(q, k, v, placement, query_offset, block_size, num_blocks, float(scale), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _attend(q, k, v, placement, *static):
  out, _, picked = _forward(q, k, v, placement, *static)
  return out, picked


def _forward(q, k, v, placement, query_offset, block_size, num_blocks, scale, interpret):
  """out [B,T,N,E], lse f32 [B,N,T], picked i32 [B,K,T,P]."""
  batch, num_queries, heads, _ = q.shape
  num_keys, kv_heads = k.shape[1:3]
  tiles = tpu_attention.forward_tiles(
    num_queries, num_keys, heads // kv_heads, tpu_attention.key_unit(OP, block_size, num_blocks),
    block_size=block_size, num_blocks=num_blocks)
  with jax.named_scope("oracle_attention"):
    out, lse, picked = tpu_attention.forward(
      q, k, v, placement, None, query_offset=query_offset, tiles=tiles, scale=scale,
      block_size=block_size, num_blocks=num_blocks, interpret=interpret)
  if not num_blocks:
    picked = jnp.zeros((batch, kv_heads, num_queries, 0), jnp.int32)
  return out, lse, picked


def _attend_fwd(q, k, v, placement, *static):
  out, lse, picked = _forward(q, k, v, placement, *static)
  out, lse = checkpoint_name(out, "oracle_out"), checkpoint_name(lse, "oracle_lse")
  picked = checkpoint_name(picked, "oracle_block_indices")
  return (out, picked), (q, k, v, placement, out, lse)


def _attend_bwd(query_offset, block_size, num_blocks, scale, interpret, residuals, grads):
  q, k, v, placement, out, lse = residuals
  tiles = tpu_attention.backward_tiles(
    q.shape[1], k.shape[1], q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3]), q.dtype)
  with jax.named_scope("oracle_attention_backward"):
    *dqkv, _ = tpu_attention.backward(
      q, k, v, placement, None, out, lse, grads[0], query_offset=query_offset, tiles=tiles,
      scale=scale, interpret=interpret)
  return (*dqkv, None)


_attend.defvjp(_attend_fwd, _attend_bwd)
