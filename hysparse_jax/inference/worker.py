"""An engine in a thread of its own: other threads submit, cancel and are called back."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hysparse_jax.errors import UserError
from hysparse_jax.inference.engine import Engine, prefill_size
from hysparse_jax.inference.requests import Handle, Request, TokenLogprobs
from hysparse_jax.inference.sampling import visible_tokens


class QueueFullError(Exception):
  """Too many requests are waiting."""


class StoppingError(Exception):
  """The worker ends, or has ended."""


class Progress(NamedTuple):
  """What is new of one request."""

  number: int                      # of the request in its ticket
  text: str
  tokens: list[int]
  logprobs: list[TokenLogprobs]    # one a token, if wanted
  finish_reason: str | None        # as in `Handle`
  error: Exception | None          # of this request alone; then `finish_reason` is "error"


# None: all requests of a ticket are in the queue. An exception: all are over, and why.
Event = None | Progress | Exception


class Ticket:
  """Requests that were submitted together."""

  def __init__(self, requests: Sequence[Request], listener: Callable[[Event], None]):
    self.requests, self.listener = requests, listener
    self.handles: list[Handle] = []
    self.given: list[list[int]] = []      # of each handle: characters and tokens


class Worker:
  """Runs an engine, which nobody else may call from now on.

      worker = Worker(engine, most_waiting=64)
      ticket = worker.submit([Request(prompt, 100)], print)     # prints None, then Progress
      worker.stop()

  Args:
    engine: an idle one.
    most_waiting: requests without a slot at a time.
    on_failure: called in the worker's thread when the engine itself fails, after every listener
      has got the exception, which is `error` from then on.
  """

  def __init__(self, engine: Engine, most_waiting: int,
               on_failure: Callable[[], None] = lambda: None):
    self.stats = engine.stats               # of the round before
    self.error: Exception | None = None
    self.stopping = False
    self.most = engine.slots + most_waiting  # requests at a time
    self._engine, self._on_failure = engine, on_failure
    self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    self._tickets: dict[Handle, tuple[Ticket, int]] = {}
    self._deadline = float("inf")
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  def submit(self, requests: Sequence[Request], listener: Callable[[Event], None]) -> Ticket:
    """Puts requests into the engine's queue, all or none.

    Args:
      requests: at least one.
      listener: called in the worker's thread with each `Event`; the engine waits for it. The
        exception is a UserError for an impossible request, QueueFullError, StoppingError, or what
        the engine failed with.
    """
    ticket = Ticket(requests, listener)
    self._inbox.put(lambda: self._submit(ticket))
    return ticket

  def cancel(self, ticket: Ticket):
    """Ends what is not done of a ticket; its slots and pages are free after the present round."""
    self._inbox.put(lambda: self._drop(ticket))

  def drain(self, seconds: float):
    """Takes no more requests; those that are not done after so many seconds get `StoppingError`.

    Can be called from a signal handler.
    """
    self.stopping = True
    self._inbox.put(lambda: setattr(self, "_deadline", time.monotonic() + seconds))

  def stop(self):
    """Ends everything and waits for the present round."""
    self.drain(0)
    self._thread.join()

  def _run(self):
    engine = self._engine
    try:
      while time.monotonic() < self._deadline:
        # Only where there is no round to run is an empty inbox waited for.
        with contextlib.suppress(queue.Empty):
          while True:
            self._inbox.get(block=not engine.busy and time.monotonic() < self._deadline)()
        if engine.busy:
          for handle in engine.step():
            self._report(handle)
        self.stats = engine.stats
      self._fail_all(StoppingError("the server is stopping"))
    except Exception as error:          # the cache is lost: it was donated to what failed
      self.error = error
      self._fail_all(error)
      self._on_failure()
    with contextlib.suppress(queue.Empty):      # who comes too late is answered, too
      while True:
        self._inbox.get(block=not self.stopping)()

  def _fail_all(self, error):
    for ticket in dict.fromkeys(ticket for ticket, _ in self._tickets.values()):
      if self.error is None:
        self._drop(ticket)
      ticket.listener(error)
    self._tickets.clear()
    self.stats = self._engine.stats

  def _submit(self, ticket):
    if self.error is not None or self.stopping:
      ticket.listener(self.error or StoppingError("the server is stopping"))
      return
    stats = self._engine.stats
    if stats.running + stats.waiting + len(ticket.requests) > self.most:
      ticket.listener(QueueFullError(f"{stats.waiting} requests are waiting for a slot; try "
                                     "again later"))
      return
    try:
      for index, request in enumerate(ticket.requests):
        handle = self._engine.submit(request)
        ticket.handles.append(handle)
        ticket.given.append([0, 0])
        self._tickets[handle] = ticket, index
    except Exception as error:           # bad input, or the tokenizer's: of this ticket alone
      self._drop(ticket)
      ticket.listener(error)
    else:
      ticket.listener(None)

  def _drop(self, ticket):
    for handle in ticket.handles:
      if self._tickets.pop(handle, None) and self.error is None:
        self._engine.cancel(handle)
    self.stats = self._engine.stats

  def _report(self, handle):
    ticket, index = self._tickets[handle]
    given = ticket.given[index]
    progress = Progress(index, handle.text[given[0]:], handle.tokens[given[1]:],
                        handle.logprobs[given[1]:], handle.finish_reason, handle.error)
    given[:] = len(handle.text), len(handle.tokens)
    if handle.done:
      del self._tickets[handle]
    ticket.listener(progress)


def warm_up(engine: Engine) -> int:
  """Compiles every program that a request can need, by requests that need them; says how many.

  A prompt's last chunk is filled up to a power of two, and looks at a part of the cache that grows
  with the prompt (`visible_tokens`): a request for each pair.
  """
  sizes = [prefill_size(1 << power, engine.chunk) for power in range(engine.chunk.bit_length() + 1)]
  prompts: dict[tuple[int, int], int] = {}       # (tokens of the program, visible) -> length
  for start in range(0, engine.max_tokens, engine.chunk):
    for size in sizes:
      for used in (size // 2 + 1, size):
        length = min(start + used, engine.max_tokens - 1)
        if length > start:
          program = prefill_size(length - start, engine.chunk)
          prompts.setdefault((program, visible_tokens(length, engine.max_tokens)), length)
  done = 0
  for length in sorted(prompts.values()):
    with contextlib.suppress(UserError):         # longer than all pages
      engine.submit(Request([0] * length, min(2, engine.max_tokens - length)))
      engine.run()
      done += 1
  return done
