"""Trains a model: the program around `hysparse_jax.training.loop.train`.

    python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny [--set a.b=v ...]
        [--mesh=data=2,fsdp=2,tensor=2]

Run it again with the same --workdir to go on where it stopped: after a kill, after a SIGTERM (which
saves, then exits with 0) or with a larger --set train.steps. The folder holds config.json,
metrics.jsonl, checkpoints/ and plots/.
"""

from absl import flags

from experiments import cli
from hysparse_jax.training.loop import train

for _flag in (cli.CONFIG, cli.SET, cli.WORKDIR, cli.MESH):
  flags.declare_key_flag(_flag)


def main(argv):
  """Entry point."""
  del argv
  train(cli.load_config(), cli.WORKDIR.value)


if __name__ == "__main__":
  cli.run(main, needs_stdout=False)
