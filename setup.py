"""The packages of the wheel, found rather than listed; all else is in pyproject.toml.

`experiments/` and `configs/` become `hysparse_jax.experiments` and `hysparse_jax.configs`: names as
general as theirs at the top of site-packages would hide, or be hidden by, a user's own folders.
"""

from setuptools import find_namespace_packages, find_packages, setup

MOVED = ("configs", "experiments")
moved = find_namespace_packages(include=[f"{name}{rest}" for name in MOVED for rest in ("", ".*")],
                                exclude=["experiments.results*"])

setup(
  packages=find_packages(include=["hysparse_jax*", "pallas_kernels*"])
  + [f"hysparse_jax.{name}" for name in moved],
  package_dir={f"hysparse_jax.{name}": name for name in MOVED})
