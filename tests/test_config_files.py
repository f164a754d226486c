"""Configs by name, from any folder."""

import pytest

from hysparse_jax import config, config_files
from hysparse_jax.errors import UserError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def test_packaged_configs_are_found_by_name():
  assert {"tiny", "hysparse_7b", "ablations/ratio"} <= set(config_files.names())
  tiny = config.load("tiny")
  assert tiny == config.load(config_files.FOLDER / "tiny.py") == config.load("configs/tiny.py")
  assert config.load("tiny:full").model.attention == "full"
  assert config.load("hysparse_7b:long").data.seq_len > config.load("hysparse_7b").data.seq_len
  assert config.load("ablations/ratio:5").model.sparse_per_full == 5
  assert config.load("tiny", "model.window=64", "model.window=16").model.window == 16


def test_a_path_that_exists_wins(tmp_path):
  (tmp_path / "tiny.py").write_text("from hysparse_jax.config import Config, ModelConfig\n"
                                    "def get_config(arg=None):\n"
                                    "  return Config(model=ModelConfig(num_layers=3))\n")
  assert config.load("tiny.py").model.num_layers == 3
  assert config.load("tiny").model.num_layers == 5


@pytest.mark.parametrize("name, message", [
  ("tinny", "no config file tinny; did you mean tiny"),
  ("tinny.py", "did you mean tiny"),
  ("mine/tiny.py", "no config file mine/tiny.py"),
  ("../configs/tiny.py", "no config file"),
  ("/nowhere/tiny.py", "no config file /nowhere/tiny.py"),
  ("qqqq", "packaged are ablations/block_choice"),
])
def test_what_is_not_there_names_what_is(name, message):
  with pytest.raises(UserError) as caught:
    config.load(name)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_ones_own_is_not_mistaken_for_the_packaged_one(tmp_path):
  (tmp_path / "configs").mkdir()
  with pytest.raises(UserError, match="no config file configs/tiny.py"):
    config.load("configs/tiny.py")
