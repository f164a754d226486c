"""Trains a model: the program around `hysparse_jax.training.loop.train`.

    python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny [--set a.b=v ...]
        [--mesh=data=2,fsdp=2,tensor=2]

Run it again with the same --workdir to go on where it stopped: after a kill, after a SIGTERM (which
saves, then exits with 0), after Ctrl-C (which saves, then exits with 130; a second one does not
wait), or with a larger --set train.steps. A signal that would lose nothing, as before the first
step, ends the program at once with 143 or 130. The folder holds config.json, metrics.jsonl,
checkpoints/ and plots/.
"""

if __name__ == "__main__":       # before the slow imports: signals come at any time
  from hysparse_jax.training import signals
  signals.install()

from absl import flags  # noqa: E402

from hysparse_jax.training.loop import train  # noqa: E402

from . import cli  # noqa: E402

for _flag in (cli.CONFIG, cli.SET, cli.WORKDIR, cli.MESH):
  flags.declare_key_flag(_flag)


def main(argv):
  """Entry point."""
  del argv
  train(cli.load_config(), cli.WORKDIR.value)


if __name__ == "__main__":
  cli.run(main, needs_stdout=False)
