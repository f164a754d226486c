"""`python -m experiments.reproduce`: see `experiments/reproduce/run.py`."""

from .. import cli
from . import run

if __name__ == "__main__":
  cli.run(run.main)
