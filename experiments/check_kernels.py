"""`python -m experiments.check_kernels` is `python -m experiments.bench.check`."""

from experiments import cli
from experiments.bench import check

if __name__ == "__main__":
  cli.run(check.main)
