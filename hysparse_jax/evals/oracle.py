"""Measures the oracle: overlap of neighbouring selections, and the attention mass they cover.

HySparse rests on two claims that a trained model can test. Selections are *stable*: the
blocks that consecutive tokens select overlap, so that a kernel can load them once for many tokens.
And they *transfer*: the blocks that matter to a full layer hold most of the attention mass of the
sparse layers behind it. Both are measured here, layer by layer, on the model as it runs.

The model's own layers are called one at a time; beside each, the attention weights over the shared
keys are recomputed densely in float32, in query chunks, without sinks:

    coverage[t, n] = sum of softmax(q_t k_j / sqrt(H)) over the keys j <= t of t's selected blocks

with q the layer's own and k the full layer's, so that 1 means that the selection misses nothing.
Of a sparse layer this is hypothetical: it attends to selected keys alone, so nothing in training
keeps its queries away from the others, and a low share does not say that it misses something.

Axis letters: B batch, T query, S key, N query heads, K KV heads, H head dim, P selected blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.model.decoder_layer import TokenContext
from hysparse_jax.model.hybrid import FullLayer, SparseLayer
from hysparse_jax.model.layers import positions_within, rms_norm, unstacked
from hysparse_jax.model.transformer import Transformer
from pallas_kernels.reference.block_selection import picked_keys
from pallas_kernels.reference.masked_attention import query_chunks, same_segment

UNION_TOKENS = (4, 8, 16, 32)   # consecutive tokens whose distinct blocks are counted


class LayerTrace(NamedTuple):
  """One layer of one forward pass."""

  layer: int
  distance: int | None             # layers since the full layer, 0 its own; None: before the first
  picked: np.ndarray | None        # i32 [B, K, T, P], the blocks in use; None: none are
  coverage: np.ndarray | None      # f32 [B, T, N]; NaN where a token is padding
  gate_sparse: float | None        # mean over tokens, heads and channels
  gate_local: float | None


def trace(model: Transformer, tokens, segment_ids=None):
  """Runs the model layer by layer and keeps what the oracle figures need.

  Args:
    model: a Transformer with sparse layers.
    tokens: i32 [B, T].
    segment_ids: i32 [B, T] or None, as in `Transformer.__call__`.

  Returns:
    The normed last hidden state [B, T, D], equal to `model.hidden`'s, and a list of `LayerTrace`,
    one per layer. A full layer that no sparse layer follows selects nothing, and window layers read
    no selection.

  Raises:
    UserError: a model without an oracle.
  """
  cfg = model.cfg
  if "sparse" not in cfg.layer_kinds:
    raise UserError(f"the oracle task needs a model with sparse layers, this one has "
                    f"attention={cfg.attention!r} and {'/'.join(dict.fromkeys(cfg.layer_kinds))} "
                    "layers; leave oracle out of --tasks")
  tokens = jnp.asarray(tokens)
  valid = None if segment_ids is None else jnp.asarray(segment_ids) != 0
  context = TokenContext(positions_within(segment_ids, tokens.shape), segment_ids, valid)
  x, layers = model.embed(tokens), []

  def keep(distance, shared, coverage, stats):
    selection = (None, None) if coverage is None else (
      np.asarray(shared.block_indices), np.asarray(coverage))
    gates = (None if gate is None else float(gate) for gate in stats[:2])
    layers.append(LayerTrace(len(layers), distance, *selection, *gates))

  for blocks, group in zip(model.stack.groups, cfg.layer_groups):
    num_blocks = cfg.num_blocks if group.has_sparse else 0
    for index in range(group.count):
      block = unstacked(blocks, index)
      shared = distance = None
      if group.has_full:
        x, shared, covered, stats = _full(block.full, x, context, num_blocks)
        distance = 0
        keep(distance, shared, covered, stats)
      for run, stack in zip(group.runs, block.runs):
        for layer in range(run.count):
          x, covered, stats = _sparse(unstacked(stack, layer), x, shared, context)
          distance = None if distance is None else distance + 1
          keep(distance, shared, covered, stats)
  return rms_norm(x, model.final_norm[...], cfg.norm_eps), layers


@jax.jit(static_argnames="num_blocks")
def _full(layer: FullLayer, x, context: TokenContext, num_blocks: int):
  _, q, _, _ = layer.project(x, context)
  x, shared, _, stats = layer(x, context, num_blocks)
  return x, shared, _covered(layer, q, shared, context) if num_blocks else None, stats


@jax.jit
def _sparse(layer: SparseLayer, x, shared, context: TokenContext):
  _, q, _, _ = layer.project(x, context)
  x, _, stats = layer(x, shared, context)
  return x, None if layer.sparse is None else _covered(layer, q, shared, context), stats


def _covered(layer, q, shared, context):
  return coverage(q, shared.k, shared.block_indices, layer.cfg.block_size, context.segment_ids)


def coverage(q, k, block_indices, block_size: int, segment_ids=None):
  """The share of each query's dense causal attention mass that its selected blocks hold.

  Args:
    q: [B, T, N, H].
    k: [B, T, K, H].
    block_indices: i32 [B, K, T, P], -1 for none.
    segment_ids: i32 [B, T] or None.

  Returns:
    f32 [B, T, N] in [0, 1], exactly 1 where every visible block is selected; NaN for padding.
  """
  batch, num_tokens, num_heads, head_dim = q.shape
  kv_heads = k.shape[2]
  q = q.astype(jnp.float32).reshape(batch, num_tokens, kv_heads, -1, head_dim) * head_dim**-0.5
  positions = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))
  queries = {"q": q, "position": positions, "segment": segment_ids,
             "blocks": block_indices.transpose(0, 2, 1, 3)}

  def covered(queries, k):
    visible = jnp.arange(num_tokens) <= queries["position"][:, None, :, None]      # [B, 1, T, S]
    visible &= same_segment(queries["segment"], segment_ids)
    picked = picked_keys(queries["blocks"].transpose(0, 2, 1, 3), num_tokens, block_size)
    scores = jnp.einsum("btkgh,bskh->btkgs", queries["q"], k, precision="highest")
    shape = lambda mask: jnp.moveaxis(mask, 1, 2)[:, :, :, None]                   # [B, T, ., 1, S]
    scores = jnp.where(shape(visible), scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    held = jnp.where(shape(picked), weights, 0.0)
    return held.sum(axis=-1) / weights.sum(axis=-1)

  share = query_chunks(covered, queries, k.astype(jnp.float32), num_heads=num_heads,
                       recompute=True)
  return share.reshape(batch, num_tokens, num_heads)


class SelectionOverlap(NamedTuple):
  """How alike consecutive tokens choose: means over measured tokens, KV heads and rows."""

  picked: float                    # U(1), blocks a token selects; the union if all agree
  new_per_token: float             # U(2) - U(1), blocks that the previous token did not select
  union: dict[int, float]          # w -> U(w), distinct blocks that w consecutive tokens select


class OracleLayer(NamedTuple):
  """The figures of one layer."""

  layer: int
  distance: int | None                 # as in `LayerTrace`
  coverage: float | None               # mean over measured tokens and heads; None: no selection
  overlap: SelectionOverlap | None     # of full layers; None where too few tokens choose
  gate_sparse: float | None            # means over tokens, heads and channels
  gate_local: float | None


class OracleResult(NamedTuple):
  """The figures of all layers, and what they were measured on."""

  layers: list[OracleLayer]
  coverage_by_distance: dict[int, float]   # mean over the layers at that distance
  chance: float                            # coverage of P causal blocks drawn at random, all equal
  choosing_tokens: int                     # tokens measured that had a choice, see `oracle`
  picked: dict[int, np.ndarray]            # full layer -> i32 [T, P] of the first row and KV head


def oracle(model: Transformer, batches: Sequence) -> OracleResult:
  """Overlap, coverage and gates of every layer over held-out rows.

  Measured are the tokens of each row's second half that see more than P blocks; the others have
  nothing to choose. Where no token chooses, coverage is over the whole second half (1 in the full
  layers) and overlap is None.

  Args:
    model: a Transformer with sparse layers.
    batches: of `data.heldout_batches`.

  Raises:
    UserError: a model without an oracle, no batches, or batches of padding alone.
  """
  cfg = model.cfg
  traces = [trace(model, batch.tokens, batch.segment_ids)[1] for batch in batches]
  halves = [_second_half(batch) for batch in batches]
  if not any(half.any() for half in halves):
    raise UserError("the oracle task got no text to measure; give more --batches or shorter rows")
  seen = [_causal_blocks(batch, cfg.block_size) for batch in batches]
  choosing = [half & (blocks > cfg.num_blocks) for half, blocks in zip(halves, seen)]
  num_choosing = sum(int(tokens.sum()) for tokens in choosing)
  measured = choosing if num_choosing else halves

  layers = []
  for index, first in enumerate(traces[0]):
    passes = [layers_of_batch[index] for layers_of_batch in traces]
    share = overlap = None
    if first.coverage is not None:
      share = _mean(np.concatenate([one.coverage[where] for one, where in zip(passes, measured)]))
      if first.distance == 0:
        overlap = _overlap([union_sums(one.picked, where, batch.segment_ids)
                            for one, where, batch in zip(passes, choosing, batches)])
    gates = (None if gate is None else _mean([getattr(one, name) for one in passes])
             for name, gate in (("gate_sparse", first.gate_sparse),
                                ("gate_local", first.gate_local)))
    layers.append(OracleLayer(index, first.distance, share, overlap, *gates))

  by_distance = {}
  for layer in layers:
    if layer.coverage is not None:
      by_distance.setdefault(layer.distance, []).append(layer.coverage)
  picked = {one.layer: one.picked[0, 0] for one in traces[0]
            if one.distance == 0 and one.picked is not None}
  by_distance = {distance: _mean(shares) for distance, shares in by_distance.items()}
  chance = _mean(np.concatenate([np.minimum(1.0, cfg.num_blocks / blocks[where])
                                 for blocks, where in zip(seen, measured)]))
  return OracleResult(layers, by_distance, chance, num_choosing, picked)


def union_sums(picked, measured, segment_ids) -> dict[int, tuple[int, int]]:
  """Distinct blocks in every run of consecutive measured tokens of one document.

  Args:
    picked: i32 [B, K, T, P], -1 for none.
    measured: bool [B, T].
    segment_ids: i32 [B, T].

  Returns:
    For w = 1, 2 and `UNION_TOKENS`: the number of distinct blocks that w tokens select,
    summed over all such runs (they overlap), KV heads and rows, and the number of summands.
  """
  measured, segment_ids = np.asarray(measured), np.asarray(segment_ids)
  num_blocks = int(picked.max(initial=-1)) + 1
  sums = dict.fromkeys((1, 2, *UNION_TOKENS), (0, 0))
  for b, k in np.ndindex(picked.shape[:2]):
    member = np.zeros((picked.shape[2], num_blocks + 1), bool)
    np.put_along_axis(member, picked[b, k].astype(np.int64), True, axis=1)
    member[:, -1] = False                                          # where the -1s went
    times = np.concatenate([np.zeros_like(member[:1], np.int32), member.cumsum(0, np.int32)])
    inside = np.concatenate([[0], measured[b].cumsum()])
    for width, (total, number) in sums.items():
      if width > len(member):
        continue
      runs = inside[width:] - inside[:-width] == width
      runs &= segment_ids[b, width - 1:] == segment_ids[b, :len(member) - width + 1]
      distinct = (times[width:] > times[:-width]).sum(axis=1)
      sums[width] = total + int(distinct[runs].sum()), number + int(runs.sum())
  return sums


def _overlap(parts) -> SelectionOverlap | None:
  total = {width: np.sum([part[width] for part in parts], axis=0) for width in parts[0]}
  if total[1][1] == 0 or total[2][1] == 0:
    return None
  union = {width: float(blocks / runs) for width, (blocks, runs) in total.items() if runs}
  return SelectionOverlap(union[1], union[2] - union[1],
                          {width: union[width] for width in UNION_TOKENS if width in union})


def _second_half(batch):
  """bool [B, T]: no padding, and in the second half of the row."""
  index = np.arange(batch.tokens.shape[1])
  return (np.asarray(batch.segment_ids) > 0) & (index >= batch.tokens.shape[1] // 2)


def _causal_blocks(batch, block_size: int):
  """i64 [B, T]: blocks in which a token's document has a key that it sees."""
  index = np.arange(batch.tokens.shape[1])
  start = index - np.asarray(batch.positions)
  return index // block_size - start // block_size + 1


def _mean(values) -> float:
  return float(np.mean(values, dtype=np.float64))
