"""How `implementation=` chooses."""

import functools

import jax
import pytest

from hysparse_jax import config
from hysparse_jax.errors import UserError
from hysparse_jax.training import loop
from pallas_kernels import implementations
from pallas_kernels.block_sparse_attention import api as block_sparse
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.oracle_attention import api as oracle
from pallas_kernels.sliding_window_attention import api as sliding_window
from pallas_kernels.sparse_layer_attention import api as sparse_layer
from tests.test_configs import REPO


def small(x):
  if x > 1:
    raise NotCoveredError(f"small: got {x}, want at most 1")
  return "small"


def broken(x):
  raise NotImplementedError("a private function is gone")


AVAILABLE = {"small": small, "broken": broken, "reference": lambda x: "reference"}


def test_a_named_one_runs_or_raises():
  assert implementations.pick("op", "small", AVAILABLE, {})(1) == "small"
  with pytest.raises(NotImplementedError, match="got 2"):
    implementations.pick("op", "small", AVAILABLE, {})(2)
  with pytest.raises(NotImplementedError, match="implementation='other' does not exist"):
    implementations.pick("op", "other", AVAILABLE, {})


def test_none_takes_the_first_that_covers_and_says_once_why(monkeypatch):
  said = []
  monkeypatch.setattr(implementations.logging, "warning", lambda *args: said.append(args[-1]))
  platform = {jax.default_backend(): ("small",)}
  pick = implementations.pick("op", None, AVAILABLE, platform, tokens=2048)
  assert pick(1) == "small" and not said
  assert pick(2) == "reference" and pick(2) == "reference"
  assert said == ["small: got 2, want at most 1. Running implementation='reference' of op instead"]


def test_long_rows_never_take_the_reference_unasked(monkeypatch):
  monkeypatch.setattr(implementations.logging, "warning", lambda *args: None)
  platform = {jax.default_backend(): ("small",)}
  pick = implementations.pick("op", None, AVAILABLE, platform, tokens=2049)
  assert pick(1) == "small"
  with pytest.raises(NotImplementedError, match="small: got 2, want at most 1.* rows of 2049 tokens"
                     ".*at most 2048.*implementation='reference'") as error:
    pick(2)
  assert "\n" not in str(error.value) and not isinstance(error.value, NotCoveredError)
  # Asked for, on a platform without kernels, or of linear cost, the reference runs.
  assert implementations.pick("op", "reference", AVAILABLE, platform, tokens=2049)(2) == "reference"
  assert implementations.pick("op", None, AVAILABLE, {}, tokens=2049)(2) == "reference"
  assert implementations.pick("op", None, AVAILABLE, platform)(2) == "reference"


def test_every_op_gives_its_row_length(monkeypatch):
  """Each public op, refused by its kernel: 2,048 tokens run and 2,049 do not."""
  def refuse(target):
    def call(*args, **options):
      raise NotCoveredError("kernel: got this, want that")
    return call

  monkeypatch.setattr(implementations, "platform", lambda: "gpu")
  monkeypatch.setattr(implementations, "_check_device", lambda op, name: None)
  for module in (block_sparse, oracle, sliding_window, sparse_layer):
    monkeypatch.setattr(module, "_AVAILABLE", module._AVAILABLE | {
      name: refuse(name) for name in module._BY_PLATFORM["gpu"]})
  monkeypatch.setattr(block_sparse, "_PLANS", block_sparse._PLANS | {
    name: refuse(name) for name in block_sparse._BY_PLATFORM["gpu"]})

  def calls(tokens):
    q = jax.ShapeDtypeStruct((1, tokens, 2, 16), "float32")
    picked = jax.ShapeDtypeStruct((1, 2, tokens, 1), "int32")
    return [functools.partial(jax.eval_shape, *call) for call in (
      (oracle.oracle_attention, q, q, q), (sliding_window.sliding_window_attention, q, q, q),
      (block_sparse.block_sparse_attention, q, q, q, picked),
      (sparse_layer.sparse_layer_attention, q, q, q, picked, q, q),
      (functools.partial(block_sparse.plan_blocks, num_heads=2), picked))]

  for call in calls(2048):
    call()
  for call in calls(2049):
    with pytest.raises(NotImplementedError, match="rows of 2049 tokens are too long"):
      call()


def test_a_record_names_what_ran():
  with implementations.recorded() as names:
    implementations.pick("a", "small", AVAILABLE, {})(1)
    implementations.pick("b", None, AVAILABLE, {})(1)
    implementations.pick("a", None, AVAILABLE, {})(1)
    implementations.pick("a", "small", AVAILABLE, {})(1)
  assert names == {"a": ["small", "reference"], "b": ["reference"]}
  implementations.pick("c", None, AVAILABLE, {})(1)
  assert "c" not in names


def test_the_platform_is_the_meshs_or_the_default_devices():
  assert implementations.platform() == jax.default_backend()
  with jax.default_device("tpu"):
    assert implementations.platform() == "tpu"
  with jax.default_device(jax.devices("cpu")[1]):
    assert implementations.platform() == "cpu"
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=jax.sharding.AbstractDevice(
    device_kind="TPU v5", num_cores=1, platform="tpu"))
  with jax.default_device(jax.devices("cpu")[1]), jax.sharding.use_abstract_mesh(mesh):
    assert implementations.platform() == "tpu"


def test_a_broken_kernel_is_not_passed_over():
  platform = {jax.default_backend(): ("broken",)}
  with pytest.raises(NotImplementedError, match="private function is gone"):
    implementations.pick("op", None, AVAILABLE, platform)(1)


def test_mosaic_gpu_is_for_hopper(monkeypatch):
  monkeypatch.setattr(implementations.logging, "warning", lambda *args: None)
  available = AVAILABLE | {"mosaic_gpu": lambda x: "mosaic_gpu"}
  platform = {jax.default_backend(): ("mosaic_gpu",)}
  assert implementations.pick("op", None, available, platform)(0) == "reference"
  device = type("Device", (), {"compute_capability": "9.0"})
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert implementations.pick("op", None, available, platform)(0) == "mosaic_gpu"


def test_sizes_that_a_named_implementation_does_not_take_end_a_run_in_one_line():
  cfg = config.load(str(REPO / "configs" / "debug.py"))
  assert "oracle_attention reference" in loop._implementations(cfg)
  with pytest.raises(UserError, match="oracle_attention mosaic_gpu: dtypes=.'float32'.; wanted"):
    loop._implementations(config.override(cfg, "model.implementation=mosaic_gpu"))
