"""Keeps what Orbax prints about a failure off the console, and its threads from outliving it.

Every failure of a save or a restore comes back to the caller as one exception. Orbax logs it
besides, at every level that it passes through, and the reads and writes that it abandons at the
first failure print a traceback each when they end, in threads of TensorStore's. Threads that wait
for one that failed do so for 300 seconds, and Python waits for them at exit unless they are
daemons.
"""

import concurrent.futures
import logging
import re
import sys
import threading
import warnings

_installed = False


def silence():
  """Drops, in this process, what Orbax logs and what abandoned reads and writes print."""
  global _installed
  if _installed:
    return
  _installed = True
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(lambda record: not _is_noise(record))
  warnings.filterwarnings("ignore", "coroutine 'async_serialize.*was never awaited", RuntimeWarning)
  before, unraisable = sys.excepthook, sys.unraisablehook
  sys.excepthook = lambda kind, error, trace: (
    None if _is_abandoned(error) else before(kind, error, trace))
  sys.unraisablehook = lambda info: (
    None if _is_abandoned(info.exc_value) or "orbax" in repr(info.object) else unraisable(info))


def detached(call):
  """Starts `call()` in a daemon thread; threads that it starts are daemons too.

  Returns:
    The `concurrent.futures.Future` of its result.
  """
  future = concurrent.futures.Future()

  def work():
    try:
      future.set_result(call())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=work, daemon=True).start()
  return future


def reason(error: BaseException) -> str:
  """Why, in one line: the system's words where it refused, else the kind and the message."""
  error = error.__cause__ or error
  text = " ".join(str(error).split("[tensorstore_spec=")[0].split())
  system = re.search(r": ([^:\[\]]+) \[os_error_code='\d+'\]", text)
  if system:
    return system[1]
  if isinstance(error, OSError) and error.strerror:
    return f"{type(error).__name__}: {error.strerror}"
  return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _is_noise(record: logging.LogRecord) -> bool:
  if "orbax" in record.pathname:
    return True
  error = record.exc_info[1] if record.exc_info else None
  return record.name == "asyncio" and (error is None or _is_abandoned(error) or _in_orbax(error)
                                       or "OCDBT database" in str(error))


def _is_abandoned(error) -> bool:
  """Whether a read or write ended after those that waited for it had given up."""
  return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _in_orbax(error) -> bool:
  trace = error.__traceback__
  while trace is not None:
    if "orbax" in trace.tb_frame.f_code.co_filename:
      return True
    trace = trace.tb_next
  return False
