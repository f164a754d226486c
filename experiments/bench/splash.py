"""The peer of the TPU kernels: splash attention of JAX, causal over every key."""

from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.named_shapes import AttentionShape


def causal_attention(shape: AttentionShape):
  """The op (q [1,T,N,H], k [1,T,K,H], v [1,T,K,H]) -> [1,T,N,H]; logits are not scaled."""
  mask = masks.MultiHeadMask([masks.CausalMask((shape.tokens,) * 2)] * shape.num_heads)
  sizes = splash.BlockSizes(
    block_q=512, block_kv=1024, block_kv_compute=1024, block_q_dkv=512, block_kv_dkv=1024,
    block_kv_dkv_compute=1024, block_q_dq=512, block_kv_dq=1024)
  kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
  by_head = lambda x: x[0].swapaxes(0, 1)
  return lambda q, k, v: kernel(by_head(q), by_head(k), by_head(v)).swapaxes(0, 1)[None]
