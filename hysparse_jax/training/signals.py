"""Signals that ask a run to end: SIGTERM, and SIGINT (Ctrl-C).

While there are steps that no checkpoint holds, a signal is a request: the run ends after the step
and saves. While there are none (start-up, compiling, evaluating or drawing what is saved) a program
ends at once with 128 + the signal's number, and so it does for a second SIGINT. This is done by a
thread, since Python runs signal handlers only between two lines of the main thread, which may
compile for minutes, and since XLA can crash on a KeyboardInterrupt.

Light to import: programs call `install` before they import anything slow.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
  """What was asked for, and whether ending at once would lose anything."""

  def __init__(self):
    self.requested: signal.Signals | None = None
    self._settle = _nothing      # callable: nothing is lost once it has returned; None: steps are

  def unsaved(self):
    """From now on there are steps that no checkpoint holds."""
    self._settle = None

  def saved(self, settle: Callable[[], None] | None = None):
    """From now on every step is in a checkpoint, once `settle()` has returned."""
    self._settle = settle or _nothing

  def take(self, number: int) -> Callable[[], None] | None:
    """Notes a signal; returns what to wait for before ending at once, None to let the run save."""
    again = self.requested is not None and number == signal.SIGINT
    self.requested = signal.Signals(number)
    return _nothing if again else self._settle


def _nothing():
  pass


_program: Stop | None = None     # of this process, once `install` was called


def install():
  """Makes SIGTERM and SIGINT end this program as the module says; for programs, at their start.

  A signal that the parent process had ignored (as nohup does) stays ignored.
  """
  global _program
  _program = Stop()
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  for number in SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, lambda *_: None)      # the number goes to the pipe
  threading.Thread(target=_watch, args=(reader, _program), daemon=True).start()


def _watch(reader: int, stop: Stop):
  while True:
    number = os.read(reader, 1)[0]
    settle = stop.take(number) if number in SIGNALS else None
    if settle is not None:
      threading.Thread(target=_leave, args=(number, settle), daemon=True).start()


def _leave(number: int, settle: Callable[[], None]):
  with contextlib.suppress(Exception):     # of a save that failed: the main thread reports it
    settle()
  flusher = threading.Thread(target=_flush, daemon=True)
  flusher.start()
  flusher.join(0.5)                        # a full pipe must not hold the process
  with contextlib.suppress(OSError):
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
  os._exit(128 + number)


def _flush():
  with contextlib.suppress(Exception):
    sys.stdout.flush()
    if sys.stdout.isatty():
      os.write(1, b"\x1b[?25h")            # a progress bar hides the cursor


@contextlib.contextmanager
def requests_to_stop():
  """The `Stop` of a run: the program's, else one of its own, in the main thread, while it is open.

  Outside a program (a notebook, a script) a signal that would lose nothing does what it did before:
  SIGINT raises KeyboardInterrupt. In another thread than the main one Python takes no signals: then
  nothing is ever requested.
  """
  if _program is not None:
    try:
      yield _program
    finally:
      _program.saved()
  elif threading.current_thread() is not threading.main_thread():
    yield Stop()
  else:
    stop = Stop()

    def handle(number, frame):
      if stop.take(number) is None:
        return
      if callable(previous[number]):
        previous[number](number, frame)
      else:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    previous = {number: signal.signal(number, handle) for number in SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN}
    try:
      yield stop
    finally:
      for number, before in previous.items():
        signal.signal(number, before or signal.SIG_DFL)


def in_program() -> bool:
  """Whether `install` was called: then compiling may be ended from outside."""
  return _program is not None
