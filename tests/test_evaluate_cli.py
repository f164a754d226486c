"""The programs `experiments.evaluate` and `experiments.generate` on a run that is never trained."""

import json
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cli, evaluate, generate
from hysparse_jax import plots
from hysparse_jax.config import Config, DataConfig, ModelConfig
from hysparse_jax.data.tokenizer import ByteTokenizer
from hysparse_jax.inference.load import Run
from hysparse_jax.inference.sampling import generate_text
from hysparse_jax.tasks import token_tasks
from tests.weights import drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """What `load_run` returns for a fresh debug-sized model on a small corpus of its own."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for number in range(12):
    words = rng.choice(["alpha", "beta", "gamma", "delta"], 60)
    (folder / f"{number}.txt").write_text(" ".join(words))
  cfg = Config(
    model=ModelConfig(num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
                      sparse_per_full=1, block_size=8, selected_tokens=16, window=8,
                      dtype="float32"),
    data=DataConfig(source=str(folder), seq_len=64, batch_size=2, heldout_fraction=0.4))
  model = drawn(cfg.model)
  return Run(cfg, model, ByteTokenizer(), 7)


def _call(program, monkeypatch, capsys, *arguments, run=None):
  """(exit code, stdout, stderr) of one program with these flags."""
  monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
  if run is not None:
    monkeypatch.setattr(program, "load_run", lambda workdir: run)
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
    cli.run(program.main)
  flags.FLAGS.unparse_flags()
  flags.FLAGS.mark_as_parsed()
  out = capsys.readouterr()
  return exit_.value.code, out.out, out.err


def test_evaluate_prints_one_object_per_task(run, tmp_path, monkeypatch, capsys):
  code, out, err = _call(
    evaluate, monkeypatch, capsys, f"--workdir={tmp_path}", "--json", "--batches=2",
    "--lengths=40,56", "--depths=0.5", "--samples=1", run=run)
  assert code in (0, None), err
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["task"] for row in rows] == ["heldout", "needle", "oracle"]
  assert all(row["step"] == 7 for row in rows)
  heldout, needle, oracle = rows
  assert 4.5 < heldout["loss"] < 7.5       # untrained: about log(256) = 5.5
  np.testing.assert_allclose(heldout["bits_per_byte"], heldout["loss"] / np.log(2), rtol=1e-6)
  assert sum(bucket["tokens"] for bucket in heldout["by_position"]) == heldout["tokens"] > 0
  assert needle["lengths"] == [40, 56] and np.shape(needle["accuracy"]) == (1, 2)
  assert [layer["layer"] for layer in oracle["layers"]] == [0, 1, 2]
  assert oracle["layers"][0]["overlap"]["picked"] == 2.0
  assert 0 < oracle["coverage_by_distance"]["1"] < 1
  for name in ("needle", "needle_tokens", "oracle_coverage", "oracle_blocks", "oracle_overlap"):
    assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_prints_tables(run, tmp_path, monkeypatch, capsys):
  code, out, _ = _call(evaluate, monkeypatch, capsys, f"--workdir={tmp_path}", "--batches=2",
                       "--tasks=heldout,oracle", run=run)
  assert code in (0, None)
  assert "bits per byte" in out and "mass covered by layers since the full one: 0: 0." in out
  assert "needle" not in out


def test_evaluate_recall_tasks(run, tmp_path, monkeypatch, capsys):
  code, out, err = _call(evaluate, monkeypatch, capsys, f"--workdir={tmp_path}", "--json",
                         "--tasks=ruler,mqar", "--lengths=192", "--samples=1", run=run)
  assert code in (0, None), err
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["task"] for row in rows] == [*token_tasks.RULER, "mqar"]
  assert all(np.shape(row["recall"]) == (1,) and row["ids"] == {"first": 0, "size": 256}
             for row in rows)
  assert (tmp_path / "plots" / "recall.png").read_bytes().startswith(b"\x89PNG")
  assert np.shape(rows[-1]["by_depth"]) == (5, 1) and "by_depth" not in rows[9]
  code, out, err = _call(evaluate, monkeypatch, capsys, f"--workdir={tmp_path}", "--form=text",
                         "--tasks=qa_1_syn", "--lengths=600", "--samples=1", run=run)
  assert code in (0, None), err
  assert "qa_1_syn" in out and "answers generated greedily" in out


def test_recall_tasks_have_lengths_that_they_need(run, tmp_path, monkeypatch, capsys):
  """Rows of 64 tokens are too short for most tasks; the default lengths are not."""
  code, out, err = _call(evaluate, monkeypatch, capsys, f"--workdir={tmp_path}", "--json",
                         "--tasks=ruler", "--samples=1", run=run)
  assert code in (0, None), err
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["task"] for row in rows] == list(token_tasks.RULER)
  assert all(row["lengths"] == [192] for row in rows)


def test_results_outlive_their_pictures(run, tmp_path, monkeypatch, capsys):
  """The folder of the pictures cannot be made; an empty depth bin is null, not NaN."""
  (tmp_path / "plots").write_text("in the way")
  code, out, err = _call(evaluate, monkeypatch, capsys, f"--workdir={tmp_path}", "--json",
                         "--tasks=mqar", "--lengths=64", "--samples=1", run=run)
  assert code in (0, None)
  row = json.loads(out, parse_constant=pytest.fail)
  assert row["plots"] == [] and None in sum(row["by_depth"], [])
  assert err.startswith("warning: no pictures: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
  (["--tasks=qa_1", "--form=text"], "its synthetic stand-in is qa_1_syn"),
  (["--tasks=cwe", "--lengths=100"], "cwe needs at least 158 tokens, got length 100"),
  (["--tasks=qa_2_syn"], "unknown task 'qa_2_syn'; allowed: heldout"),
  (["--tasks=heldout,perplexity"],
   "unknown task 'perplexity'; allowed: heldout, needle, oracle"),
  (["--tasks=needle", "--lengths=20"], "needle length 20 is too short"),
  (["--tasks=needle", "--lengths=2k"], "--lengths: '2k' is not a number"),
  (["--tasks=needle", "--depths=nan"], "--depths: 'nan' is not finite"),
  (["--tasks=heldout", "--batches=0"], "count is 0"),
  (["--tasks=heldout", "--seq_len=0"], "seq_len is 0"),
])
def test_evaluate_bad_input(run, tmp_path, monkeypatch, capsys, arguments, message):
  code, out, err = _call(evaluate, monkeypatch, capsys, f"--workdir={tmp_path}", *arguments,
                         run=run)
  assert code == 2 and out == ""
  assert message in err and err.count("\n") == 1


def test_generate_shows_prompt_and_text_apart(run, monkeypatch, capsys):
  settings = ("--prompt=def f(", "--max_tokens=12", "--seed=3", "--workdir=runs/x")
  expected = generate_text(*run[1:3], "def f(", 12, seed=3)
  for extra in ((), ("--nostream",)):
    code, out, _ = _call(generate, monkeypatch, capsys, *settings, *extra, run=run)
    assert code in (0, None)
    assert out == f"--- prompt\ndef f(\n--- continued by step 7\n{expected}\n"
  code, out, _ = _call(generate, monkeypatch, capsys, *settings, "--json", run=run)
  assert json.loads(out) == {"step": 7, "prompt": "def f(", "text": expected}


@pytest.mark.parametrize("program, arguments, message", [
  (generate, ["--prompt="], "the prompt is empty"),
  (generate, [], "the prompt is empty"),
  (generate, ["--prompt=a", "--workdir="], "--workdir is missing"),
  (generate, ["--prompt=a", "--top_p=2"], "holds no run"),
  (evaluate, [], "holds no run"),
  (generate, ["--prompt=a", "--max_tokens=many"], "max_tokens"),
  (generate, ["--prompt=a", "b"], "unexpected argument 'b'"),
])
def test_without_a_run_it_is_one_line(tmp_path, monkeypatch, capsys, program, arguments, message):
  code, out, err = _call(program, monkeypatch, capsys, f"--workdir={tmp_path}", *arguments)
  assert code == 2 and out == ""
  assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
  (["--temperature=-1"], "temperature is -1.0"), (["--top_p=0"], "top_p is 0.0"),
  (["--max_tokens=0"], "max_new_tokens is 0"), (["--stop="], "stop string is empty"),
])
def test_generate_bad_settings(run, monkeypatch, capsys, arguments, message):
  code, _, err = _call(generate, monkeypatch, capsys, "--workdir=runs/x", "--prompt=a", *arguments,
                       run=run)
  assert code == 2
  assert message in err and err.count("\n") == 1


def test_block_map_draws_what_was_picked(tmp_path):
  import matplotlib.image
  picked = np.full((32, 2), -1)
  picked[:, 0], picked[16:, 1] = 0, 1
  path = plots.block_map({0: picked}, tmp_path / "map.png", block_size=8)
  image = matplotlib.image.imread(path)[..., :3]
  dark = (image[..., 2] > 0.3) & (image[..., 0] < 0.1) & (image[..., 2] < 0.5)
  # Column 0 for all 32 tokens and column 1 for the last 16: three eighths of the 4 x 32 cells.
  rows, columns = np.nonzero(dark)
  box = (rows.max() - rows.min()) * (columns.max() - columns.min())
  assert 0.70 < dark.sum() / box < 0.80            # of the two columns' box, three quarters
