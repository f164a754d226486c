"""What the sparse GPU ops share: the sizes they take, and padding to the sizes of the kernels."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.checks import NotCoveredError

BLOCK = 64              # keys of a block, and the multiple that tokens are padded to
GROUPS = (4, 8, 16)     # query heads to a KV head that the kernels run with


def padded_group(group):
  """Query heads to a KV head after padding: 4, 8 or 16.

  Raises:
    NotCoveredError: more than 16.
  """
  for size in GROUPS:
    if group <= size:
      return size
  raise NotCoveredError(f"sparse attention on GPU: got G={group}, want at most {GROUPS[-1]}")


def check_sizes(op, q, *keys_values):
  """Raises NotCoveredError for head dims and dtypes that the kernels do not take.

  Args:
    op: the op's name.
    q: [B,T,N,H].
    *keys_values: pairs (k [B,S,K,H], v [B,S,K,E]).
  """
  h = q.shape[-1]
  wanted = [("H", h, (64, 128)), ("q dtype", jnp.dtype(q.dtype).name, ("bfloat16", "float16"))]
  for k, v in keys_values:
    wanted += [("v head dim", v.shape[-1], (h,)), ("k dtype", k.dtype, (q.dtype,)),
               ("v dtype", v.dtype, (q.dtype,))]
  for name, value, allowed in wanted:
    if value not in allowed:
      raise NotCoveredError(
        f"{op} on GPU: got {name} {value}, want {' or '.join(map(str, allowed))}")


def pad_tokens(x):
  """Pads axis 1 of x [B,T,...] with zeros to whole blocks; None stays None."""
  spare = 0 if x is None else -x.shape[1] % BLOCK
  if not spare:
    return x
  return jnp.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))


@dataclasses.dataclass(frozen=True)
class Padding:
  """Pads query-side arrays in T to whole blocks and in G to 4, 8 or 16, and cuts results back."""

  tokens: int
  kv_heads: int
  group: int

  @property
  def spare_heads(self):
    """Query heads to a KV head that padding adds."""
    return padded_group(self.group) - self.group

  def heads(self, x):
    """Pads x [B,T,N,H] in T and G with zeros; None stays None."""
    x = pad_tokens(x)
    if x is None or not self.spare_heads:
      return x
    b, t, _, h = x.shape
    x = x.reshape(b, t, self.kv_heads, self.group, h)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, self.spare_heads), (0, 0))).reshape(b, t, -1, h)

  def sinks(self, x):
    """Pads x [N] in G; None stays None."""
    if x is None or not self.spare_heads:
      return x
    x = x.reshape(self.kv_heads, self.group)
    return jnp.pad(x, ((0, 0), (0, self.spare_heads))).reshape(-1)

  def cut(self, x):
    """The inverse of `heads`."""
    if self.spare_heads:
      b, t, _, h = x.shape
      x = x.reshape(b, t, self.kv_heads, -1, h)[:, :, :, :self.group]
      x = x.reshape(b, t, self.kv_heads * self.group, h)
    return x[:, :self.tokens]
