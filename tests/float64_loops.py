"""The ops as float64 loops over batch, head, query and key, written from the HySparse paper.

Independent of `pallas_kernels`: every weight is formed, one row at a time. Gradients are the
chain rule of the same equations; `test_float64_loops_gradients` holds them to finite differences.
"""

import numpy as np


def visible_keys(num_queries, segments=None, window=None, blocks=None, block_size=64,
                 positions=None, num_keys=None, kv_segments=None):
  """visible(b, k, t) -> list of key positions that query row t of KV head k may see.

  positions: [B,T], the key index of each query; None: query t stands at key t.
  segments, kv_segments: [B,T] of the queries and [B,S] of the keys; None: the queries'.
  """
  num_keys = num_queries if num_keys is None else num_keys
  kv_segments = segments if kv_segments is None else kv_segments

  def visible(b, k, t):
    position = t if positions is None else int(positions[b, t])
    keys = []
    for j in range(num_keys):
      if j > position:
        continue
      if window is not None and j <= position - window:
        continue
      if segments is not None and (segments[b, t] == 0 or segments[b, t] != kv_segments[b, j]):
        continue
      if blocks is not None and j // block_size not in set(blocks[b, k, t].tolist()):
        continue
      keys.append(j)
    return keys

  return visible


def _row(q, k, scale, keys, sink):
  """The softmax weights of one row over `keys`, and the sink's own share."""
  logits = np.array([scale * float(np.dot(q, k[j])) for j in keys], np.float64)
  peak = max([*logits.tolist(), sink])
  if peak == -np.inf:
    return np.zeros(0), 0.0, logits, -np.inf
  terms = np.exp(logits - peak)
  total = terms.sum() + np.exp(sink - peak)
  return terms / total, np.exp(sink - peak) / total, logits, peak + np.log(total)


def attention(q, k, v, visible, sinks=None, scale=None):
  """out [B,T,N,E] and log weights {(b, n, t): {key: log p}}; inputs [B,T,N,H], [B,S,K,H]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  batch, num_queries, num_heads, head_dim = q.shape
  group = num_heads // k.shape[2]
  scale = head_dim ** -0.5 if scale is None else scale
  out = np.zeros((batch, num_queries, num_heads, v.shape[-1]))
  log_weights = {}
  for b in range(batch):
    for n in range(num_heads):
      sink = -np.inf if sinks is None else float(sinks[n])
      for t in range(num_queries):
        keys = visible(b, n // group, t)
        weights, _, logits, lse = _row(q[b, t, n], k[b, :, n // group], scale, keys, sink)
        for weight, j in zip(weights, keys):
          out[b, t, n] += weight * v[b, j, n // group]
        log_weights[b, n, t] = {j: logit - lse for j, logit in zip(keys, logits)}
  return out, log_weights


def gradients(q, k, v, visible, cotangent, sinks=None, scale=None):
  """d sum(out * cotangent) by q, k, v and sinks (zeros without sinks), all float64."""
  q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
  batch, num_queries, num_heads, head_dim = q.shape
  group = num_heads // k.shape[2]
  scale = head_dim ** -0.5 if scale is None else scale
  dq, dk, dv, dsinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(num_heads)
  for b in range(batch):
    for n in range(num_heads):
      sink = -np.inf if sinks is None else float(sinks[n])
      for t in range(num_queries):
        keys, h = visible(b, n // group, t), n // group
        weights, sink_share, _, _ = _row(q[b, t, n], k[b, :, h], scale, keys, sink)
        slopes = np.array([cotangent[b, t, n] @ v[b, j, h] for j in keys])
        mean = float((weights * slopes).sum())
        dsinks[n] -= sink_share * mean
        for weight, slope, j in zip(weights, slopes, keys):
          dv[b, j, h] += weight * cotangent[b, t, n]
          dlogit = weight * (slope - mean)
          dq[b, t, n] += dlogit * scale * k[b, j, h]
          dk[b, j, h] += dlogit * scale * q[b, t, n]
  return dq, dk, dv, dsinks


def block_scores(log_weights, shape, group, block_size):
  """{(b, kv head, t): {block: log S}}: the largest log weight over keys and the group's heads."""
  batch, num_queries, num_heads = shape
  scores = {}
  for b in range(batch):
    for n in range(num_heads):
      for t in range(num_queries):
        row = scores.setdefault((b, n // group, t), {})
        for j, value in log_weights[b, n, t].items():
          row[j // block_size] = max(row.get(j // block_size, -np.inf), value)
  return scores


def select(scores, shape, kv_heads, num_blocks, resolution=0.0):
  """Block indices i32 [B,K,T,P], and the smallest gap between a picked and an unpicked block.

  The gap counts only scores further apart than `resolution`: closer ones are ties and the lower
  block goes first.
  """
  batch, num_queries = shape
  picked = np.full((batch, kv_heads, num_queries, num_blocks), -1, np.int32)
  smallest_gap = np.inf
  for (b, h, t), row in scores.items():
    left, best = dict(row), []
    while left and len(best) < num_blocks:
      top = max(left.values())
      block = min(i for i, value in left.items() if top - value <= resolution)
      best.append(block)
      del left[block]
    if left and best:
      gap = min(row[i] for i in best) - max(left.values())
      if gap > resolution:
        smallest_gap = min(smallest_gap, gap)
    picked[b, h, t, :len(best)] = sorted(best)
  return picked, smallest_gap
