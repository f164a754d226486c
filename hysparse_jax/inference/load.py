"""Opens a trained run."""

import dataclasses
import pathlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hysparse_jax import config, sharding
from hysparse_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from hysparse_jax.errors import UserError
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.training import console, run
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints

# Weights that the model uses in float32: norms, sinks, routers. All others, gates included, are
# rounded to the compute dtype before use.
FLOAT32 = ("norm", "sinks", "router")


class Run(NamedTuple):
  """A trained model and what belongs to it."""

  cfg: config.Config
  model: Transformer
  tokenizer: ByteTokenizer | HuggingFaceTokenizer
  step: int                                         # training steps behind the weights


def load_run(workdir, step: int | None = None, mesh: jax.sharding.Mesh | None = None,
             dtype: Literal["float32", "bfloat16"] | None = None) -> Run:
  """The newest good checkpoint of a run, or that of a step.

  Only the weights are read, and only they are verified: no optimizer moments.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None: the newest good one.
    mesh: that the weights are split over, whatever mesh they were trained on (`sharding.make_mesh`
      makes one); None: the first device.
    dtype: of the weights; None: float32. "bfloat16" halves them. Norms, sinks and routers stay
      float32, and a model that computes in bfloat16 gives the same logits, bit for bit.

  Raises:
    UserError: no run there, no checkpoint that verifies, a config.json or tokenizer that is not the
      one that the checkpoint was trained with, or a dtype or mesh that does not fit.
  """
  if dtype not in (None, "float32", "bfloat16"):
    raise UserError(f"dtype is {dtype!r}; allowed: 'float32', 'bfloat16', None")
  folder = pathlib.Path(workdir or "").expanduser()
  if not workdir or not (folder / "checkpoints").is_dir():
    run.read_config(workdir)      # says what is missing
  if mesh is None:
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1])
  with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
    cfg = run.saved_config(folder, checkpoints.extra(step))
    sharding.check_divisible(cfg, mesh, rows=False)
    state, extra, step = checkpoints.restore({"model": train_step.abstract_model(cfg, mesh)}, step,
                                             partial=True, report=console.warn)
  cfg = dataclasses.replace(cfg, data=run.own_data(folder, cfg.data))
  tokenizer = load_tokenizer(cfg.data)
  if "data" in extra:
    run.check_tokenizer(tokenizer.fingerprint, extra["data"]["tokenizer"])
  model = state["model"] if dtype is None else with_dtype(state.pop("model"), dtype)
  return Run(cfg, model, tokenizer, step)


def with_dtype(model: Transformer, dtype: str) -> Transformer:
  """The model with its weights rounded to `dtype`, but for those that it uses in float32."""
  def rounded(path, leaf):
    value = leaf.get_value()
    last = [str(getattr(key, "name", getattr(key, "key", key))) for key in path][-1]
    keep = any(word in last for word in FLOAT32)
    return leaf.replace(value if keep else value.astype(jnp.dtype(dtype)))

  return jax.tree_util.tree_map_with_path(
    rounded, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
