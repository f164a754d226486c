"""What is wrong with the input or the machine is one line on stderr and exit code 2."""

import errno
import json
import os
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import account, cli, compile_tpu, evaluate, generate, quickstart, train
from experiments.bench import kernels
from hysparse_jax import config
from hysparse_jax.errors import UserError
from hysparse_jax.inference.load import Run


def call(monkeypatch, capsys, program, *arguments):
  """(exit code, stdout, stderr) of a program run in this process."""
  monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
    cli.run(program.main)
  flags.FLAGS.unparse_flags()
  flags.FLAGS.mark_as_parsed()
  out = capsys.readouterr()
  return exit_.value.code or 0, out.out, out.err


TINY = "--config=configs/tiny.py"
BAD_FLAGS = {
  "evaluate_set": (evaluate, ["--set=model.window=3"], "does not use --set"),
  "evaluate_config": (evaluate, [TINY], "does not use --config"),
  "train_prompt": (train, ["--prompt=a"], "does not use --prompt"),
  "quickstart_tasks": (quickstart, ["--tasks=needle"], "does not use --tasks"),
  "account_mesh": (account, [TINY, "--mesh=data=2"], "does not use --mesh"),
  "unused_by_task": (evaluate, ["--tasks=heldout", "--samples=3"],
                     "--samples is not used by --tasks=heldout"),
  "tasks_empty": (evaluate, ["--tasks=", "--workdir=x"], "--tasks is empty; give some of heldout"),
  "lengths_empty": (evaluate, ["--lengths="], "--lengths is empty"),
  "step_empty": (compile_tpu, [TINY, "--step="], "--step is empty"),
  "mesh_empty": (train, [TINY, "--mesh=", "--workdir=x"], "--mesh is empty"),
  "address_workdir": (train, [TINY, "--workdir=gs://bucket/run"], "this is an address"),
  "address_config": (train, ["--config=gs://bucket/tiny.py"], "this is an address"),
  "address_source": (train, [TINY, "--set=data.source=s3://a/b"], "data.source is 's3://a/b'"),
  "address_tokenizer": (train, [TINY, "--set=data.tokenizer=hf://a"], "data.tokenizer is 'hf://a'"),
  "source_empty": (train, [TINY, "--set=data.source="], "data.source is ''; give a path"),
  "seed": (train, [TINY, f"--set=train.seed={2**63}"], "at most 63 bits"),
  "seed_negative": (train, [TINY, "--set=data.seed=-1"], "DataConfig.seed is -1"),
  "infinite": (train, [TINY, "--set=optim.lr=1e999"], "OptimConfig.lr is inf"),
  "no_literal": (account, [TINY, "--set=model.window={[]: 1}"], "expected int, got str"),
  "deep_literal": (account, [TINY, "--set=model.window=" + "(" * 9000], "expected int, got str"),
  "implementation": (account, [TINY, "--set=model.implementation=refrence"],
                     "implementation is 'refrence'; allowed: None, 'reference'"),
  "picture_folder": (account, [TINY, "--picture=/tmp"], "this is a folder, a pipe or a device"),
  "huge": (account, [TINY, f"--tokens={10**400}"], "too large"),
}


@pytest.mark.parametrize("program, arguments, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(program, arguments, message, monkeypatch, capsys):
  code, out, err = call(monkeypatch, capsys, program, *arguments)
  assert code == 2 and out == ""
  assert message in err and err.count("\n") == 1 and err.startswith("error: ")


RAISING = {
  "full_disk": (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
  "named": (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
  "memory": (MemoryError(), 2, "too large for this machine (MemoryError"),
  "overflow": (OverflowError("int too large"), 2, "OverflowError: int too large"),
  "device": (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile\ntrying"), 2,
             "out of device memory"),
  "implementation": (NotImplementedError("op: implementation='x'"), 2, "implementation='x'"),
  "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize("error, code, message", RAISING.values(), ids=RAISING)
def test_what_a_program_raises(error, code, message, monkeypatch, capsys):
  def fails():
    raise error

  monkeypatch.setattr(cli, "load_config", fails)
  got, out, err = call(monkeypatch, capsys, account, TINY)
  assert got == code and out == ""
  assert message in err and err.count("\n") == 1


def test_an_error_of_the_program_itself_is_no_line(monkeypatch, capsys):
  def fails():
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  monkeypatch.setattr(cli, "load_config", fails)
  monkeypatch.setattr(sys, "argv", ["account", TINY])
  with flagsaver.flagsaver(), pytest.raises(RuntimeError, match="a bug"):
    cli.run(account.main)


@pytest.mark.parametrize("program, some", [
  (account, ["config", "set", "tokens", "picture"]), (train, ["config", "workdir", "mesh"]),
  (evaluate, ["workdir", "tasks", "lengths", "dtype"]), (generate, ["prompt", "seed", "stream"])])
def test_help_lists_the_flags_of_the_program(program, some, monkeypatch, capsys):
  code, out, err = call(monkeypatch, capsys, program, "--help")
  assert code == 0 and err == ""
  assert all(f"{name}=" in out or f"[no]{name}" in out for name in some)
  assert out.startswith(program.__doc__.strip()[:40])
  assert "--prompt" not in out.split("Flags:")[1] or program is generate


def test_home_is_expanded_in_every_path_flag(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").write_text("from hysparse_jax.config import Config\n"
                                    "get_config = Config\n")
  code, out, err = call(monkeypatch, capsys, account, "--config=~/mine.py", "--picture=~/x.png",
                        "--json")
  assert (code, err) == (0, "") and json.loads(out)["params"] > 0
  assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
  assert config.load("~/mine.py") == config.Config()
  code, _, err = call(monkeypatch, capsys, generate, "--prompt=a", "--workdir=~/nothing")
  assert code == 2 and f"{tmp_path}/nothing holds no run" in err


RAISING_CONFIGS = {
  "import": ("import nothing_of_this_name\n", ", line 1: ModuleNotFoundError"),
  "divides": ("\ndef get_config(arg=None):\n  return 1 // 0\n", ", line 3: ZeroDivisionError"),
  "key": ("def get_config(arg=None):\n  return {}[arg]\n", ", line 2: KeyError"),
  "exits": ("raise SystemExit('no\\nway')\n", "SystemExit: no way"),
  "not_utf8": (b"x = '\xff'\n", "SyntaxError"),
}


@pytest.mark.parametrize("text, message", RAISING_CONFIGS.values(), ids=RAISING_CONFIGS)
def test_a_config_file_that_raises(text, message, tmp_path):
  path = tmp_path / "mine.py"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError) as caught:
    config.load(str(path))
  assert message in str(caught.value) and "\n" not in str(caught.value)
  assert str(path) in str(caught.value)


def test_a_pipe_that_nobody_reads_is_refused(tmp_path, monkeypatch, capsys):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  for program, flag in ((account, "picture"), (kernels, "append")):
    code, out, err = call(monkeypatch, capsys, program, f"--{flag}={pipe}")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and "this is a folder, a pipe or a device" in err
    assert pipe.is_fifo()


def test_the_account_outlives_its_picture(tmp_path, monkeypatch, capsys):
  (tmp_path / "file").write_text("in the way")
  code, out, err = call(monkeypatch, capsys, account, TINY, f"--picture={tmp_path}/file/x.png")
  assert code == 0 and "parameters by group" in out
  assert err.startswith("warning: no pictures: ") and err.count("\n") == 1


def test_the_quickstart_outlives_its_pictures(tmp_path, monkeypatch, capsys):
  """What it trains, loads and evaluates is replaced; the folder of the pictures is a file."""
  (tmp_path / "plots").write_text("in the way")
  figures = {"bits_per_byte": 2.0, "tokens_per_second": 1.0, "preempted": False}
  for name, value in {
      "train": figures, "load_run": Run(None, None, None, 1), "generate_text": "a sample",
      "evaluate": [], "_unigram_bits": 4.5}.items():
    monkeypatch.setattr(quickstart, name, lambda *_, value=value, **__: value)
  monkeypatch.setattr(quickstart.metrics, "read", lambda _: [{"step": 1, "loss": 1.0}])
  code, out, err = call(monkeypatch, capsys, quickstart, f"--workdir={tmp_path}")
  assert code == 0 and "a sample" in out and "s in all. Next:" in out
  assert err.startswith("warning: no pictures: ") and err.count("\n") == 1


def test_json_has_no_nan():
  row = {"a": float("nan"), "b": [1.0, float("inf"), (2, float("-inf"))], "c": {"d": "NaN"}}
  assert json.loads(cli.to_json(row), parse_constant=pytest.fail) == {
    "a": None, "b": [1.0, None, [2, None]], "c": {"d": "NaN"}}


def test_stdout_that_cannot_be_written_to():
  """A full disk, a closed pipe and a closed stdout, of real processes."""
  script = f"""
    run() {{ {sys.executable} -m experiments.account {TINY}; }}
    run > /dev/full; echo $? >&2
    run >&-; echo $? >&2
    {{ sleep 5; run; echo $? >&2; }} | true
  """
  done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
  assert done.stderr.splitlines() == [
    "error: No space left on device", "2",
    "error: stdout is closed; send it to a file, or to /dev/null", "2",
    "error: Broken pipe", "2"]


def test_compiled_programs_are_kept(tmp_path, monkeypatch):
  """Unless JAX_COMPILATION_CACHE_DIR says otherwise, in the user's cache."""
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  cli._keep_compiled_programs()
  assert jax.config.jax_compilation_cache_dir == before        # conftest.py set the variable
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  try:
    cli._keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "hysparse_jax" / "xla")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  assert os.listdir(tmp_path / "hysparse_jax") == ["xla"]
