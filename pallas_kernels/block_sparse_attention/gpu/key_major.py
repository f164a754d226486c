"""What the key-major Triton kernels share; through jax-triton, for their pointer gathers.

A program owns one key block and gathers the tokens that selected it, packed: no row is multiplied
for nothing, whatever the selection looks like. Each selection gives a partial output (or query
gradient) of its own, summed per token by a second kernel in the order of its slots; key and value
gradients of a block's programs are summed in the order of the programs. No atomics: results repeat
bit for bit.

Imported only when a GPU runs it: jax-triton 0.3.1 raises on import without one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import softmax
from pallas_kernels.gpu_padding import BLOCK

LOG2E = tl.constexpr(softmax.LOG2E)
LN2 = tl.constexpr(softmax.LN2)
MASKED = tl.constexpr(softmax.MASKED)
EMPTY_LSE = tl.constexpr(softmax.EMPTY_LSE)
M_FLOOR = tl.constexpr(-1e20)       # of a running maximum

# Which blocks a launch takes. With segments there are two launches: one for the blocks that lie
# within one segment, which compares it once a row, and one for the few others, which compares every
# score. (Both in one kernel take the shared memory of both.)
ALL_BLOCKS, WHOLE_BLOCKS, MIXED_BLOCKS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class KeyMajorConfig:
  """Tile sizes of the key-major kernels; the defaults are for H200 (LOG.md)."""

  forward_rows: int = 128          # query rows (tokens x G heads) of a step
  forward_warps: int = 4
  forward_stages: int = 2
  backward_rows: int = 128
  backward_warps: int = 8
  backward_stages: int = 2
  combine_rows: int = 16
  combine_warps: int = 2
  combine_steps: int = 8            # times combine_rows that a program of the sum takes
  partial_bytes: int = 6 << 30      # of one pass: more KV heads than fit take further passes

  def __post_init__(self):
    for name in ("forward_rows", "backward_rows"):
      if getattr(self, name) not in (16, 32, 64, 128, 256):
        raise ValueError(f"{name}: got {getattr(self, name)}, want a power of two in 16..256")


@triton.jit
def visible(token, key, batch, theirs, segment_ptr, offset_ptr, T: tl.constexpr,
            OFFSET: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
            LAUNCH: tl.constexpr):
  """bool [rows, 64]: whether each token may see each key, in a launch for ALL_BLOCKS and so on.

  token i32 [rows]; key i32 [64]; theirs i32 [64], the keys' segments. OFFSET: the key index of
  query 0, -1: at offset_ptr [B]. KEYS: of positions past the last key, their number, else 0.
  WINDOW: tokens, 0 for all.
  """
  if OFFSET < 0:
    position = token + tl.load(offset_ptr + batch)
  else:
    position = token + OFFSET
  bound = position
  if KEYS > 0:
    bound = tl.minimum(bound, KEYS - 1)
  if LAUNCH != 0:
    mine = tl.load(segment_ptr + batch * T + token)
    bound = tl.where(mine == 0, -1, bound)
    if LAUNCH == 1:
      bound = tl.where(mine == tl.max(theirs, 0), bound, -1)
  see = key[None, :] <= bound[:, None]
  if WINDOW > 0:
    see = see & (position[:, None] < key[None, :] + WINDOW)
  if LAUNCH == 2:
    see = see & (mine[:, None] == theirs[None, :])
  return see


def call(kernel, *args, **kwargs):
  """Runs a kernel: arrays and integers, then `jax_triton.triton_call`'s options and constants."""
  import jax_triton

  return jax_triton.triton_call(*args, kernel=kernel, name=kernel.fn.__name__, **kwargs)


def sizes_of(q, k, plan):
  """The constants that all kernels take."""
  n, kv_heads = q.shape[2], k.shape[2]
  return dict(T=q.shape[1], S=k.shape[1], K=kv_heads, G=n // kv_heads, H=q.shape[3],
              P=plan.selected, C=k.shape[1] // BLOCK)


def visible_inputs(visible):
  """(segment ids of queries, of keys, offsets) and the constants of a Visibility for a kernel."""
  none = jnp.zeros((1,), jnp.int32)
  has_segments = visible.segment_ids is not None
  arrays = (visible.segment_ids if has_segments else none,
            visible.kv_segment_ids if has_segments else none,
            none if visible.offsets is None else visible.offsets)
  return arrays, dict(OFFSET=-1 if visible.offset is None else visible.offset,
                      KEYS=visible.num_keys if visible.beyond else 0,
                      WINDOW=visible.window or 0)


def launches(visible):
  """The launches that take all blocks."""
  return (ALL_BLOCKS,) if visible.segment_ids is None else (WHOLE_BLOCKS, MIXED_BLOCKS)


def rows_per_pass(q, rows, sizes, config):
  """(batch, KV head) rows of a pass: as many as keep the partials within `partial_bytes`."""
  row_bytes = sizes["T"] * sizes["P"] * sizes["G"] * sizes["H"] * q.dtype.itemsize
  each = max(1, min(rows, config.partial_bytes // row_bytes))
  while rows % each:
    each -= 1
  return each


def after(arrays, done):
  """`arrays`, not available before `done` is: keeps one pass's partials alive at a time."""
  return jax.lax.optimization_barrier((arrays, done))[0]
