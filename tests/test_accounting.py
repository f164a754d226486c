"""Accounting against real parameter trees and caches, counted pairs, and the papers' figures."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from hysparse_jax import accounting, config
from hysparse_jax.accounting import account
from hysparse_jax.config import ModelConfig, MoeConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model.transformer import Transformer

REPO = pathlib.Path(__file__).parents[1]
SMALL = ModelConfig(vocab_size=50, num_layers=6, d_model=24, num_heads=4, num_kv_heads=2,
                    head_dim=8, value_head_dim=6, d_ff=20, sparse_per_full=2, block_size=4,
                    selected_tokens=8, window=5, dtype="float32")
VARIANTS = {
  "hysparse": {},
  "full": dict(attention="full"),
  "swa": dict(attention="swa"),
  "no_local": dict(local_branch=False, qk_norm=True),
  "shared_local": dict(local_shares_kv=True, qk_norm=True),
  "per_head": dict(gate="per_head"),
  "ungated": dict(gate="none", sinks=False),
  "tied": dict(tied_embeddings=True, qk_norm=True),
  "mixed": dict(pattern="window full sparse full window sparse", qk_norm=True),
  "mixed_shared": dict(pattern="full window sparse sparse full sparse", local_shares_kv=True),
  "moe": dict(moe=MoeConfig(6, 2, 10)),
  "moe_bias": dict(moe=MoeConfig(6, 2, 10, bias_update_rate=0.1), attention="swa"),
}
GROUP_OF = {
  "embedding": "embedding", "head": "head", "wq": "queries_and_output", "wo": "queries_and_output",
  "wk": "keys_and_values", "wv": "keys_and_values", "gate": "gates", "router": "router",
  "w_gate": "ffn", "w_up": "ffn", "w_out": "ffn",
}


def load(path):
  return config.load(str(REPO / "configs" / path)).model


def tree_groups(cfg):
  """Sizes of the real tree's leaves, summed by the group their name belongs to."""
  tree = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  sizes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = next(key.name for key in reversed(path)
                if getattr(key, "name", "value") not in ("value", "raw_value"))
    group = GROUP_OF.get(name, "vectors")
    if group == "ffn":
      group = "mlp" if cfg.moe is None else "experts"
    sizes[group] = sizes.get(group, 0) + leaf.size
  return sizes


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_group_equals_the_tree(fields):
  cfg = dataclasses.replace(SMALL, **fields)
  counted = {name: size for name, size in accounting.param_groups(cfg).items() if size}
  assert counted == tree_groups(cfg)
  assert account(cfg, 8).params == sum(counted.values())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_kv_bytes_equal_the_cache(fields):
  cfg = dataclasses.replace(SMALL, **fields)
  model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  cache = jax.eval_shape(lambda: model.init_cache(1, 37)).groups
  held = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
  assert account(cfg, 37, "f32").kv_bytes_total == held


def pairs(tokens, limit):
  return sum(min(t + 1, limit) for t in range(tokens))


@pytest.mark.parametrize("tokens", [1, 5, 8, 40])
def test_flops_by_hand(tokens):
  """Layers 0, 3, 5 are full, 1, 2, 4 in between; 4 heads of 8 + 6 channels, 2 FLOPs each."""
  per_key = 2 * 4 * (8 + 6)
  between = {"hysparse": pairs(tokens, 8) + pairs(tokens, 5), "full": pairs(tokens, tokens),
             "swa": pairs(tokens, 5)}
  for attention, keys in between.items():
    cfg = dataclasses.replace(SMALL, attention=attention)
    kv_layers = 6
    gates = {"hysparse": 2, "full": 0, "swa": 1}[attention] * 3 * 24 * 4 * 6
    weights = (6 * (24 * 4 * 8 + 4 * 6 * 24 + 3 * 24 * 20) + kv_layers * 24 * 2 * (8 + 6) + gates)
    attend = per_key * 3 * (pairs(tokens, tokens) + keys)
    found = account(cfg, tokens)
    assert found.prefill_flops == 2 * weights * tokens + 2 * 24 * 50 + attend
    assert found.train_flops_per_token == 6 * (weights + 24 * 50) + 3 * attend / tokens


def test_flops_count_active_experts_only():
  one = dataclasses.replace(SMALL, moe=MoeConfig(6, 1, 10))
  three = dataclasses.replace(SMALL, moe=MoeConfig(6, 3, 10))
  more = 6 * 2 * 3 * 24 * 10   # layers, further experts, matrices of D x F
  assert account(three, 9).active_params - account(one, 9).active_params == more
  assert account(three, 9).params == account(one, 9).params
  assert (account(three, 9).train_flops_per_token - account(one, 9).train_flops_per_token
          == 6 * more)


def test_tied_head_still_multiplies():
  tied = dataclasses.replace(SMALL, tied_embeddings=True)
  assert account(tied, 9).train_flops_per_token == account(SMALL, 9).train_flops_per_token
  assert account(SMALL, 9).params - account(tied, 9).params == 24 * 50


def test_80b_kv_figures():
  sparse, full = load("hysparse_80b_a3b.py"), load("full_80b_a3b.py")
  assert account(full, 1).kv_bytes_per_token == 100_352
  assert account(full, 1).kv_bytes_constant == 0
  assert account(sparse, 1).kv_bytes_per_token == 10_240
  assert account(sparse, 1).kv_bytes_constant == 44 * 128 * 2 * 4 * 128 * 2 == 11_534_336
  row = accounting.account_row(sparse, 32_768)
  assert round(row["kv_ratio_to_full"], 2) == 9.47
  assert row["full"] == dataclasses.asdict(account(full, 32_768))
  assert round(row["full"]["kv_bytes_total"] / 1e9, 2) == 3.29
  assert round(row["kv_bytes_total"] / 1e9, 3) == 0.347
  assert row["swa"]["kv_bytes_total"] == row["kv_bytes_total"]


@pytest.mark.parametrize("arg,full_layers,gigabytes", [("hybrid_swa", 9, 12.09),
                                                       ("hysparse", 5, 6.72)])
def test_hysparse2_paper_figures(arg, full_layers, gigabytes):
  cfg = load(f"hysparse2_paper.py:{arg}")
  assert cfg.layer_kinds.count("full") == full_layers
  assert round(account(cfg, 1_048_576, "fp8").kv_bytes_total / 1e9, 2) == gigabytes


def test_reads_per_decoded_token():
  """1M tokens: a sparse layer reads 1024 + 128 of them, a full one all."""
  cfg = load("hysparse_80b_a3b.py")
  per_layer = 2 * 4 * 128 * 2
  expected = per_layer * (5 * 1_000_000 + 44 * (1024 + 128))
  assert account(cfg, 1_000_000).kv_read_bytes_per_decoded_token == expected
  assert account(cfg, 100).kv_read_bytes_per_decoded_token == per_layer * (5 + 44 * 2) * 100


@pytest.mark.parametrize("path,total,active", [
  ("full_7b.py", 7.6e9, 7.6e9), ("hysparse_7b.py", 8.5e9, 8.5e9),
  ("full_80b_a3b.py", 81.3e9, 3.65e9), ("hysparse_80b_a3b.py", 82.8e9, 5.13e9)])
def test_sizes_are_near_their_names(path, total, active):
  found = account(load(path), 1)
  np.testing.assert_allclose([found.params, found.active_params], [total, active], rtol=6e-3)


def test_per_head_gates_bring_the_80b_near_3_5b_active():
  cfg = dataclasses.replace(load("hysparse_80b_a3b.py"), gate="per_head")
  assert 3.4e9 < account(cfg, 1).active_params < 3.7e9


def test_baselines_of_an_ablation_exist():
  for fields in (dict(local_branch=False), dict(local_shares_kv=True)):
    baselines = accounting.baselines(dataclasses.replace(SMALL, **fields))
    assert [baselines[name].attention for name in ("full", "swa")] == ["full", "swa"]


def test_bad_lengths_and_dtypes():
  with pytest.raises(UserError, match="tokens is 0"):
    account(SMALL, 0)
  with pytest.raises(UserError, match="kv_dtype is 'int4'; allowed: bf16, fp8, f32"):
    account(SMALL, 1, "int4")


def run_account(*args):
  return subprocess.run([sys.executable, "-m", "experiments.account", *args], cwd=REPO,
                        capture_output=True, text=True, timeout=120)


def test_command_line_json():
  done = run_account("--config=configs/hysparse_80b_a3b.py", "--tokens=32768", "--json",
                     "--set", "model.window=64", "--set=model.gate=per_head", "--kv_dtype=fp8")
  assert (done.returncode, done.stderr) == (0, "")
  cfg = config.override(config.override(config.load(str(REPO / "configs/hysparse_80b_a3b.py")),
                                        "model.window=64"), "model.gate=per_head")
  assert json.loads(done.stdout) == accounting.account_row(cfg.model, 32_768, "fp8")
  names = ["params", "active_params", "train_flops_per_token", "prefill_flops",
           "kv_bytes_per_token", "kv_bytes_constant", "kv_bytes_total",
           "kv_read_bytes_per_decoded_token"]
  assert list(json.loads(done.stdout)) == [*names, "full", "swa", "kv_ratio_to_full"]


def test_command_line_table():
  done = run_account("--config=configs/hysparse_80b_a3b.py", "--tokens=32768")
  assert done.returncode == 0
  for figure in ("10,240", "100,352", "11,534,336", "9.47x", "78,920,024,064"):
    assert figure in done.stdout


BAD = {
  "no_config": ([], "--config is missing"),
  "missing_file": (["--config=configs/tinny.py"], "no config file configs/tinny.py; did you mean"),
  "unknown_field": (["--config=configs/tiny.py", "--set", "model.windw=3"],
                    "has no field 'windw'; did you mean 'window'?"),
  "unknown_flag": (["--config=configs/tiny.py", "--tokns=3"], "Unknown command line flag 'tokns'"),
  "flag_type": (["--tokens=many"], "--tokens=many"),
  "stray": (["--config=configs/tiny.py", "json"], "unexpected argument 'json'"),
  "length": (["--config=configs/tiny.py", "--tokens=0"], "tokens is 0"),
}


@pytest.mark.parametrize("args,message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_code_2(args, message):
  done = run_account(*args)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert message in done.stderr
