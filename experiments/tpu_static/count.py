"""Counts a Pallas TPU kernel's instruction bundles from the TPU compiler's final schedule.

No TPU is needed: libtpu compiles on a CPU machine and dumps, per kernel, the bundles it will issue
(one a cycle while nothing waits) and which units each of them uses. These are counts, not timings:
waits for DMA, for HBM and between grid steps are not in them.
"""

import contextlib
import dataclasses
import glob
import os
import pickle
import re
import subprocess
import sys
import tempfile

from pallas_kernels import tpu

# A kernel outside of every loop carries the transformations around it: transpose_jvp_NAME__.1.
_WITHIN = "(?:(?:transpose|jvp)_)*"
_LINE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{")


@dataclasses.dataclass(frozen=True)
class Span:
  """A straight run of bundles between two branches or loop bounds.

  Attributes:
    start: address of the first bundle.
    bundles: how many.
    depth: loops around it; the grid is the outermost.
    units: {unit: instructions} such as MXU, VALU, EUP, XLU, VLOAD, VSTORE.
    share: {unit: instructions over slots}.
  """

  start: int
  bundles: int
  depth: int
  units: dict
  share: dict


def spans(directory, kernel):
  """The spans of a kernel in address order, from the dump in `directory`.

  Args:
    directory: what `--xla_jf_dump_to` named.
    kernel: the `name=` of the `pallas_call`.

  Raises:
    RuntimeError: the dump holds no such kernel, or several.
  """
  with open(_dumped(directory, kernel, "final_hlo-static-per-bundle-utilization.txt")) as file:
    lines = file.read().split("\n")
  names = lines[1].split(", ")
  slots = [int(x) for x in lines[2].split()]
  used = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
  found, last, depth = [], 0, 1
  with open(_dumped(directory, kernel, "final_bundles.txt")) as file:
    for line in file:
      match = _LINE.match(line)
      if not match:
        continue
      address = int(match.group(1), 16)
      if match.group(2) in ("LB", "PF", "PB", "LE") or "sbr.rel" in line:
        if address > last:
          rows = used[last:address]
          total = [sum(row[i] for row in rows) for i in range(len(names))]
          found.append(Span(
            last, address - last, depth, dict(zip(names, total)),
            {n: t / (s * (address - last)) for n, t, s in zip(names, total, slots)}))
        last = address
      depth = max(len(match.group(3)), 1)
  return found


def launches(directory, kernel):
  """Names, for `spans`, of the launches that a kernel is cut into: `kernel`, and `kernel`_part."""
  found = [re.search(rf"\d-{_WITHIN}({re.escape(kernel)}(?:_part)?)_*((?:\.\d+)*)-\d+"
                     r"-final_bundles.txt$", f) for f in sorted(glob.glob(f"{directory}/*"))]
  return [match.group(1) + match.group(2) for match in found if match]


def vmem_bytes(directory, kernel):
  """VMEM of a kernel's windows and scratch; spilled registers are not in it."""
  with open(_dumped(directory, kernel, "pre-finalize-registers-and-allocations.txt")) as file:
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", file.read())
  return sum(int(size, 16) for size in sizes)


def _dumped(directory, kernel, suffix):
  # The compiler adds ".1" and the like to a kernel's name, whose end `launches` may name.
  name, _, number = kernel.partition(".")
  number = rf"\.{re.escape(number)}" if number else r"(\.\d+)*"
  found = [f for f in glob.glob(f"{directory}/*{suffix}")
           if re.search(rf"\d-{_WITHIN}{re.escape(name)}_*{number}-\d+-{suffix}$", f)]
  if len(found) != 1:
    raise RuntimeError(f"kernel {kernel!r}: the dump has {len(found)} schedules, wanted 1")
  return found[0]


@contextlib.contextmanager
def dump(generation, fn, *abstract_args):
  """Compiles in a process of its own, because libtpu reads its flags once.

  Args:
    generation: a key of `tpu.GENERATIONS`.
    fn: a picklable function (of a module, or `functools.partial` of one).
    abstract_args: pytrees of `jax.ShapeDtypeStruct`.

  Yields:
    The directory of the dump, which is removed afterwards, and the executable's
    {argument,output,temp}_bytes.

  Raises:
    RuntimeError: the compiler's own message.
  """
  with tempfile.TemporaryDirectory(prefix="tpu_static_") as directory:
    flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
    child = subprocess.run(
      [sys.executable, "-c", _CHILD], input=pickle.dumps((generation, fn, abstract_args)),
      capture_output=True, check=False, env=os.environ | tpu.COMPILER_ENVIRONMENT | {
        "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags})
    if child.returncode:
      raise RuntimeError(child.stderr.decode().strip().split("\n")[-1])
    yield directory, pickle.loads(child.stdout)


_CHILD = """
import pickle, sys
from pallas_kernels import tpu
generation, fn, args = pickle.load(sys.stdin.buffer)
m = tpu.compile_for(generation, fn, *args).memory_analysis()
sys.stdout.buffer.write(pickle.dumps({
  "argument_bytes": m.argument_size_in_bytes, "output_bytes": m.output_size_in_bytes,
  "temp_bytes": m.temp_size_in_bytes}))
"""
