"""HySparse: hybrid sparse attention with oracle block selection and KV sharing, in JAX.

The public face. A name is imported when it is first used, so that `import hysparse_jax` itself
takes no time and starts no backend.

    import hysparse_jax as hs
    cfg = hs.load_config("tiny", "model.window=64")     a file, or the name of a packaged config
    hs.train(cfg, "runs/tiny")                          from a script, a notebook or a thread
    run = hs.load_run("runs/tiny")                      run.cfg, run.model, run.tokenizer, run.step
    text = hs.generate_text(run.model, run.tokenizer, "def main(", 200)
    engine = hs.Engine(run.model, slots=8, max_tokens=4096)     many hs.Request at a time
    _, layers = hs.trace(run.model, tokens)             selections, gates, coverage of every layer
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
  from hysparse_jax.config import Config
  from hysparse_jax.config import load as load_config
  from hysparse_jax.errors import UserError
  from hysparse_jax.evals.oracle import trace
  from hysparse_jax.inference.engine import Engine
  from hysparse_jax.inference.load import load_run
  from hysparse_jax.inference.requests import Request
  from hysparse_jax.inference.sampling import generate, generate_text
  from hysparse_jax.model.transformer import Transformer
  from hysparse_jax.training.loop import train

__all__ = ["Config", "Engine", "Request", "Transformer", "UserError", "__version__", "generate",
           "generate_text", "load_config", "load_run", "trace", "train"]

_FROM = {
  "Config": ("config", "Config"),
  "Engine": ("inference.engine", "Engine"),
  "Request": ("inference.requests", "Request"),
  "Transformer": ("model.transformer", "Transformer"),
  "UserError": ("errors", "UserError"),
  "generate": ("inference.sampling", "generate"),
  "generate_text": ("inference.sampling", "generate_text"),
  "load_config": ("config", "load"),
  "load_run": ("inference.load", "load_run"),
  "trace": ("evals.oracle", "trace"),
  "train": ("training.loop", "train"),
}


def __getattr__(name):
  if name not in _FROM:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, attribute = _FROM[name]
  value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
  return value


def __dir__():
  return sorted({*globals(), *__all__})
