"""Signals that ask a run to end."""

import signal


class StopOnSigterm:
  """While it is open, SIGTERM sets `requested` instead of killing the process."""

  def __init__(self):
    self.requested = False

  def __enter__(self):
    self._previous = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *error):
    signal.signal(signal.SIGTERM, self._previous)

  def _request(self, *_):
    self.requested = True
