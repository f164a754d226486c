"""Opens a trained run."""

import pathlib

import jax

from hysparse_jax import config, sharding
from hysparse_jax.data import batches as data
from hysparse_jax.training import run
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints


def load_run(workdir, step: int | None = None):
  """The newest good checkpoint of a run, or that of a step, on the first device.

  Returns:
    (Config, Transformer, tokenizer, step).

  Raises:
    UserError: no run there, or no checkpoint that verifies.
  """
  cfg = run.read_config(workdir)
  mesh = sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1])
  program = train_step.build(cfg, mesh)
  with Checkpoints(pathlib.Path(workdir) / "checkpoints", read_only=True) as checkpoints:
    state, _, step = checkpoints.restore(program.abstract_state, step, report=run.warn)
  return cfg, state.model, data.load_tokenizer(cfg.data), step
