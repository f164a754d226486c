"""How `implementation=` chooses."""

import jax
import pytest

from pallas_kernels import implementations
from pallas_kernels.checks import NotCoveredError


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
  pick = implementations.pick("op", None, AVAILABLE, platform)
  assert pick(1) == "small" and not said
  assert pick(2) == "reference" and pick(2) == "reference"
  assert said == ["small: got 2, want at most 1. Not running implementation='small' of op"]


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
