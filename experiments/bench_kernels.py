"""`python -m experiments.bench_kernels` is `python -m experiments.bench.kernels`."""

from . import cli
from .bench import kernels

if __name__ == "__main__":
  cli.run(kernels.main)
