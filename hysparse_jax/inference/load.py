"""Opens a trained run."""

import pathlib
from typing import NamedTuple

import jax

from hysparse_jax import config, sharding
from hysparse_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.training import run
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints


class Run(NamedTuple):
  """A trained model and what belongs to it."""

  cfg: config.Config
  model: Transformer                                # float32 weights
  tokenizer: ByteTokenizer | HuggingFaceTokenizer
  step: int                                         # training steps behind the weights


def load_run(workdir, step: int | None = None) -> Run:
  """The newest good checkpoint of a run, or that of a step, on the first device.

  Only the weights are read, and only they are verified: no optimizer moments.

  Raises:
    UserError: no run there, or no checkpoint that verifies.
  """
  cfg = run.read_config(workdir)
  mesh = sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1])
  with Checkpoints(pathlib.Path(workdir) / "checkpoints", read_only=True) as checkpoints:
    state, _, step = checkpoints.restore({"model": train_step.abstract_model(cfg, mesh)}, step,
                                         partial=True, report=run.warn)
  return Run(cfg, state["model"], load_tokenizer(cfg.data), step)
