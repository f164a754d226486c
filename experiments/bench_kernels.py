"""`python -m experiments.bench_kernels` is `python -m experiments.bench.kernels`."""

from experiments import cli
from experiments.bench import kernels

if __name__ == "__main__":
  cli.run(kernels.main)
