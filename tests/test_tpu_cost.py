"""Schedules read from the TPU compiler's dump, and what is counted from them."""

import importlib.util
import pathlib

import pytest

from experiments.tpu_static import cost as tpu_cost
from experiments.tpu_static import count as tpu_static
from pallas_kernels import tpu
from pallas_kernels.named_shapes import PAPER

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not published for this platform")

BUNDLES = """
     0   :  { %1 = nop }
 0x1 LB: > { %2 = sbr.rel target }
 0x2   : >> { %3 = vmatmul }
 0x3   : >> { %4 = vmatmul }
 0x4 LE: > { %5 = nop }
 0x5   :  { %6 = nop }
"""
UNITS = """== CAPACITY:
MXU, VALU
    4     2
== UTILIZATION:
0 1
0 1
4 0
2 1
0 0
0 0
"""


def test_spans_of_a_schedule(tmp_path):
  (tmp_path / "12-kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UNITS)
  (tmp_path / "12-kernel.1-72-final_bundles.txt").write_text(BUNDLES)
  (tmp_path / "12-other_kernel.1-72-final_bundles.txt").write_text("")
  (tmp_path / "12-kernel.1-71-schedule-analysis_final_bundles.txt").write_text("")
  found = tpu_static.spans(tmp_path, "kernel")
  hot = max(found, key=lambda s: s.units["MXU"])
  assert (hot.start, hot.bundles, hot.depth) == (1, 3, 2)
  assert hot.units == {"MXU": 6, "VALU": 2}
  assert hot.share == {"MXU": 0.5, "VALU": 2 / 6}
  with pytest.raises(RuntimeError, match="kernel 'absent': the dump has 0 schedules, wanted 1"):
    tpu_static.spans(tmp_path, "absent")


@needs_libtpu
def test_the_oracle_costs_little_more_than_the_same_attention_without_it():
  """The target for a group of 16: 1.03, selection included."""
  oracle, plain = (tpu_cost.row(op, "80b_32k", "v5p", "fwd")
                   for op in ("oracle_attention", "causal_attention"))
  shape, facts = PAPER["80b_32k"], tpu.GENERATIONS["v5p"]
  # 64 query tiles see 1, 1, 2, 2, ... 32, 32 key tiles; 4 KV heads, 4 parts of a group.
  assert oracle["steps"] == plain["steps"] == 4 * 4 * 32 * 33
  flops = 4 * shape.num_heads * shape.head_dim * 512 * 1024 * 32 * 33
  assert oracle["mxu_floor_bundles"] * oracle["steps"] * facts.flops_per_bundle == flops
  assert oracle["bundles"] * facts.cores > oracle["steps"] * oracle["bundles_per_step"]
  assert 0 < oracle["selection_share"] < 0.01 and plain["selection_share"] == 0
  assert oracle["bundles"] <= 1.03 * plain["bundles"]
  assert oracle["vmem_bytes"] - plain["vmem_bytes"] >= 4 * 5 * 512 * 512      # the block maxima


@needs_libtpu
def test_a_compiler_error_is_passed_on():
  with pytest.raises(RuntimeError, match="nowhere"):
    tpu_static.dump("nowhere", len, []).__enter__()


def test_kernels_are_found_in_a_dump(tmp_path):
  """Under loops and outside, with the compiler's numbers; never one whose name ends alike."""
  for name in ("transpose_jvp_attention_backward__.1", "oracle_attention_forward.1",
               "sparse_part.2", "sparse_part.3"):
    (tmp_path / f"17-{name}-72-final_bundles.txt").touch()
    (tmp_path / f"17-{name}-71-schedule-analysis_final_bundles.txt").touch()
  found = lambda name: pathlib.Path(
    tpu_static._dumped(tmp_path, name, "final_bundles.txt")).name.split("-")[1]
  assert found("attention_backward") == "transpose_jvp_attention_backward__.1"
  assert found("oracle_attention_forward") == "oracle_attention_forward.1"
  assert tpu_static.launches(tmp_path, "sparse") == ["sparse_part.2", "sparse_part.3"]
  assert found("sparse_part.3") == "sparse_part.3"
  with pytest.raises(RuntimeError, match="'attention_forward': the dump has 0 schedules"):
    found("attention_forward")
