"""The paged ops on NVIDIA GPUs: sizes checked, then the Triton kernels."""

import jax.numpy as jnp

from pallas_kernels.checks import NotCoveredError
from pallas_kernels.paged_attention.gpu import full, sparse

PAGE_TOKENS = 64
MOST_PAGES = 32768     # of a sequence: the selection holds a score of each in registers


def paged_oracle_attention(q, k_pages, v_pages, page_table, lengths, **options):
  """See `api.py` and `full.py`.

  Raises:
    NotCoveredError: sizes or dtypes that the kernels do not take.
  """
  op = "paged_oracle_attention"
  _check(op, q, k_pages, v_pages)
  _check_pages(op, k_pages)
  if page_table.shape[1] > MOST_PAGES:
    _refuse(op, f"{page_table.shape[1]} pages a sequence", f"at most {MOST_PAGES}")
  return full.paged_oracle_attention(q, k_pages, v_pages, page_table, lengths, **options)


def paged_sparse_layer_attention(q, k_pages, v_pages, block_indices, page_table, lengths, k_ring,
                                 v_ring, *args, **options):
  """See `api.py` and `sparse.py`.

  Raises:
    NotCoveredError: sizes or dtypes that the kernels do not take.
  """
  op = "paged_sparse_layer_attention"
  for k, v in ((k_pages, v_pages), (k_ring, v_ring)):
    if k is not None:
      _check(op, q, k, v)
  if k_pages is not None:
    _check_pages(op, k_pages)
  return sparse.paged_sparse_layer_attention(
    q, k_pages, v_pages, block_indices, page_table, lengths, k_ring, v_ring, *args, **options)


def _check(op, q, k, v):
  for name, x in (("q", q), ("keys", k), ("values", v)):
    if x.dtype not in (jnp.bfloat16, jnp.float16) or x.dtype != q.dtype:
      _refuse(op, f"{name} {x.dtype}", "bfloat16 or float16, q's own")
    if x.shape[-1] not in (64, 128, 256):
      _refuse(op, f"head dim {x.shape[-1]} of {name}", "64, 128 or 256")
  group = q.shape[1] // k.shape[2]
  if group > 64:
    _refuse(op, f"{group} query heads a KV head", "at most 64")


def _check_pages(op, k_pages):
  if k_pages.shape[3] != PAGE_TOKENS:
    _refuse(op, f"pages of {k_pages.shape[3]} tokens", f"{PAGE_TOKENS}")


def _refuse(op, found, wanted):
  raise NotCoveredError(f'{op} triton: {found}; wanted {wanted}; use implementation="reference"')
