"""Importing the packages builds no array: one would start a backend, and jitted programs that
close over it take it as a hidden argument."""

import importlib
import pkgutil

import jax
import pytest

import hysparse_jax
import pallas_kernels


def modules(package):
  return [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]


@pytest.mark.parametrize("name", modules(pallas_kernels) + modules(hysparse_jax))
def test_no_array_at_module_level(name):
  try:
    module = importlib.import_module(name)
  except ImportError as error:         # jax-triton asks for a GPU when it is imported
    pytest.skip(str(error))
  held = [key for key, value in vars(module).items() if isinstance(value, jax.Array)]
  assert not held, f"{name}: {held}; make them NumPy's"
