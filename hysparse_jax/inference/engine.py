"""Continuous batching on one process: requests join and leave while others are running.

A request waits for a slot and for pages, has its prompt prefilled in chunks, decodes together with
all others, and leaves. A round (`Engine.step`) is one chunk of the one request that is joining and
one token of every request that is running: at most two programs, the same whoever runs. While a
round is computed the host looks at what the round before has drawn.

What a request draws depends on itself alone: chunks end at multiples of `chunk` of its own tokens,
a prefix is reused at such ends only, and a request that was preempted has its prompt prefilled and
its tokens decoded again by the same programs. In float32 on the CPU it is the same to the bit.
"""

import contextlib
import heapq

import jax
import jax.numpy as jnp
import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.inference import slots as slot_programs
from hysparse_jax.inference.pages import PagePool, Prefix, PrefixCache, chunk_digests
from hysparse_jax.inference.requests import Handle, Request, Stats, TokenLogprobs, checked_prompt
from hysparse_jax.inference.sampling import SHORTEST, mesh_of, visible_tokens
from hysparse_jax.inference.slots import Drawn, Settings
from hysparse_jax.inference.text_stream import TextStream
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.fused import fused
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.seeds import key_of
from hysparse_jax.sharding import BATCH_AXES
from pallas_kernels import implementations

# Tokens of a prefill chunk: running requests wait for one, and prefixes are reused at their ends.
CHUNK = {"cpu": 512, "gpu": 2048, "tpu": 2048}


class _Job:
  """A request inside the engine."""

  def __init__(self, handle: Handle, prompt, number, chunk, tokenizer):
    self.handle, self.prompt, self.number = handle, prompt, number
    self.digests = chunk_digests(prompt, chunk)
    self.key = np.asarray(jax.random.key_data(key_of(handle.request.seed)))
    self.stream = (None if tokenizer is None
                   else TextStream(tokenizer, handle.request.stop, prompt))
    self.slot = -1                   # -1: none
    self.length = 0                  # tokens in the cache
    self.pages: list[int] = []

  def __lt__(self, other):           # the order of the queue: who came first
    return self.number < other.number

  @property
  def drawn(self) -> int:
    """New tokens that come out of what is in the cache, whether the host has them or not."""
    return max(self.length - len(self.prompt) + 1, 0)

  @property
  def running(self) -> bool:
    """Whether it has a slot and its prompt is cached, but not all new tokens are drawn."""
    return self.slot >= 0 and 0 < self.drawn < self.handle.request.max_new_tokens


class Engine:
  """Answers many requests at a time with one model.

      engine = Engine(model, slots=8, max_tokens=4096)
      handles = [engine.submit(Request(prompt, 100, temperature=0.7)) for prompt in prompts]
      engine.run()                           # or engine.step() while engine.busy
      [handle.result() for handle in handles]

  One thread calls it. Requests are served in the order in which they came. When a running request
  needs a page and none is free, prefixes are dropped, then the newest request is preempted: it
  waits again and is recomputed, its answer so far stays. On a GPU it holds the weights that read
  one input side by side (`model.fused`), a copy: drop the model if memory is short.

  Args:
    model: a Transformer; on a mesh whose batch axes are 1, so that pages are not split.
    slots: B, requests that run together.
    max_tokens: room for a sequence, prompt and new tokens.
    num_pages: that all slots share; None: `memory_bytes` decides, or every slot has max_tokens.
    memory_bytes: of the KV cache in all, rings included; not with `num_pages`.
    chunk: tokens of a prefill chunk, a multiple of the block size; None: `CHUNK`.
    max_prefixes: chunks of prompts kept for reuse, each with a copy of a slot's rings; 0: none.
    most_logprobs: that a request can ask for beside each token.
    tokenizer: for text and stop strings, has `encode(str)` and `decode(ids)`; None: tokens only.

  Raises:
    UserError: settings that do not fit each other or the model.
  """

  def __init__(self, model: Transformer, *, slots: int, max_tokens: int,
               num_pages: int | None = None, memory_bytes: int | None = None,
               chunk: int | None = None, max_prefixes: int = 64, most_logprobs: int = 5,
               tokenizer=None):
    self.cfg = cfg = model.cfg
    self.slots, self.max_tokens = slots, max_tokens
    self._tokenizer, self._mesh = tokenizer, mesh_of(model)
    one_device = self._mesh is None or self._mesh.size == 1
    self._model = fused(model) if one_device and implementations.platform() == "gpu" else model
    self.chunk = CHUNK[implementations.platform()] if chunk is None else chunk
    _check(cfg, self._mesh, slots=slots, max_tokens=max_tokens, chunk=self.chunk,
           max_prefixes=max_prefixes, most_logprobs=most_logprobs)
    self._most_logprobs = min(most_logprobs, cfg.vocab_size)
    columns = kv_cache.pages_for(cfg, max_tokens)
    if memory_bytes is not None:
      if num_pages is not None:
        raise UserError("give num_pages or memory_bytes, not both")
      num_pages = _pages_in(cfg, slots, max_tokens, memory_bytes)
    if num_pages is None:
      num_pages = slots * columns
    if num_pages < bool(columns):
      raise UserError(f"num_pages is {num_pages}; a model with full layers needs at least 1")
    self._pool = PagePool(num_pages if columns else 0)
    self._prefixes = PrefixCache(self._pool, max_prefixes)
    self._table = np.full((slots, columns), -1, np.int32)
    self._device_table: jax.Array | None = None       # None: the host's has changed
    self._jobs: list[_Job | None] = [None] * slots
    self._joining: _Job | None = None                 # has a slot, its prompt is not all cached
    self._waiting: list[_Job] = []                    # a heap
    # Not looked at yet: what was drawn, and for which rows: (job, row, number of the new token).
    self._pending: list[tuple[Drawn, list[tuple[_Job, int, int]]]] = []
    self._by_handle: dict[Handle, _Job] = {}
    self._counts = dict(prompt_tokens=0, reused_tokens=0, new_tokens=0, preemptions=0)
    self._submitted = 0
    self._programs = slot_programs.programs(cfg, self._mesh, self._most_logprobs)
    with self._on_mesh():
      self._groups, self._last = self._programs.empty(slots, max_tokens, num_pages)
    self._has_rings = bool(jax.tree.leaves([group.rings for group in self._groups]))

  @property
  def busy(self) -> bool:
    """Whether a request is waiting or running."""
    return bool(self._by_handle)

  @property
  def stats(self) -> Stats:
    """Counts, now and since the start."""
    running = sum(job is not None for job in self._jobs)
    return Stats(waiting=len(self._waiting), running=running,
                 pages=self._pool.free + self._pool.used, pages_used=self._pool.used,
                 pages_cached=self._prefixes.evictable(), **self._counts)

  def submit(self, request: Request) -> Handle:
    """Puts a request at the end of the queue.

    Raises:
      UserError: it is impossible, or can never fit.
    """
    prompt = checked_prompt(
      request, vocab_size=self.cfg.vocab_size, max_tokens=self.max_tokens,
      most_logprobs=self._most_logprobs, has_tokenizer=self._tokenizer is not None)
    needed = kv_cache.pages_for(self.cfg, prompt.size + request.max_new_tokens)
    if needed > self._pool.free + self._pool.used:
      raise UserError(f"the request needs {needed} pages of the cache, which has "
                      f"{self._pool.free + self._pool.used}; shorten the prompt or max_new_tokens")
    handle = Handle(request)
    job = _Job(handle, prompt, self._submitted, self.chunk, self._tokenizer)
    self._submitted += 1
    self._by_handle[handle] = job
    heapq.heappush(self._waiting, job)
    return handle

  def cancel(self, handle: Handle):
    """Ends a request at once; its slot and pages are free. One that is done stays as it is."""
    if handle in self._by_handle:
      self._end(self._by_handle[handle], "cancelled")

  def run(self):
    """Steps until every request is done."""
    while self.busy:
      self.step()

  def step(self) -> list[Handle]:
    """Starts a round and reads the one before; returns the handles of the requests that have a new
    token or are done."""
    pending, self._pending = self._pending, []
    with self._on_mesh():
      self._make_room()
      self._admit()
      self._prefill()
      self._decode()
    changed: dict[Handle, None] = {}                  # in order, each once
    for drawn, rows in pending:
      tokens = np.asarray(drawn.token)
      if any(job.handle.request.logprobs is not None for job, _, _ in rows):
        drawn = jax.device_get(drawn)
      for job, row, number in rows:
        # Not one that is done, nor a token that is drawn again after a preemption.
        if not job.handle.done and number == len(job.handle.tokens):
          self._add(job, int(tokens[row]), drawn, row)
          changed[job.handle] = None
    return list(changed)

  def _on_mesh(self):
    plain = self._mesh is None or self._mesh.size == 1
    return contextlib.nullcontext() if plain else jax.set_mesh(self._mesh)

  # Slots and pages.

  def _make_room(self):
    """A page for the next token of every running request, the oldest first."""
    for job in sorted(job for job in self._jobs if job is not None):
      if not job.running:             # preempted here, or has its pages already
        continue
      while not self._grow(job, job.length + 1):
        newest = max(job for job in self._jobs if job is not None)
        self._leave(newest)
        heapq.heappush(self._waiting, newest)
        self._counts["preemptions"] += 1
        if newest is job:
          break

  def _grow(self, job, tokens) -> bool:
    """Gives the job pages for so many tokens; False if there are too few."""
    more = kv_cache.pages_for(self.cfg, tokens) - len(job.pages)
    if more <= 0:
      return True
    if not self._can_take(more):
      return False
    self._prefixes.evict(more)
    job.pages += self._pool.take(more)
    self._table[job.slot, :len(job.pages)] = job.pages
    self._device_table = None
    return True

  def _can_take(self, pages) -> bool:
    free = self._pool.free
    return pages <= free or pages <= free + self._prefixes.evictable()

  def _admit(self):
    """Gives the oldest waiting request a slot, if no other is joining and its pages are there."""
    if self._joining is not None or not self._waiting or None not in self._jobs:
      return
    job = self._waiting[0]
    # At least the last token of the prompt is prefilled: its logits are needed.
    found = self._prefixes.find(job.digests[:(len(job.prompt) - 1) // self.chunk])
    pages = [page for prefix in found for page in prefix.pages]
    tokens = len(job.prompt) + len(job.handle.tokens) + 1
    self._pool.share(pages)                               # so that they are not evicted
    if not self._can_take(kv_cache.pages_for(self.cfg, tokens) - len(pages)):
      self._pool.release(pages)
      return
    heapq.heappop(self._waiting)
    job.slot, job.pages, self._joining = self._jobs.index(None), pages, job
    self._jobs[job.slot] = job
    self._grow(job, tokens)
    job.length = job.handle.reused_tokens = len(found) * self.chunk
    self._counts["reused_tokens"] += job.length
    if found and self._has_rings:
      self._groups = self._programs.put_rings(self._groups, np.int32(job.slot), found[-1].rings)

  def _leave(self, job):
    """Takes slot and pages from a job."""
    if job is self._joining:
      self._joining = None
    self._pool.release(job.pages)
    self._jobs[job.slot] = None
    self._table[job.slot] = -1
    self._device_table = None
    job.slot, job.length, job.pages = -1, 0, []

  def _end(self, job, reason, error=None):
    """The job is done."""
    if job.slot < 0:
      self._waiting.remove(job)
      heapq.heapify(self._waiting)
    else:
      self._leave(job)
    handle = job.handle
    del self._by_handle[handle]
    handle.finish_reason, handle.error = reason, error

  # The two programs of a round.

  def _prefill(self):
    """The next chunk of the joining job, which is running after its last."""
    job = self._joining
    if job is None:
      return
    start = job.length
    end = min(start + self.chunk, len(job.prompt))
    size = prefill_size(end - start, self.chunk)
    tokens = np.zeros((1, size), np.int32)
    tokens[0, :end - start] = job.prompt[start:end]
    columns = kv_cache.pages_for(self.cfg, visible_tokens(end, self.max_tokens))
    drawn, self._groups, self._last = self._programs.prefill(
      self._model, self._groups, self._last, np.int32(job.slot), tokens, np.int32(start),
      np.int32(end - start), self._table[job.slot:job.slot + 1].copy(), _settings([job]),
      num_pages=columns)
    job.length = end
    self._counts["prompt_tokens"] += end - start
    self._keep_prefix(job, start, end)
    if end == len(job.prompt):
      self._joining = None
      self._pending.append((drawn, [(job, 0, 0)]))

  def _keep_prefix(self, job, start, end):
    digests = job.digests[:end // self.chunk]
    if end - start < self.chunk or not self._prefixes.wants(digests[-1]):
      return
    rings = (self._programs.take_rings(self._groups, np.int32(job.slot)) if self._has_rings
             else None)
    first, last = (kv_cache.pages_for(self.cfg, tokens) for tokens in (start, end))
    self._prefixes.add(digests, Prefix(tuple(job.pages[first:last]), rings))

  def _decode(self):
    """One token of every running job."""
    rows = [job if job is not None and job.running else None for job in self._jobs]
    running = [job for job in rows if job is not None]
    if not running:
      return
    tokens, lengths, active = np.zeros((3, len(rows)), np.int32)
    for job in running:
      known, at = job.handle.tokens, job.slot
      tokens[at] = known[job.drawn - 1] if job.drawn <= len(known) else -1
      lengths[at], active[at] = job.length, 1
    if self._device_table is None:
      self._device_table = jnp.array(self._table)      # a copy: the host's changes
    drawn, self._groups, self._last = self._programs.decode(
      self._model, self._groups, self._last, tokens, lengths, active, self._device_table,
      _settings(rows))
    self._pending.append((drawn, [(job, job.slot, job.drawn) for job in running]))
    for job in running:
      job.length += 1

  def _add(self, job, token, drawn, row):
    handle, request = job.handle, job.handle.request
    if token < 0:
      self._prefixes.clear()      # pages of this prompt may hold the NaN
      self._end(job, "error", FloatingPointError(
        f"the logits of new token {len(handle.tokens)} are NaN; the weights are broken"))
      return
    self._counts["new_tokens"] += 1
    handle.tokens.append(token)
    if request.logprobs is not None:
      top = zip(drawn.top_tokens[row].tolist(), drawn.top_logprobs[row].tolist())
      handle.logprobs.append(
        TokenLogprobs(float(drawn.logprob[row]), list(top)[:request.logprobs]))
    stopped = token in request.stop_tokens
    last = stopped or len(handle.tokens) == request.max_new_tokens
    if job.stream is not None:
      try:
        handle.text += "" if stopped else job.stream.add(token)
        handle.text += job.stream.finish() if last else ""
      except Exception as error:       # the tokenizer's: of this request alone
        self._end(job, "error", error)
        return
      stopped = stopped or job.stream.stopped
    if stopped or last:
      self._end(job, "stop" if stopped else "length")


def prefill_size(tokens: int, chunk: int) -> int:
  """Tokens of the prefill program that takes so many: a power of two, or the whole chunk."""
  return min(max(1 << (tokens - 1).bit_length(), SHORTEST), chunk)


def _settings(jobs) -> Settings:
  """Of the next tokens of jobs; None is a row without one."""
  of = lambda get, idle, dtype: np.array([idle if job is None else get(job) for job in jobs], dtype)
  key = next(job.key for job in jobs if job is not None)
  request = lambda job: job.handle.request
  return Settings(
    key=of(lambda job: job.key, np.zeros_like(key), np.uint32),
    number=of(lambda job: job.drawn, 0, np.int32),
    temperature=of(lambda job: request(job).temperature, 0, np.float32),
    top_k=of(lambda job: min(request(job).top_k, 2**31 - 1), 0, np.int32),
    top_p=of(lambda job: request(job).top_p, 1, np.float32),
    logprobs=of(lambda job: request(job).logprobs is not None, False, bool))


def _pages_in(cfg, slots, max_tokens, memory_bytes) -> int:
  """Pages that fit into so many bytes beside the rings."""
  size = lambda pages: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
    jax.eval_shape(lambda: kv_cache.init_cache(cfg, slots, max_tokens, pages).groups)))
  rings, page = size(0), size(1) - size(0)
  pages = (memory_bytes - rings) // page if page else 0
  if memory_bytes < rings + page:
    raise UserError(f"memory_bytes is {memory_bytes:,}; the rings of {slots} slots take {rings:,} "
                    f"and a page {page:,}; give more, or fewer slots")
  return pages


def _check(cfg, mesh, *, slots, max_tokens, chunk, max_prefixes, most_logprobs):
  wanted = (("slots", slots, 1), ("max_tokens", max_tokens, 2), ("chunk", chunk, 1),
            ("max_prefixes", max_prefixes, 0), ("most_logprobs", most_logprobs, 0))
  for name, value, least in wanted:
    if value < least:
      raise UserError(f"{name} is {value}; it must be at least {least}")
  if "full" in cfg.layer_kinds and chunk % cfg.block_size:
    raise UserError(f"chunk={chunk} is no multiple of the block size {cfg.block_size}; prefixes "
                    "are shared by whole pages")
  if mesh is not None and any(mesh.shape[axis] > 1 for axis in BATCH_AXES):
    raise UserError(f"the weights lie on a mesh {dict(mesh.shape)}; the engine's pages are not "
                    "split over data, fsdp or expert: load the model with these at 1")
