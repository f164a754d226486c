"""Serves a run's newest good checkpoint over HTTP, to clients of OpenAI's completions.

    python -m experiments.serve --workdir=runs/tiny [--host=127.0.0.1] [--port=8000] [--step=200]
        [--mesh=tensor=2] [--dtype=bfloat16] [--slots=8] [--max_tokens=4096] [--chunk=2048]
        [--num_pages=512 | --memory_gb=40] [--queue=64] [--seconds=600] [--body_mb=4] [--grace=30]

    curl http://127.0.0.1:8000/v1/completions -d '{"model": "tiny", "prompt": "def main("}'

The model's name is the folder's. Needs `pip install hysparse-jax[serve]`. There are no keys and no
TLS: beyond this machine put a proxy in front. SIGTERM and Ctrl-C refuse new requests and give those
that are there --grace seconds; then the program exits with 0.
"""

import math
import pathlib
import signal
import time

from absl import flags

from hysparse_jax.errors import UserError
from hysparse_jax.inference.engine import Engine
from hysparse_jax.inference.load import load_run
from hysparse_jax.inference.worker import Worker, warm_up

from .. import cli

for _flag in (cli.WORKDIR, cli.MESH, cli.DTYPE):
  flags.declare_key_flag(_flag)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all.")
_PORT = flags.DEFINE_integer("port", 8000, "To listen on; 0: a free one.", 0, 65535)
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default: the newest good one.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Requests that run together.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 4096, "Of a request, prompt and new ones.")
_CHUNK = flags.DEFINE_integer("chunk", None, "Tokens that prefill takes at once; default: the "
                                             "platform's.")
_NUM_PAGES = flags.DEFINE_integer("num_pages", None, "Of the KV cache; default: max_tokens in "
                                                     "every slot.")
_MEMORY_GB = flags.DEFINE_float("memory_gb", None, "Of the KV cache, instead of --num_pages.")
_QUEUE = flags.DEFINE_integer("queue", 64, "Requests that can wait for a slot.", 0)
_SECONDS = flags.DEFINE_float("seconds", 600, "That a request can take.", 0)
_BODY_MB = flags.DEFINE_float("body_mb", 4, "Size of a request's body at most.", 0)
_GRACE = flags.DEFINE_float("grace", 30, "Seconds for what is running when a signal comes.", 0)


def main(argv):
  """Entry point."""
  del argv
  try:
    import uvicorn

    from .app import Limits, Server, bound
  except ImportError as error:
    raise UserError(f"{error.name} is missing; pip install hysparse-jax[serve]") from error
  if not cli.WORKDIR.value:
    raise UserError("--workdir is missing; name the folder of a run, such as runs/tiny")
  for flag in (_MEMORY_GB, _SECONDS, _BODY_MB, _GRACE):
    if not math.isfinite(flag.value or 0):
      raise UserError(f"--{flag.name} is {flag.value}; give a finite number")
  listener = bound(_HOST.value, _PORT.value)       # fails before the model is loaded
  _, model, tokenizer, step = load_run(cli.WORKDIR.value, _STEP.value, **cli.load_options())
  memory = None if _MEMORY_GB.value is None else int(_MEMORY_GB.value * 1e9)
  engine = Engine(model, slots=_SLOTS.value, max_tokens=_MAX_TOKENS.value,
                  num_pages=_NUM_PAGES.value, memory_bytes=memory, chunk=_CHUNK.value,
                  tokenizer=tokenizer)
  del model                       # on a GPU the engine has a copy
  print("warming up: compiles the programs that prompts of any length need", flush=True)
  start = time.monotonic()
  prompts = warm_up(engine)
  print(f"warmed up with {prompts} prompts of up to {_MAX_TOKENS.value:,} tokens, "
        f"{time.monotonic() - start:.1f} s", flush=True)

  class Program(uvicorn.Server):
    """Ends by a signal, or when the engine fails."""

    def handle_exit(self, sig, frame):
      worker.drain(_GRACE.value)
      super().handle_exit(sig, frame)

    def end(self):
      self.should_exit = True

  worker = Worker(engine, _QUEUE.value, on_failure=lambda: program.end())
  name = pathlib.Path(cli.WORKDIR.value).resolve().name
  server = Server(worker, tokenizer, name,
                  Limits(int(_BODY_MB.value * 1e6), _SECONDS.value))
  program = Program(uvicorn.Config(
    server.app, lifespan="off", log_level="warning", access_log=False,
    timeout_graceful_shutdown=int(_GRACE.value) + 10))
  # For those before uvicorn's own handlers; and after them: it raises again what it got.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: program.end())
  host, port = listener.getsockname()[:2]
  print(f"serving {name}, step {step}, at http://{f'[{host}]' if ':' in host else host}:{port}"
        "/v1", flush=True)
  program.run(sockets=[listener])
  worker.stop()
  if worker.error is not None:
    raise worker.error


if __name__ == "__main__":
  cli.run(main)
