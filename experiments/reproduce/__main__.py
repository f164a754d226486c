"""`python -m experiments.reproduce`: see `experiments/reproduce/run.py`."""

from experiments import cli
from experiments.reproduce import run

if __name__ == "__main__":
  cli.run(run.main)
