"""The page pool and the prefix cache: no page is lost, or free while it is held."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hysparse_jax.inference.pages import PagePool, Prefix, PrefixCache, chunk_digests

PAGES, CHUNK = 12, 4


def digests_of(text: str):
  return chunk_digests(np.frombuffer(text.encode(), np.uint8).astype(np.int32), CHUNK)


def test_a_digest_stands_for_everything_before():
  first, second = digests_of("aaaabbbb")
  assert digests_of("aaaabbb") == [first] and digests_of("aaaabbbbc") == [first, second]
  assert digests_of("caaabbbb")[1] != second and digests_of("aaaacbbb")[1] != second
  assert digests_of("aaa") == []


def test_pages_are_free_when_the_last_holder_lets_go():
  pool = PagePool(3)
  a, b = pool.take(2)
  pool.share([a])
  pool.release([a, b])
  assert (pool.free, pool.used, pool.holders(a), pool.holders(b)) == (2, 1, 1, 0)
  with pytest.raises(ValueError, match="3 pages wanted, 2 are free"):
    pool.take(3)
  for wrong in (pool.release, pool.share):
    with pytest.raises(ValueError, match=f"page {b} is free"):
      wrong([a, b])
  assert pool.holders(a) == 1                     # nothing happened


def kept(pool, cache, text):
  """Caches the chunks of a text as a prompt that was prefilled and is done."""
  digests, found = digests_of(text), cache.find(digests_of(text))
  for end in range(len(found), len(digests)):
    pages = pool.take(1)
    cache.add(digests[:end + 1], Prefix(tuple(pages), text[:(end + 1) * CHUNK]))
    pool.release(pages)


def test_prefixes_are_dropped_from_their_ends_the_least_recently_used_first():
  pool = PagePool(PAGES)
  cache = PrefixCache(pool, 5)
  kept(pool, cache, "aaaabbbbcccc")
  kept(pool, cache, "xxxxyyyy")
  assert len(cache) == pool.used == cache.evictable() == 5
  found = cache.find(digests_of("aaaabbbbzzzz"))
  assert [prefix.rings for prefix in found] == ["aaaa", "aaaabbbb"]
  cache.evict(PAGES - 5 + 3)                       # oldest: c, then y before x
  assert [len(cache.find(digests_of(text))) for text in ("aaaabbbbcccc", "xxxxyyyy")] == [2, 0]
  pool.share(found[1].pages)                       # a request reads it
  assert cache.evictable() == 1
  cache.evict(PAGES)
  assert (len(cache), pool.used) == (1, 1) and cache.find(digests_of("aaaabbbb")) == []
  cache.clear()
  assert pool.used == 1
  pool.release(found[1].pages)
  assert pool.free == PAGES


def test_the_number_of_prefixes_is_bounded():
  pool = PagePool(PAGES)
  cache = PrefixCache(pool, 2)
  kept(pool, cache, "aaaabbbbcccc")               # the third would push out the second
  assert len(cache.find(digests_of("aaaabbbbcccc"))) == len(cache) == 2
  kept(pool, cache, "xxxx")
  assert len(cache.find(digests_of("aaaabbbbcccc"))) == 1 and len(cache) == pool.used == 2
  none = PrefixCache(pool, 0)
  kept(pool, none, "aaaa")
  assert len(none) == 0 and not none.wants(digests_of("aaaa")[0]) and pool.used == 2


OPERATIONS = st.lists(st.tuples(
  st.sampled_from(["join", "join", "grow", "leave", "evict", "clear"]),
  st.integers(0, 20), st.text("ab", min_size=1, max_size=16)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(0, 6))
def test_every_page_has_the_holders_that_it_should_have(operations, most):
  """Requests join with a prefix, grow and leave in any order; holders are counted a second way."""
  pool, running = PagePool(PAGES), []
  cache, cached = PrefixCache(pool, most), {}     # digest -> pages, as far as they were added
  for what, number, text in operations:
    digests = digests_of(text)
    if what == "join":
      found = cache.find(digests)
      pages = [page for prefix in found for page in prefix.pages]
      assert pages == [page for digest in digests[:len(found)] for page in cached[digest]]
      pool.share(pages)
      cache.evict(len(digests) - len(found))
      if len(digests) - len(found) > pool.free:
        pool.release(pages)
        continue
      for end in range(len(found), len(digests)):
        new = pool.take(1)
        assert new[0] not in {page for other in running for page in other} | set(pages)
        pages += new
        if cache.wants(digests[end]):
          cached[digests[end]] = tuple(new)
        cache.add(digests[:end + 1], Prefix(tuple(new), None))
      running.append(pages)
    elif what == "grow" and running and pool.free:
      running[number % len(running)] += pool.take(1)
    elif what == "leave" and running:
      pool.release(running.pop(number % len(running)))
    elif what == "evict":
      possible = min(number, PAGES, pool.free + cache.evictable())
      cache.evict(number)
      assert pool.free >= possible
    elif what == "clear":
      cache.clear()
    holders = Counter(page for pages in running for page in pages)
    holders.update(page for prefix in cache._entries.values() for page in prefix.pages)
    assert [pool.holders(page) for page in range(PAGES)] == [holders[p] for p in range(PAGES)]
    assert pool.used == len(holders) and pool.free == PAGES - len(holders)
    assert len(cache) <= most
  for pages in running:
    pool.release(pages)
  cache.clear()
  assert pool.free == PAGES
