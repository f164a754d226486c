"""Continues a prompt with the newest good checkpoint of a run, showing the text as it comes.

    python -m experiments.generate --workdir=runs/tiny --prompt="def main("
        [--max_tokens=200] [--temperature=0.8] [--top_k=40] [--top_p=0.95] [--seed=1]
        [--stop="\\n\\n"] [--nostream] [--json] [--mesh=tensor=2] [--dtype=bfloat16]

The same from Python:

    from hysparse_jax.inference.load import load_run
    from hysparse_jax.inference.sampling import generate_text

    run = load_run("runs/tiny")
    print(generate_text(run.model, run.tokenizer, "def main(", 200, temperature=0.8, seed=1))
"""

from absl import flags
from rich.console import Console

from hysparse_jax.errors import UserError
from hysparse_jax.inference.load import load_run
from hysparse_jax.inference.sampling import generate_text

from . import cli

for _flag in (cli.WORKDIR, cli.MESH, cli.DTYPE, cli.JSON):
  flags.declare_key_flag(_flag)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "Tokens to add at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the fewest most likely tokens that reach this "
                                          "probability together.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws: the same seed gives the same text.")
_STOP = flags.DEFINE_string("stop", None, "End before this text; \\n and \\t are understood.")
_STREAM = flags.DEFINE_bool("stream", True, "Show the text as it comes.")


def main(argv):
  """Entry point."""
  del argv
  if not _PROMPT.value:
    raise UserError("the prompt is empty; give at least one character with --prompt")
  workdir = cli.WORKDIR.value
  if not workdir:
    raise UserError("--workdir is missing; name the folder of a run, such as runs/tiny")
  stop = _STOP.value
  if stop is not None:
    stop = stop.replace("\\n", "\n").replace("\\t", "\t")
  _, model, tokenizer, step = load_run(workdir, **cli.load_options())

  console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
  streams = _STREAM.value and not cli.JSON.value
  write = lambda text: print(text, end="", flush=True)
  if not cli.JSON.value:
    console.print("--- prompt", style="dim")
    console.print(_PROMPT.value, style="bold")
    console.print(f"--- continued by step {step}", style="dim")
  text = generate_text(model, tokenizer, _PROMPT.value, _MAX_TOKENS.value, stop=stop,
                       on_text=write if streams else None, temperature=_TEMPERATURE.value,
                       top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value)
  if cli.JSON.value:
    print(cli.to_json({"step": step, "prompt": _PROMPT.value, "text": text}))
  else:
    print("" if streams else text)


if __name__ == "__main__":
  cli.run(main)
