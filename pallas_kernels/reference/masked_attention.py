"""The masked softmax that every reference shares, and the query chunks that bound its memory.

Plain `jax.numpy` in float32. `masked_attention` is the equation; `causal_chunks` and
`query_chunks` apply it to slices of the queries, so that the [T, S] scores never exist whole for
long sequences. The scores of a chunk are kept for the backward pass while they are few
(`KEPT_SCORES`) and recomputed chunk by chunk beyond.
"""

import math

import jax
import jax.numpy as jnp

KEPT_SCORES = 2**24      # B*N*T*S up to which nothing is recomputed: 64 MiB of float32
CHUNK_SCORES = 2**22     # B*N*T*S of one recomputed chunk: 16 MiB of float32
MIN_PART = 64            # queries; fewer per part cost more in small matmuls than they save
MAX_PARTS = 4            # parts of a causal triangle: 4 compute 5/8 of the square


def masked_attention(q, k, v, visible, *, sinks=None, block_size=None):
  """Softmax attention of each query over its visible keys (HySparse paper).

      s[t,j] = q_t k_j;   p[t,j] = exp(s[t,j]) / (exp(sink) + sum_j' exp(s[t,j']))
      out[t] = sum_j p[t,j] v_j,   sums over visible j only

  A row that sees no key gives 0. Without sinks the exp(sink) term is absent.

  Args:
    q: f32 [B,T,N,H], already scaled.
    k: f32 [B,S,K,H].
    v: f32 [B,S,K,E].
    visible: bool, broadcastable to [B,K,T,S]. Hidden keys must still be finite.
    sinks: f32 [N] logits, or None.
    block_size: None, or a divisor of S: then the log weights of key blocks are returned too.

  Returns:
    out f32 [B,T,N,E], and f32 [B,K,T,S/block_size] (None without `block_size`): the largest
    log(p[t,j]) of the block over its visible keys and the G heads of the group, -inf for a
    block with none. It is (max_j s[t,j]) - logsumexp, so blocks whose weight underflows keep
    their order. It carries no gradient.
  """
  batch, num_queries, num_heads, _ = q.shape
  num_keys, kv_heads = k.shape[1:3]
  q = q.reshape(batch, num_queries, kv_heads, num_heads // kv_heads, -1)
  scores = jnp.einsum("btkgh,bskh->bktgs", q, k, precision="highest")
  # Adding 0 or -inf rather than selecting: the backward pass then needs no mask.
  scores += jnp.where(visible, 0.0, -jnp.inf)[:, :, :, None]

  fixed_scores = jax.lax.stop_gradient(scores)
  block_max = None
  if block_size is None:
    row_max = fixed_scores.max(axis=-1)
  else:
    block_max = fixed_scores.reshape(
      *scores.shape[:-1], num_keys // block_size, block_size).max(axis=-1)
    row_max = block_max.max(axis=-1)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(kv_heads, 1, num_heads // kv_heads)
    row_max = jnp.maximum(row_max, jax.lax.stop_gradient(sinks))
  # A row that sees nothing has maximum -inf and total 0; any other total is at least exp(0) = 1.
  # Made finite by maximum() because XLA:CPU fuses that with both matmuls, and select() not.
  row_max = jnp.maximum(row_max, jnp.finfo(jnp.float32).min)

  weights = jnp.exp(scores - row_max[..., None])
  total = weights.sum(axis=-1)
  if sinks is not None:
    total += jnp.exp(sinks - row_max)
  total = jnp.maximum(total, 0.5)
  out = jnp.einsum("bktgs,bske->bktge", weights, v, precision="highest") / total[..., None]
  out = out.transpose(0, 2, 1, 3, 4).reshape(batch, num_queries, num_heads, -1)
  if block_max is None:
    return out, None
  log_total = jax.lax.stop_gradient(row_max + jnp.log(total))
  return out, (block_max - log_total[..., None]).max(axis=3)


def causal_mask(queries, keys, window=None):
  """bool [B,1,T,S]: which keys each query sees.

  Those at its position or before, of its own segment, and within the window if there is one.

  Args:
    queries: {"position": i32 [B,T], "segment": i32 [B,T] or None, ...}; segment 0 is padding.
    keys: {"position": i32 [B,S], "segment": i32 [B,S] or None, ...}.
    window: tokens a query sees, its own included; None: all.
  """
  query_position = queries["position"][:, None, :, None]
  key_position = keys["position"][:, None, None, :]
  visible = key_position <= query_position
  if window is not None:
    visible &= key_position > query_position - window
  return visible & same_segment(queries["segment"], keys["segment"])


def same_segment(query_segments, key_segments):
  """bool [B,1,T,S]: same document, and not padding (segment 0). True where there are none.

  Args:
    query_segments: i32 [B,T] or None.
    key_segments: i32 [B,S] or None.
  """
  if query_segments is None:
    return True
  query_segments = query_segments[:, None, :, None]
  return (query_segments == key_segments[:, None, None, :]) & (query_segments != 0)


def causal_arrays(q, k, v, *, query_offset, segment_ids, kv_segment_ids, scale):
  """The `queries` and `keys` trees of `causal_mask` and `causal_chunks`, in float32.

  Args:
    q: [B,T,N,H]; k: [B,S,K,H]; v: [B,S,K,E], of any float dtype.
    query_offset: int or i32 [B], the key index of query 0.
    segment_ids: i32 [B,T] or None; kv_segment_ids: i32 [B,S] or None.
    scale: of the logits; q is multiplied by it.

  Returns:
    {"q", "position", "segment"} and {"k", "v", "position", "segment"}. The casts are made here,
    outside any chunk, so that the gradients of the chunks add up in float32.
  """
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  queries = {"q": q * scale, "position": _positions(query_offset, *q.shape[:2]),
             "segment": segment_ids}
  keys = {"k": k, "v": v, "position": _positions(0, *k.shape[:2]), "segment": kv_segment_ids}
  return queries, keys


def _positions(offset, batch, count):
  offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
  return offset[:, None] + jnp.arange(count, dtype=jnp.int32)


def causal_chunks(attend, queries, keys, *, num_heads, offset=0, key_multiple=1):
  """Runs `attend(queries, keys)` on slices of the queries with only the keys they can reach.

  Args:
    attend: takes slices of the two trees, returns a tree of [B,t,...] arrays.
    queries: tree of [B,T,...] arrays.
    keys: tree of [B,S,...] arrays; query `t` may only use keys `0..offset + t`.
    num_heads: N, to count scores.
    offset: int, or an i32 array [B]: then every slice gets all keys.
    key_multiple: the key slices end at a multiple of this (or at S).

  Returns:
    The outputs of `attend`, joined along axis 1 to [B,T,...].
  """
  batch, num_queries = jax.tree.leaves(queries)[0].shape[:2]
  num_keys = jax.tree.leaves(keys)[0].shape[1]
  if not isinstance(offset, int):
    return query_chunks(attend, queries, keys, num_heads=num_heads)
  num_parts = min(MAX_PARTS, math.ceil(num_queries / MIN_PART))
  part = math.ceil(math.ceil(num_queries / num_parts) / key_multiple) * key_multiple
  recompute = batch * num_heads * num_queries * num_keys > KEPT_SCORES
  outs = []
  for start in range(0, num_queries, part):
    stop = min(start + part, num_queries)
    reach = min(math.ceil((offset + stop) / key_multiple) * key_multiple, num_keys)
    part_queries = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], queries)
    part_keys = jax.tree.map(lambda x, b=reach: x[:, :b], keys)
    outs.append(query_chunks(attend, part_queries, part_keys, num_heads=num_heads,
                             recompute=recompute))
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outs)


def query_chunks(attend, queries, keys, *, num_heads, recompute=None, row_scores=None):
  """Runs `attend(queries, keys)` on slices of the queries, all keys each; see `causal_chunks`.

  Args:
    recompute: whether to go chunk by chunk and keep no scores for the backward pass; None
      decides by `KEPT_SCORES`.
    row_scores: floats that one query of all rows needs; None: a score for each head and key.
  """
  batch, num_queries = jax.tree.leaves(queries)[0].shape[:2]
  num_keys = jax.tree.leaves(keys)[0].shape[1]
  row_scores = row_scores or batch * num_heads * num_keys
  if recompute is None:
    recompute = row_scores * num_queries > KEPT_SCORES
  if not recompute:
    return attend(queries, keys)
  chunk = min(max(CHUNK_SCORES // row_scores, 1), num_queries)
  num_chunks = math.ceil(num_queries / chunk)
  chunk = math.ceil(num_queries / num_chunks)
  padding = num_chunks * chunk - num_queries

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], num_chunks * chunk, *x.shape[3:])[:, :num_queries]

  one = jax.checkpoint(lambda chunk_queries: attend(chunk_queries, keys))
  return jax.tree.map(join, jax.lax.map(one, jax.tree.map(split, queries)))
