"""`experiments.reproduce`: its plan, its verdicts, and the smoke preset from end to end."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cli, readme_tables
from experiments.bench import selections
from experiments.reproduce import plan as reproduce_plan
from experiments.reproduce import report as reproduce_report
from experiments.reproduce import run as reproduce
from experiments.reproduce import verdicts
from experiments.reproduce.plan import MODELS, RATES, body_params, preset
from experiments.reproduce.verdicts import (
  BITS,
  NOT_REPRODUCED,
  RECALL,
  REPRODUCED,
  UNDECIDABLE,
  Claim,
)
from hysparse_jax import config, sharding
from hysparse_jax.data.batches import TrainStream
from hysparse_jax.errors import UserError
from hysparse_jax.training import step as train_step

SMOKE = (0, 2)      # the pieces of the smoke preset that are trained here: full and hysparse
WORSE, NO_WORSE = Claim("", "a", "b"), Claim("", "a", "b", True)


@pytest.mark.parametrize("name", ["smoke", "h200"])
def test_models_match_in_parameters_and_differ_in_what_they_say(name):
  plan = preset(name)
  runs = [run for piece in plan.pieces for run in piece.runs]
  target = body_params(dataclasses.replace(plan.base.model, attention="full"))
  for run in runs:
    assert abs(body_params(run.cfg.model) / target - 1) < 0.01, run.name
  same = lambda run: dataclasses.replace(run.cfg, model=plan.base.model, train=plan.base.train)
  first = {}
  for run in runs:       # equal batches for equal seeds and rows
    key = run.seed, run.cfg.data.seq_len
    assert same(run) == same(first.setdefault(key, run))
    assert run.cfg.data.seed == run.cfg.train.seed == run.seed
  assert len({run.name for run in runs}) == len(runs)


def test_the_h200_plan_is_what_was_asked_for():
  plan = preset("h200")
  names = [piece.name for piece in plan.pieces]
  assert names[:4] == ["tune-full-x0.5", "tune-full-x1", "tune-full-x2", "tune-swa-x0.5"]
  assert names[9:12] == ["full-s0", "swa-s0", "hysparse-s0"]
  runs = [run for piece in plan.pieces for run in piece.runs if run.rate is None]
  assert {run.model for run in runs} == set(MODELS)
  for model in (*reproduce_plan.HEADLINE, "hysparse_m3", "swa_m3"):
    assert {run.seed for run in runs if run.model == model} >= {0, 1, 2}
  assert plan.base.model.layer_kinds.count("full") == 2 and plan.base.data.seq_len == 8192
  assert plan.lengths == (2048, 4096, 8192, 16_384, 32_768)
  assert 25e6 <= body_params(plan.base.model) <= 150e6
  fields = {run.model: run.cfg.model for run in runs}
  assert [fields[f"hysparse_m{m}"].sparse_per_full for m in (3, 5)] == [3, 5]
  assert [fields[f"block_{b}"].block_size for b in (32, 64, 128)] == [32, 64, 128]
  assert [fields[f"selected_{n}"].selected_tokens for n in (256, 512)] == [256, 512]
  assert {fields[f"block_{b}"].selected_tokens for b in (32, 64, 128)} == {512}
  assert (fields["random"].block_choice, fields["previous"].block_choice) == ("random", "previous")
  assert not fields["no_local"].local_branch and fields["shared_local_kv"].local_shares_kv
  tuned = [run for piece in plan.pieces[:9] for run in piece.runs]
  assert [run.rate for run in tuned] == list(RATES) * 3
  assert {(run.cfg.train.steps, run.cfg.data.task_warmup_steps) for run in tuned} == {(512, 256)}
  fixed = [run for piece in plan.pieces[9:] for run in piece.runs if run.rate is not None]
  assert [(run.model, run.seed, run.rate, run.cfg.train.steps) for run in fixed] == [
    (model, seed, 1.0, 896) for seed in (0, 1, 2) for model in ("full", "swa", "swa_m3")]
  assert not any(run.tuning for run in fixed) and all(run.tuning for run in tuned)
  assert all(reproduce_plan.predicted_minutes(plan, piece) < 8 for piece in plan.pieces)
  slow = {piece.name for piece in plan.pieces if piece.note}
  assert slow == {"block_32-s0", "block_128-s0"}


def test_overrides_reach_every_run():
  plan = preset("h200", ("train.steps=640", "model.implementation=mosaic_gpu"))
  steps = {run.cfg.train.steps for piece in plan.pieces for run in piece.runs}
  assert steps == {640, 366, 320} and plan.base.train.steps == 640    # tuning and short rows
  assert all(run.cfg.model.implementation == "mosaic_gpu"
             for piece in plan.pieces for run in piece.runs)


def test_matching_says_when_it_cannot():
  with pytest.raises(UserError, match="no FFN width gives"):
    reproduce_plan.matched(preset("h200").base.model, 1_000_000)


def _tuning(model, losses):
  return [{"model": model, "tuning": True, "rate": rate, "train_loss": loss}
          for rate, loss in zip(RATES, losses)]


def test_tuning_takes_the_lowest_loss_once_all_are_in():
  assert reproduce_plan.tuned_rate(_tuning("swa", (3.0, 2.0, 1.0)), "swa") == 2.0
  assert reproduce_plan.tuned_rate(_tuning("swa", (1.5, 2.0)), "swa") == 1.0
  assert reproduce_plan.tuned_rate(_tuning("swa", (1.0, 2.0, 3.0)), "full") == 1.0
  assert [reproduce_plan.family(model) for model in ("full", "swa_m3", "random", "block_32")] == [
    "full", "swa", "hysparse", "hysparse"]


@pytest.mark.parametrize("claim, figure, a, b, outcome", [
  (WORSE, RECALL, (90, 91, 92), (60, 61, 62), REPRODUCED),
  (WORSE, RECALL, (90, 91, 92), (90.1, 91, 92), NOT_REPRODUCED),      # 3 points are excluded
  (WORSE, RECALL, (90, 91, 92), (80, 90, 99), UNDECIDABLE),
  (NO_WORSE, RECALL, (90, 91, 92), (60, 61, 62), NOT_REPRODUCED),
  (NO_WORSE, RECALL, (90, 91, 92), (90, 91, 92), REPRODUCED),
  (NO_WORSE, RECALL, (90, 91, 92), (99, 99.5, 98), REPRODUCED),       # better is no worse
  (NO_WORSE, RECALL, (90, 91, 92), (80, 90, 99), UNDECIDABLE),
  (WORSE, RECALL, (4.0, 4.1, 4.2), (1.0, 1.1, 1.2), UNDECIDABLE),     # both at the floor
  (WORSE, RECALL, (90,), (60,), UNDECIDABLE),                         # no spread known
  (WORSE, RECALL, (90, 91, 92), (), UNDECIDABLE),
  (WORSE, BITS, (1.00, 1.001, 1.002), (1.10, 1.101, 1.102), REPRODUCED),   # lower is better
  (NO_WORSE, BITS, (1.00, 1.001, 1.002), (1.10, 1.101, 1.102), NOT_REPRODUCED),
  (NO_WORSE, BITS, (1.10, 1.101, 1.102), (1.00, 1.001, 1.002), REPRODUCED),
])
def test_verdicts(claim, figure, a, b, outcome):
  assert verdicts.decide(claim, figure, {"a": a, "b": b}).outcome == outcome


def test_verdict_numbers_by_hand():
  """s^2 = (2 + 8) / 4 = 2.5; t(0.975, 4) = 2.776; e = 2.776 sqrt(2.5 (1/3 + 1/3)) = 3.584."""
  found = verdicts.decide(WORSE, RECALL, {"a": (9, 10, 11), "b": (5, 7, 9)})
  assert found.difference == pytest.approx(3.0) and found.error == pytest.approx(3.5840, abs=1e-3)
  # A model with one seed borrows the spread of the others.
  found = verdicts.decide(Claim("", "a", "c"), RECALL, {"a": (9, 10, 11), "b": (5, 7, 9),
                                                        "c": (2,)})
  assert found.outcome == REPRODUCED
  assert found.error == pytest.approx(2.7764 * (2.5 * 4 / 3) ** 0.5, abs=1e-3)


@pytest.mark.parametrize("number", range(len(preset("smoke").pieces)))
def test_every_model_of_the_smoke_preset_takes_a_step(number):
  """Traced, not run: the smoke test trains two, test_model.py compares what they compute."""
  (run,) = preset("smoke").pieces[number].runs
  mesh = sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1])
  program = train_step.build(run.cfg, mesh)
  batch = jax.eval_shape(lambda: TrainStream(run.cfg).batch(0))
  with jax.set_mesh(mesh):
    state, metrics = jax.eval_shape(program.step, program.abstract_state, batch)
  assert metrics.loss.shape == ()
  assert [leaf.shape for leaf in jax.tree.leaves(state.model)] == [
    leaf.shape for leaf in jax.tree.leaves(program.abstract_state.model)]


@pytest.mark.slow
def test_smoke(tmp_path, monkeypatch):
  """The smoke preset's full attention and HySparse from end to end; one test, so run once."""
  smoke = tmp_path / "smoke"
  reproduce.reproduce(preset("smoke"), smoke, SMOKE)
  _check_results(smoke)
  _check_report(smoke)
  _check_mechanism(smoke, monkeypatch)
  _check_second_run(smoke, tmp_path / "again")


def _metrics(row):
  return {name: value for name, value in row.items()
          if name not in ("tokens_per_second", "date", "commit")}


def _check_results(smoke):
  results = reproduce.read_results(smoke, preset("smoke"))
  assert [row["model"] for row in results] == ["full", "hysparse"]
  for row in results:
    assert 2 < row["bits_per_byte"] < 8 and len(row["recall"]) == 15
    values = [value for cells in row["recall"].values() for value in cells if value is not None]
    assert len(values) == 28 and all(0 <= value <= 1 for value in values)   # cwe needs 158
    assert row["recall"]["cwe"][0] is None
  by_model = {row["model"]: row for row in results}
  assert by_model["full"]["kv_bytes_per_token"] == 5 * 2 * 2 * 16 * 2
  assert by_model["hysparse"]["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
  assert by_model["full"]["bits_per_byte"] != by_model["hysparse"]["bits_per_byte"]


def _check_report(smoke):
  report = (smoke / "report.md").read_text()
  for heading in ("## Models", "## The paper's claims", "## Pictures", "## Tasks at 64 tokens",
                  "## Learning rates", "## What the oracle does"):
    assert heading in report
  assert "Not run yet: swa, no_local, shared_local_kv, random, previous." in report
  claims = [claim for claim in verdicts.CLAIMS if "1:3" not in claim.text]   # it has no other ratio
  assert len(claims) == 8
  assert report.count("not decidable at this scale**: too few seeds") == 3     # full and hysparse
  assert report.count(" was not run |") == 3 * (len(claims) - 1)
  assert report.count("not decidable at this scale") == 3 * len(claims)
  pictures = [line.split("](")[1].rstrip(")") for line in report.splitlines()
              if line.startswith("![")]
  assert len(pictures) == 8
  for name in pictures:
    assert (smoke / name).read_bytes().startswith(b"\x89PNG")


def _check_mechanism(smoke, monkeypatch):
  rows = [json.loads(line) for line in (smoke / "overlap.jsonl").read_text().splitlines()]
  assert [(row["step"], row["layer"]) for row in rows] == [
    (step, layer) for step in (8, 16) for layer in range(4)]
  for row in rows:
    assert 0 < row["chance"] < 1 and 0 < row["coverage"] <= 1
    assert ("union" in row) == (row["layer"] == 0)
    if "union" in row:
      assert row["union"]["1"] == 4.0 < row["union"]["4"] < row["union"]["16"] <= 16
  monkeypatch.setattr(selections, "_FOLDER", smoke)
  picks = selections.recorded("hysparse", 2)
  assert picks.shape == (2, 128, 4) and picks.dtype == np.int32
  own = np.arange(128) // 4
  assert (picks <= own[None, :, None]).all() and (picks[:, 16:] >= 0).all()
  assert (np.diff(picks[:, 16:], axis=-1) > 0).all()


def _check_second_run(smoke, tmp_path):
  """HySparse trained and evaluated again elsewhere; and what is done is not done twice."""
  plan = preset("smoke")
  again = reproduce.reproduce(plan, tmp_path, [2])
  first = reproduce.read_results(smoke, plan)[1]
  assert _metrics(again[0]) == _metrics(first)
  assert (tmp_path / "overlap.jsonl").read_text() == (smoke / "overlap.jsonl").read_text()
  assert "Not run yet: full, swa, no_local" in (tmp_path / "report.md").read_text()
  with pytest.raises(UserError, match="holds hysparse-s0 with other settings"):
    reproduce.reproduce(preset("smoke", ["optim.lr=1e-4"]), tmp_path, [2])
  before = (tmp_path / "results.jsonl").read_bytes()
  assert reproduce.reproduce(plan, tmp_path, [2]) == again
  assert (tmp_path / "results.jsonl").read_bytes() == before


def test_the_report_decides_from_the_rows(tmp_path):
  """Made-up rows of the h200 preset: three seeds each, a Hybrid SWA that recalls nothing far."""
  plan = preset("h200")
  rng = np.random.default_rng(0)
  results = []
  for piece in plan.pieces:
    for run in piece.runs:
      level = {"full": 0.8, "swa": 0.3, "random": 0.35}.get(run.model, 0.8)
      level += 0.01 * rng.standard_normal()
      cells = [level] * len(run.lengths)
      results.append({
        "preset": "h200", "model": run.model, "seed": run.seed, "rate": run.rate or 1.0,
        "tuning": run.tuning, "again": run.again,
        "train_loss": 2.0 + (run.rate or 1.0) ** 2,
        "bits_per_byte": 1.2 + 0.001 * rng.standard_normal(), "kv_bytes_total": 10**8,
        "kv_bytes_per_token": 1, "kv_tokens": 32768, "body_params": 39_000_000, "device": "made up",
        "jax": "0", "commit": "", "tokens_per_second": 1e5, "seq_len": run.cfg.data.seq_len,
        "tokens": reproduce_plan.tokens_of(run.cfg), "settings": "", "lengths": list(run.lengths),
        "recall": dict.fromkeys(plan.tasks, cells), "f1": dict.fromkeys(plan.tasks, cells),
        "by_depth": {"vt": [cells] * 5}})
  for row, run in zip(results, [run for piece in plan.pieces for run in piece.runs]):
    row["rate"] = run.rate or 0.5    # the tuned rate is 0.5: rows at another rate do not count
    if not run.tuning and run.rate:
      row["bits_per_byte"] = 7.5
  results.append({**results[9], "rate": 1.0, "bits_per_byte": 99.0})
  lines = reproduce_report.write(plan, results, [], tmp_path).read_text().splitlines()
  verdict = {tuple(line.split(" | ")[:2]): line for line in lines if line.startswith("| ")}
  claim = lambda text, figure: verdict[f"| {text}", figure].split("**")[1]
  assert claim("HySparse is within noise of full attention, or better",
               "recall to 8,192") == REPRODUCED
  assert claim("Hybrid SWA is worse than full attention", "recall beyond 8,192") == REPRODUCED
  assert claim("random blocks are worse than the oracle's", "recall to 8,192") == REPRODUCED
  assert claim("ablation 1: without the local branch it is worse",
               "recall to 8,192") == NOT_REPRODUCED
  split = lines.index("## All at the base learning rates")
  assert "99.0" not in "\n".join(lines[:split]) and "7.5" not in "\n".join(lines[:split])
  base_rates = lines[split:]
  row = next(line for line in base_rates if line.startswith("| swa | "))
  assert "7.5000 ± 0.0000" in row and row.endswith("| 3 |")
  line = next(line for line in base_rates if line.startswith("| Hybrid SWA is worse than full"))
  assert line.split("**")[1] == REPRODUCED
  assert any(line.startswith("| full | 2.2500 | 3.0000 | 6.0000 | x0.5") for line in lines)
  assert sum(line.startswith("## Models") for line in lines) == 2       # rows of 8,192 and of 2,048
  first, again = (next(row for row in results if row["model"] == "hysparse" and row["seed"] == 0
                       and not row["tuning"] and row["again"] == flag) for flag in (False, True))
  bits = abs(first["bits_per_byte"] - again["bits_per_byte"])
  points = 100 * abs(first["recall"]["vt"][0] - again["recall"]["vt"][0])
  assert (f"`hysparse`, seed 0, trained twice on made up: bits per byte differ by {bits:.4f}, mean "
          f"recall by at most {points:.1f} points at any length.") in lines
  assert any(line.startswith("| hysparse | ") and line.endswith("| 3 |") for line in lines)
  report = reproduce_report.write(plan, [row for row in results if not row["again"]], [], tmp_path,
                                  note="Two runs shared the GPU.").read_text()
  assert "## All at the base learning rates" in report
  assert "Not run yet: hysparse-s0-again.\n\nTwo runs shared the GPU.\n" in report
  for kept in (9, 10):         # tuning alone, then one model at the rate that it chose
    report = reproduce_report.write(plan, results[:kept], [], tmp_path).read_text()
    assert "## All at the base" not in report and ("## Models" in report) == (kept == 10)


def test_the_kept_report_is_what_the_kept_rows_say(tmp_path):
  folder = readme_tables.RESULTS / "reproduce_h200"
  shutil.copytree(folder / "plots", tmp_path / "plots")     # those of the oracle need the model
  kept = (folder / "report.md").read_text()
  note = next(line for line in kept.splitlines() if line.startswith("The final runs were made"))
  written = reproduce_report.write(
    preset("h200"), readme_tables.read("reproduce_h200/results"), readme_tables.read("overlap"),
    tmp_path, note).read_text()
  assert written == kept


@pytest.mark.parametrize("arguments, message", [
  ([], "--preset is missing; give smoke or h200"),
  (["--preset=tpu"], "unknown preset 'tpu'; allowed: smoke, h200"),
  (["--preset=smoke", "--piece=9"], "no piece 9; preset smoke has 0 to 6"),
  (["--preset=smoke", "--piece=one"], "--piece=one: give numbers"),
  (["--preset=smoke", "--set=model.windw=3"], "did you mean 'window'?"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
  code, out, err = _call(monkeypatch, capsys, f"--workdir={tmp_path / 'new'}", *arguments)
  assert code == 2 and message in err and err.count("\n") == 1


def test_list_and_foreign_results(tmp_path, monkeypatch, capsys):
  code, out, _ = _call(monkeypatch, capsys, "--preset=h200", f"--workdir={tmp_path}", "--list")
  assert code in (0, None) and "minutes left in all" in out and not list(tmp_path.iterdir())
  (tmp_path / "results.jsonl").write_text('{"preset": "smoke"}\n')
  code, _, err = _call(monkeypatch, capsys, "--preset=h200", f"--workdir={tmp_path}", "--report")
  assert code == 2 and "holds results of preset smoke, not h200" in err
  (tmp_path / "results.jsonl").write_text('{"preset": "smo\n')
  code, _, err = _call(monkeypatch, capsys, "--preset=smoke", f"--workdir={tmp_path}")
  assert code == 2 and "is damaged" in err and err.count("\n") == 1


def _call(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
    cli.run(reproduce.main)
  flags.FLAGS.unparse_flags()
  flags.FLAGS.mark_as_parsed()
  out = capsys.readouterr()
  return exit_.value.code, out.out, out.err
