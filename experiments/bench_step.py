"""`python -m experiments.bench_step` is `python -m experiments.bench.steps`."""

from experiments import cli
from experiments.bench import steps

if __name__ == "__main__":
  cli.run(steps.main)
