"""A run's folder: what a resumed run may change, and how folders of older versions open."""

import dataclasses
import json

import pytest

from hysparse_jax import config
from hysparse_jax.errors import UserError
from hysparse_jax.training import run
from tests.test_configs import REPO


def tiny_moe(*overrides):
  return config.override(config.load(str(REPO / "configs" / "tiny_moe.py")), *overrides)


@pytest.fixture
def workdir(tmp_path):
  run.write_config(tmp_path, tiny_moe())
  return tmp_path


@pytest.mark.parametrize("change, note", [
  ("model.remat=layer", "model.remat = 'layer' (was 'none')"),
  ("model.implementation=reference", "model.implementation = 'reference' (was None)"),
  ("model.dtype=bfloat16", "model.dtype = 'bfloat16' (was 'float32')"),
  ("model.rope.base=640000.0", "model.rope.base = 640000.0 (was 10000.0)"),
  ("model.moe.load_balance_weight=0.5", "model.moe.load_balance_weight = 0.5 (was 0.01)"),
  ("model.moe.router_z_weight=0.5", "model.moe.router_z_weight = 0.5 (was 0.001)"),
])
def test_what_touches_no_weight_may_change_and_is_said(workdir, change, note):
  assert run.check_same_model(workdir, run.read_config(workdir), tiny_moe()) == []
  assert run.check_same_model(workdir, run.read_config(workdir), tiny_moe(change)) == [note]


@pytest.mark.parametrize("change, name", [
  ("model.attention=full", "attention"), ("model.num_layers=7", "num_layers"),
  ("model.d_model=64", "d_model"), ("model.window=8", "window"),
  ("model.block_size=32", "block_size"), ("model.selected_tokens=128", "selected_tokens"),
  ("model.sinks=False", "sinks"), ("model.norm_eps=1e-5", "norm_eps"),
  ("model.block_choice=random", "block_choice"),
  ("model.moe.experts_per_token=1", "moe.experts_per_token"),
  ("model.moe.normalize_weights=False", "moe.normalize_weights"),
  ("optim.optimizer=adamw", "optimizer"),
])
def test_what_the_weights_were_trained_for_may_not(workdir, change, name):
  with pytest.raises(UserError, match=f"another model or optimizer: it has {name} = ") as caught:
    run.check_same_model(workdir, run.read_config(workdir), tiny_moe(change))
  assert "\n" not in str(caught.value)


def test_a_router_bias_cannot_come_or_go_but_its_rate_may_change(tmp_path):
  moving, faster = (tiny_moe(f"model.moe.bias_update_rate={rate}") for rate in (0.01, 0.02))
  assert run.check_same_model(tmp_path, moving, faster) == [
    "model.moe.bias_update_rate = 0.02 (was 0.01)"]
  with pytest.raises(UserError, match="it has router_bias = True, asked for router_bias = False"):
    run.check_same_model(tmp_path, moving, tiny_moe("model.moe.bias_update_rate=0.0"))


def test_a_folder_from_before_documents_were_aligned_packs_as_it_did(workdir):
  path = workdir / "config.json"
  values = json.loads(path.read_text())
  assert run.read_config(workdir).data.align_documents
  del values["data"]["align_documents"], values["digest"]
  path.write_text(json.dumps(values))
  old = run.read_config(workdir)
  assert not old.data.align_documents
  assert old == dataclasses.replace(tiny_moe(), data=old.data)


def test_a_relative_source_is_stored_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  cfg = config.override(config.load("tiny"), "data.source=texts", "data.tokenizer=t.json")
  run.write_config(tmp_path, cfg)
  monkeypatch.chdir("/")
  stored = run.read_config(tmp_path).data
  assert (stored.source, stored.tokenizer) == (str(tmp_path / "texts"), str(tmp_path / "t.json"))
