"""`python -m experiments.bench_step` is `python -m experiments.bench.steps`."""

from . import cli
from .bench import steps

if __name__ == "__main__":
  cli.run(steps.main)
