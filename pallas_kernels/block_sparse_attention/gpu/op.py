"""Block-sparse attention on NVIDIA GPUs: the plan, the forwards, their sum, the backward.

    plan.py           once per hybrid block: which selections are hot, which are rare
    forward.py        hot, G <= 8: whole query tiles times blocks, masked (Mosaic GPU)
    forward_split.py  hot, G = 16: the subtiles of a tile that selected a block (Mosaic GPU)
    forward_rare.py   rare: the tokens of one block, packed; one softmax of hot and rare, with the
                      sinks (Triton)
    backward.py       all selections: the tokens of one block, packed (Triton)
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.gpu import forward as tile_kernel
from pallas_kernels.block_sparse_attention.gpu import forward_split as split_kernel
from pallas_kernels.block_sparse_attention.gpu import plan as selection_plan
from pallas_kernels.block_sparse_attention.gpu.visibility import visibility
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.gpu_padding import BLOCK, Padding, check_sizes, pad_tokens, padded_group

# Tokens of a tile that must share a block for the tile or split kernel to take it. On an H200 a
# tile x block product takes the whole chip 6.5 ns, and a packed token of 4 heads, with the sum of
# its part, 0.84 ns (LOG.md): break-even at 7.7 tokens.
HOT_THRESHOLD = {4: 8, 8: 4, 16: 2}
# At G = 16 a selection that no other token of the tile shares costs 4.2 ns in the split kernel and
# 3.8 to 5 packed (LOG.md), while a head's keys and values stay in the L2 cache: up to this many
# keys nothing is packed. Longer rows pack such selections, but not in tiles of at most 48 blocks.
SPLIT_ALL_KEYS, SPLIT_DENSE_TILE = 32768, 0.33
ALL_RARE = 1000         # hot threshold: more tokens than a tile has
MAX_SELECTED = 32       # blocks a token: 1024 in a tile of 32 tokens


def make_plan(block_indices, group, num_keys, query_offset, hot_threshold=None):
  """The SelectionPlan of selected blocks.

  Args:
    block_indices: i32 [B,K,T,P]; T is padded to blocks.
    group: G = N // K.
    num_keys: S.
    query_offset: int or i32 [B].
    hot_threshold: None for the measured default, 1 for the tile or split kernel alone, `ALL_RARE`
      for the key-major kernel alone.
  """
  group = padded_group(group)
  split = group == 16
  tokens = split_kernel.tile_tokens(group) if split else tile_kernel.tile_tokens(group)
  if hot_threshold is None:
    hot_threshold = 1 if split and num_keys <= SPLIT_ALL_KEYS else HOT_THRESHOLD[group]
  pad = -block_indices.shape[2] % BLOCK
  block_indices = jnp.pad(block_indices, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=-1)
  config = selection_plan.PlanConfig(
    tile_tokens=tokens, hot_threshold=min(hot_threshold, tokens + 1), longest_first=tokens == 32,
    list_multiple=1 if split else tile_kernel.BLOCKS_PER_STEP,
    **(dict(dense_tile=SPLIT_DENSE_TILE, scattered=True) if split else {}))
  with jax.named_scope("plan_blocks"):
    return selection_plan.build_plan(block_indices, num_keys, query_offset, config)


def plan_blocks(block_indices, group, num_keys, block_size, query_offset, hot_threshold=None):
  """`make_plan`, after `check_selection`: the op's plan as `api.py` asks for it."""
  check_selection("plan_blocks", block_indices, block_size)
  return make_plan(block_indices, group, num_keys, query_offset, hot_threshold)


def plan_triton(*args):
  """`plan_blocks` for the key-major kernels alone."""
  return plan_blocks(*args, hot_threshold=ALL_RARE)


def check_selection(op, block_indices, block_size):
  """Raises NotCoveredError for blocks and selections that the kernels do not take."""
  if block_size != BLOCK:
    raise NotCoveredError(f"{op} on GPU: got block_size {block_size}, want {BLOCK}")
  if not 1 <= block_indices.shape[-1] <= MAX_SELECTED:
    raise NotCoveredError(f"{op} on GPU: got {block_indices.shape[-1]} selected blocks a token, "
                          f"want 1 to {MAX_SELECTED}")


def check_plan(op, plan, q, k, visible):
  """Raises ValueError for a plan that was made for other sizes or another offset.

  q [B,T,N,H] and k [B,S,K,H] are padded.
  """
  if isinstance(plan, selection_plan.PlanConfig):
    return
  got = plan.valid.shape[0], plan.valid.shape[1], plan.valid.shape[2], plan.num_blocks
  want = q.shape[0], k.shape[2], q.shape[1], k.shape[1] // BLOCK
  if got != want:
    raise ValueError(f"{op}: plan is of [B,K,T,C]={list(got)}; wanted {list(want)}; make it with "
                     "plan_blocks(num_keys=S) from the same block_indices")
  if plan.offset is not None and plan.offset != visible.offset:
    raise ValueError(f"{op}: plan is of query_offset={plan.offset}; wanted {visible.offset}; give "
                     "plan_blocks the same query_offset")


def hot_forward(q, k, v, plan, visible, **options):
  """(out, lse) of a plan's hot selections; `options` as of `tile_kernel.tile_forward`."""
  group = q.shape[2] // k.shape[2]
  with jax.named_scope("hot_forward"):
    if group == 16 and plan.config.tile_tokens == split_kernel.tile_tokens(group):
      return split_kernel.split_forward(q, k, v, plan, visible, **options)
    return tile_kernel.tile_forward(q, k, v, plan, visible, **options)


def rare_forward(q, k, v, plan, visible, **options):
  """`forward_rare.forward`, imported when a GPU runs it."""
  from pallas_kernels.block_sparse_attention.gpu import forward_rare

  with jax.named_scope("rare_forward"):
    return forward_rare.forward(q, k, v, plan, visible, **options)


def whole_plan(q, k, visible, plan):
  """The SelectionPlan; a PlanConfig stands for the window's, so that no pass has to keep that."""
  if isinstance(plan, selection_plan.PlanConfig):
    return selection_plan.window_plan(q.shape[0], k.shape[2], q.shape[1], visible, plan)
  return plan


def forward(q, k, v, sinks, visible, plan, scale):
  """All selections of a plan, padded sizes: out [B,T,N,H] and its natural lse f32 [B,T,N]."""
  plan, hot = whole_plan(q, k, visible, plan), None
  if plan.config.has_hot:
    hot = hot_forward(q, k, v, plan, visible, scale=scale, sinks=sinks)
    if not plan.config.has_rare:
      return hot
  return rare_forward(q, k, v, plan, visible, scale=scale, hot=hot,
                      sinks=sinks if hot is None else None)


def backward(q, k, v, sinks, visible, plan, out, lse, dout, scale):
  """Gradients of q, k, v and sinks (None without); dout [B,T,N,H] float32."""
  from pallas_kernels.block_sparse_attention.gpu import backward as kernels

  with jax.named_scope("backward"):
    delta = (out.astype(jnp.float32) * dout).sum(-1)
    dq, dk, dv = kernels.backward(
      q, k, v, dout.astype(q.dtype), lse, delta, whole_plan(q, k, visible, plan), visible,
      scale=scale)
    # dout/dsink = -p_sink out, with p_sink = exp(sink - lse)
    dsinks = None if sinks is None else -(jnp.exp(sinks - lse) * delta).sum((0, 1))
  return dq, dk, dv, dsinks


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, sinks, visible, plan, scale):
  return forward(q, k, v, sinks, visible, plan, scale)[0]


def _attention_fwd(q, k, v, sinks, visible, plan, scale):
  out, lse = forward(q, k, v, sinks, visible, plan, scale)
  return out, (q, k, v, sinks, visible, plan, out, lse)


def _attention_bwd(scale, saved, dout):
  return *backward(*saved, dout.astype(jnp.float32), scale), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def attend(op, q, k, v, make, *, sinks, visible, scale):
  """Pads T and S to blocks and G to 4, 8 or 16, runs the kernels, and cuts the result back.

  Args:
    op: the op's name.
    q: [B,T,N,H].
    k: [B,S,K,H].
    v: [B,S,K,H].
    make: padded G -> SelectionPlan, or PlanConfig for the window's.
    sinks: f32 [N] or None.
    visible: Visibility.
    scale: of the logits.

  Raises:
    NotCoveredError: sizes or dtypes the kernels do not take.
    ValueError: a plan of other sizes.
  """
  check_sizes(op, q, (k, v))
  pad = Padding(q.shape[1], k.shape[2], q.shape[2] // k.shape[2])
  q, k, v = pad.heads(q), pad_tokens(k), pad_tokens(v)
  plan = make(q.shape[2] // k.shape[2])
  check_plan(op, plan, q, k, visible)
  with jax.named_scope(op):
    return pad.cut(_attention(q, k, v, pad.sinks(sinks), visible, plan, float(scale)))


def block_sparse_attention(q, k, v, block_indices, *, block_size, sinks, query_offset,
                           segment_ids, kv_segment_ids, scale, plan, hot_threshold=None):
  """The op of `api.py` on an NVIDIA GPU of compute capability 9.0.

  `plan` is `make_plan`'s, so that the layers that share a selection share its cost; None makes it
  here, with `hot_threshold` as in `make_plan`.

  Raises:
    NotCoveredError: block_size other than 64, more than 32 selected blocks, H other than 64 or 128,
      a v head dim other than H, dtypes other than bfloat16 and float16, G over 16.
    ValueError: a plan of other sizes or another offset.
  """
  op = "block_sparse_attention"
  check_selection(op, block_indices, block_size)
  num_keys = k.shape[1]
  visible = visibility(q.shape[1], num_keys, query_offset, segment_ids, kv_segment_ids)
  return attend(
    op, q, k, v,
    lambda group: plan or make_plan(block_indices, group, num_keys, query_offset, hot_threshold),
    sinks=sinks, visible=visible, scale=scale)


def block_sparse_attention_triton(*args, **options):
  """`block_sparse_attention` by the Triton kernels alone: any NVIDIA GPU that Triton supports."""
  return block_sparse_attention(*args, **options, hot_threshold=ALL_RARE)
