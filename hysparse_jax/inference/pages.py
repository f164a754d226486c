"""Who holds which page of the KV cache: a pool with reference counts, and prefixes kept for reuse.

Pure Python; the pages themselves are arrays of `model/cache.py`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PagePool:
  """Pages 0 to num_pages - 1, each free or held by at least one holder.

  A page may have several holders, which then only read it.

  Args:
    num_pages: how many there are.
  """

  def __init__(self, num_pages: int):
    self._free = list(range(num_pages))[::-1]
    self._holders = [0] * num_pages

  @property
  def free(self) -> int:
    """Pages that nobody holds."""
    return len(self._free)

  @property
  def used(self) -> int:
    """Pages that somebody holds."""
    return len(self._holders) - len(self._free)

  def holders(self, page: int) -> int:
    """How many hold the page."""
    return self._holders[page]

  def take(self, count: int) -> list[int]:
    """`count` free pages, each with one holder now.

    Raises:
      ValueError: fewer are free; nothing is taken.
    """
    if count > self.free:
      raise ValueError(f"{count} pages wanted, {self.free} are free")
    pages = [self._free.pop() for _ in range(count)]
    for page in pages:
      self._holders[page] = 1
    return pages

  def share(self, pages: Sequence[int]):
    """Adds a holder to each page.

    Raises:
      ValueError: a page is free.
    """
    self._check_held(pages)
    for page in pages:
      self._holders[page] += 1

  def release(self, pages: Sequence[int]):
    """Takes a holder from each page; one without holders is free.

    Raises:
      ValueError: a page is free already.
    """
    self._check_held(pages)
    for page in pages:
      self._holders[page] -= 1
      if not self._holders[page]:
        self._free.append(page)

  def _check_held(self, pages):
    for page in pages:
      if self._holders[page] < 1:
        raise ValueError(f"page {page} is free; only a page that is held is shared or released")


def chunk_digests(tokens: np.ndarray, chunk: int) -> list[bytes]:
  """A digest for each full chunk of a prompt; it stands for all tokens up to the chunk's end.

  Args:
    tokens: i32 [T].
    chunk: tokens of a chunk.
  """
  digests, before = [], b""
  for end in range(chunk, len(tokens) + 1, chunk):
    before = hashlib.sha256(before + tokens[end - chunk:end].tobytes()).digest()
    digests.append(before)
  return digests


class Prefix(NamedTuple):
  """The last chunk of a prefix that was prefilled once."""

  pages: tuple[int, ...]   # of this chunk alone; those before it are its predecessors'
  rings: object            # the window layers' rings at its end; None: the model has none


class PrefixCache:
  """Prefixes of prompts, chunk by chunk; it holds their pages until they are needed elsewhere.

  A window layer's ring at some token depends on everything before, and a ring is overwritten as a
  sequence grows. So a prefix can be continued only where its rings were copied: at chunk ends.

  The chunks of a prefix are dropped from its end: whenever a chunk is used, those before it count
  as used later.

  Args:
    pool: where the pages are from.
    max_prefixes: chunks to keep at most, which bounds the memory of their rings; 0 keeps none.
  """

  def __init__(self, pool: PagePool, max_prefixes: int):
    self._pool, self._max = pool, max_prefixes
    self._entries: OrderedDict[bytes, Prefix] = OrderedDict()     # the least recently used first

  def __len__(self):
    return len(self._entries)

  def find(self, digests: Sequence[bytes]) -> list[Prefix]:
    """The chunks that are kept, from the first to the last one before a gap."""
    found = []
    for digest in digests:
      if digest not in self._entries:
        break
      found.append(self._entries[digest])
    self._touch(digests[:len(found)])
    return found

  def wants(self, digest: bytes) -> bool:
    """Whether `add` would keep this chunk."""
    return self._max > 0 and digest not in self._entries

  def add(self, digests: Sequence[bytes], prefix: Prefix):
    """Keeps the chunk of the last digest; those before it are its predecessors'."""
    if not self.wants(digests[-1]):
      return
    if len(self) == self._max:
      oldest = next(iter(self._entries))
      if oldest in digests:            # without its predecessors the chunk would never be found
        return
      self._drop(oldest)
    self._pool.share(prefix.pages)
    self._entries[digests[-1]] = prefix
    self._touch(digests)

  def evictable(self) -> int:
    """Pages that `evict` can free: nobody else holds them."""
    return sum(len(prefix.pages) for prefix in self._entries.values() if self._alone(prefix))

  def evict(self, count: int):
    """Drops the least recently used chunks until `count` pages are free or none can be freed."""
    for digest, prefix in list(self._entries.items()):
      if self._pool.free >= count:
        return
      if prefix.pages and self._alone(prefix):
        self._drop(digest)

  def clear(self):
    """Drops everything."""
    for digest in list(self._entries):
      self._drop(digest)

  def _alone(self, prefix):
    return all(self._pool.holders(page) == 1 for page in prefix.pages)

  def _drop(self, digest):
    self._pool.release(self._entries.pop(digest).pages)

  def _touch(self, digests):
    for digest in reversed(digests):
      if digest in self._entries:
        self._entries.move_to_end(digest)
