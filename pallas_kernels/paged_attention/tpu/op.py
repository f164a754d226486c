"""The paged ops on TPU: sizes checked, query heads by KV head and padded, then the kernels."""

import jax.numpy as jnp

from pallas_kernels.causal_attention_tpu.tiles import round_up
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.paged_attention.tpu import full, sparse
from pallas_kernels.tpu import LANES

ROWS = 16                 # a KV head's query heads are padded to a multiple of this
PIECE_BYTES = 1 << 17     # of one page's keys in one copy of the full op, at most
STEP_BYTES = 1 << 20      # of the keys of one of its steps, at most: some 1 us of HBM
STEP_TOKENS = 1024        # of one of its steps, at most
SCORE_BYTES = 8 << 20     # of the logits' maxima that it has in VMEM, at most
MOST_PAGES = 32768        # of a sequence: two rows of the page table are in SMEM
BLOCK_BYTES = 4 << 20     # of a program of the sparse op, at most


def paged_oracle_attention(q, k_pages, v_pages, page_table, lengths, **options):
  """See `api.py` and `full.py`.

  Raises:
    NotCoveredError: sizes or dtypes that the kernel does not take.
  """
  op = "paged_oracle_attention"
  _check(op, q, k_pages, v_pages)
  _check_pages(op, k_pages)
  heads = q.shape[1]
  q = _by_kv_head(q, k_pages.shape[2])
  tiles = _tiles(op, q, k_pages, v_pages, page_table.shape[1])
  out, block_indices = full.paged_oracle_attention(q, k_pages, v_pages, page_table, lengths,
                                                   tiles=tiles, **options)
  return _joined(out, heads), block_indices


def paged_sparse_layer_attention(q, k_pages, v_pages, block_indices, page_table, lengths, k_ring,
                                 v_ring, gate_sparse, gate_local, *, sinks_sparse, sinks_local,
                                 **options):
  """See `api.py` and `sparse.py`.

  Raises:
    NotCoveredError: sizes or dtypes that the kernel does not take.
  """
  op, needed = "paged_sparse_layer_attention", 0
  for k, v, pieces in ((k_pages, v_pages, 0 if block_indices is None else block_indices.shape[2]),
                       (k_ring, v_ring, 1)):
    if k is not None:
      _check(op, q, k, v)
      kv_heads = k.shape[2]
      needed += pieces * k.shape[3] * (k.shape[-1] + v.shape[-1]) * k.dtype.itemsize
  if k_pages is not None:
    _check_pages(op, k_pages)
  if needed > BLOCK_BYTES:
    _refuse(op, f"{needed} bytes of selected pages and window to a KV head",
            f"at most {BLOCK_BYTES}")
  split = lambda x: None if x is None else _by_kv_head(x, kv_heads)
  sinks = lambda x: None if x is None else split(x[None, :, None])[0]
  out = sparse.paged_sparse_layer_attention(
    split(q), k_pages, v_pages, block_indices, page_table, lengths, k_ring, v_ring,
    split(gate_sparse), split(gate_local), sinks_sparse=sinks(sinks_sparse),
    sinks_local=sinks(sinks_local), **options)
  return _joined(out, q.shape[1])


def _by_kv_head(x, kv_heads):
  """x [B,N,.] as [B,K,G,.], G padded with copies of the last head: they change no maximum."""
  x = x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])
  group = x.shape[2]
  return jnp.pad(x, ((0, 0), (0, 0), (0, round_up(group, ROWS) - group), (0, 0)), mode="edge")


def _joined(out, heads):
  """out [B,N,E] of out [B,K,G,E] without the padding."""
  batch, kv_heads, _, width = out.shape
  return out[:, :, :heads // kv_heads].reshape(batch, heads, width)


def _tiles(op, q, k_pages, v_pages, room):
  """The largest `FullTiles` within the limits above, of two programs or more: a v5p has two cores.

  room: U, pages of the longest sequence.
  """
  batch, kv_heads, rows, _ = q.shape
  size, width, v_width = *k_pages.shape[3:], v_pages.shape[-1]
  page_bytes = size * max(width, v_width) * k_pages.dtype.itemsize
  most = min(MOST_PAGES, SCORE_BYTES // (4 * rows * LANES) * LANES)
  if room > most:
    _refuse(op, f"{room} pages a sequence", f"at most {most}")
  heads = max(n for n in range(1, kv_heads + 1) if n == 1 or kv_heads % n == 0 and (
    n * room * rows * 4 <= SCORE_BYTES and n * page_bytes <= PIECE_BYTES
    and batch * kv_heads >= 2 * n))
  pages = 1
  while pages < min(room, LANES) and (2 * pages * size <= STEP_TOKENS
                                      and 2 * pages * heads * page_bytes <= STEP_BYTES):
    pages *= 2
  return full.FullTiles(heads, pages, size)


def _check(op, q, k, v):
  dtypes = sorted({jnp.dtype(x.dtype).name for x in (q, k, v)})
  if dtypes not in (["bfloat16"], ["float32"]):
    _refuse(op, f"q, keys, values {', '.join(dtypes)}", "all bfloat16 or all float32")
  for name, x in (("keys", k), ("values", v)):
    if x.shape[-1] not in (128, 256):      # others, such as 64, XLA keeps with pages as lanes
      _refuse(op, f"head dim {x.shape[-1]} of {name}", "128 or 256")
  group = q.shape[1] // k.shape[2]
  if group > 128:
    _refuse(op, f"{group} query heads a KV head", "at most 128")


def _check_pages(op, k_pages):
  if k_pages.shape[3] % 16 or k_pages.shape[3] > 256:
    _refuse(op, f"pages of {k_pages.shape[3]} tokens", "a multiple of 16 up to 256")


def _refuse(op, found, wanted):
  raise NotCoveredError(
    f'{op} mosaic_tpu: {found}; wanted {wanted}; use implementation="reference"')
