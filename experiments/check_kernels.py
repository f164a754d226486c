"""`python -m experiments.check_kernels` is `python -m experiments.bench.check`."""

from . import cli
from .bench import check

if __name__ == "__main__":
  cli.run(check.main)
