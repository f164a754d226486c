"""The kernels of a trace, longest first."""

import collections
import pathlib

from jax.profiler import ProfileData


def print_kernels(folder, count: int):
  """The `count` kernels that took longest in a trace: ms, calls, name."""
  total = collections.defaultdict(lambda: [0.0, 0])
  for path in pathlib.Path(folder).rglob("*.xplane.pb"):
    for plane in ProfileData.from_file(str(path)).planes:
      if not plane.name.startswith("/device:"):
        continue
      for line in plane.lines:
        if line.name.startswith("Stream"):
          for event in line.events:
            total[event.name][0] += event.duration_ns / 1e6
            total[event.name][1] += 1
  print(f"{sum(ms for ms, _ in total.values()):10.1f} ms in all kernels")
  for name, (ms, calls) in sorted(total.items(), key=lambda item: -item[1][0])[:count]:
    print(f"{ms:10.1f} ms {calls:6} x {name[:90]}")
