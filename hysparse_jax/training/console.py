"""Lines on stdout and stderr; a closed pipe or a full disk there stops no training."""

import contextlib
import os
import sys


def say(text: str):
  """A line on stdout; where it cannot be written, stdout is dropped with one warning."""
  with outlived():
    print(text, flush=True)


def warn(text: str):
  """A warning, one line on stderr."""
  if sys.stderr is None:          # it is closed: print would take stdout
    return
  with contextlib.suppress(OSError, ValueError):
    print("warning: " + " ".join(text.split()), file=sys.stderr, flush=True)


def is_terminal() -> bool:
  """Whether stdout is a terminal."""
  return sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


@contextlib.contextmanager
def outlived():
  """What is written to stdout in it may fail: then stdout is dropped, and the run goes on."""
  try:
    yield
  except (OSError, ValueError) as error:      # ValueError: it was closed, or takes no such letters
    _drop_stdout()
    warn(f"cannot write to stdout: {getattr(error, 'strerror', error)}; the run goes on without it")


def _drop_stdout():
  """Sends what is still written to stdout, and what its buffer holds, to nowhere."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, sys.stdout.fileno())
  except (OSError, ValueError):        # no file of the system's, as in a notebook
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)
  finally:
    os.close(nowhere)
