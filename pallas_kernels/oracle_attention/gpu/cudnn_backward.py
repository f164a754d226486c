"""Dense causal attention's backward pass by cuDNN, fed with our own output and log-sum-exp.

JAX binds cuDNN's backward as a private primitive: its public function would run cuDNN's forward
again to get the same two residuals. This file is the only one that touches it.
"""

import jax.numpy as jnp

from pallas_kernels import compat


def backward(q, k, v, out, lse, grad_out, *, scale):
  """Gradients of causal attention for q, k and v.

  Args:
    q: [B, T, N, H], bf16 or f16.
    k: [B, T, K, H].
    v: [B, T, K, H].
    out: [B, T, N, H], the forward's output.
    lse: f32 [B, N, T], natural logarithm of the softmax denominators.
    grad_out: [B, T, N, H].
    scale: multiplies the logits.

  Returns:
    dq, dk, dv with the shapes and dtypes of q, k, v.

  Raises:
    NotImplementedError: this JAX's private primitive is not the one known here.
  """
  primitive, causal = compat.cudnn_attention_backward()
  unused = jnp.zeros(0, q.dtype)
  dq, dk, dv = primitive.bind(
    q, k, v,
    *[unused] * 7,  # bias, two lengths, two offsets, two page tables
    lse, out, grad_out,
    scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=causal,
    layout=0, sliding_window_length=None,
  )  # fmt: skip
  return dq, dk, dv
