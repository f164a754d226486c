"""Every config file: loads, builds at full size, and is what its golden file says.

    python -m tests.test_configs        writes tests/golden/ anew; then look at the diff
"""

import pathlib

import jax
import pytest
from flax import nnx

from hysparse_jax import accounting, config
from hysparse_jax.errors import UserError
from hysparse_jax.model.transformer import Transformer

REPO = pathlib.Path(__file__).parents[1]
GOLDEN = REPO / "tests" / "golden"
VARIANTS = ["hysparse_7b.py:long", "hysparse2_paper.py:hybrid_swa", "tiny.py:full", "tiny.py:swa",
            "tiny_moe.py:full", "tiny_moe.py:swa", "debug.py:full", "debug.py:swa",
            "ablations/ratio.py:11"]


def files():
  return sorted(str(p.relative_to(REPO / "configs")) for p in (REPO / "configs").rglob("*.py"))


def names():
  return files() + VARIANTS


def load(name):
  return config.load(str(REPO / "configs" / name))


def golden_path(name):
  return GOLDEN / (name.replace(".py", "").replace("/", "-").replace(":", "-") + ".txt")


def golden_text(name):
  cfg = load(name)
  account = accounting.account(cfg.model, cfg.data.seq_len)
  return (f"params = {account.params:,}\nactive_params = {account.active_params:,}\n"
          + config.to_text(cfg))


def test_the_promised_configs_exist():
  promised = {f"{kind}_{size}.py" for kind in ("hysparse", "full", "swa")
              for size in ("7b", "80b_a3b")}
  promised |= {"tiny.py", "tiny_moe.py", "debug.py", "hysparse2_paper.py"}
  promised |= {f"ablations/{name}.py" for name in (
    "no_local_branch", "shared_local_kv", "per_head_gate", "no_sinks", "ratio", "block_size",
    "selected_tokens", "window", "block_choice")}
  assert set(files()) == promised


@pytest.mark.parametrize("name", names())
def test_equals_its_golden_file(name):
  path = golden_path(name)
  assert path.is_file(), "no golden file; write it with: python -m tests.test_configs"
  assert golden_text(name) == path.read_text(), "changed; python -m tests.test_configs rewrites it"


def test_no_golden_file_is_left_over():
  assert {p.name for p in GOLDEN.iterdir()} == {golden_path(name).name for name in names()}


@pytest.mark.parametrize("name", names())
def test_builds_at_full_size(name):
  cfg = load(name).model
  model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(model)) == accounting.account(cfg, 1).params


@pytest.mark.parametrize("name", files())
def test_header_is_a_run_card(name):
  header = (REPO / "configs" / name).read_text().split('"""')[1]
  assert f"--config=configs/{name}" in header and "Hardware:" in header
  assert "python -m experiments." in header
  assert "Paper" in header or "paper" in header


@pytest.mark.parametrize("size", ["7b", "80b_a3b"])
@pytest.mark.parametrize("attention", ["full", "swa"])
def test_baselines_differ_in_attention_alone(attention, size):
  base, other = (config.to_text(load(f"{kind}_{size}.py")).splitlines()
                 for kind in ("hysparse", attention))
  changed = [b for a, b in zip(base, other, strict=True) if a != b]
  assert changed == [f"model.attention = {attention!r}"]


@pytest.mark.parametrize("name", [n for n in files() if n.startswith("ablations/")])
def test_ablations_change_one_field_of_tiny(name):
  base = load("tiny.py")
  if name == "ablations/ratio.py":     # 11 sparse layers need more room than tiny has
    base = config.override(base, "model.num_layers=13")
  base, other = (config.to_text(cfg).splitlines() for cfg in (base, load(name)))
  assert sum(a != b for a, b in zip(base, other, strict=True)) == 1


def test_ablation_arguments():
  assert load("ablations/ratio.py:5").model.sparse_per_full == 5
  assert load("ablations/window.py:48").model.window == 48
  assert load("ablations/block_size.py:32").model.block_size == 32
  assert load("ablations/selected_tokens.py:96").model.selected_tokens == 96


@pytest.mark.parametrize("name,message", [
  ("tiny.py:fulll", "attention is 'fulll'; allowed: 'hysparse', 'full', 'swa'"),
  ("full_80b_a3b.py:long", "takes 0 positional arguments"),
  ("hysparse_7b.py:short", "hysparse_7b takes no argument or 'long', got 'short'"),
  ("hysparse2_paper.py:x", "takes hybrid_swa or hysparse, got 'x'"),
  ("ablations/ratio.py:many", "model.sparse_per_full=many: expected int"),
  ("ablations/block_size.py:48", "not a multiple of"),
])
def test_bad_arguments(name, message):
  with pytest.raises(UserError, match=message) as caught:
    load(name)
  assert "\n" not in str(caught.value)


if __name__ == "__main__":
  GOLDEN.mkdir(exist_ok=True)
  for old in GOLDEN.iterdir():
    old.unlink()
  for config_name in names():
    golden_path(config_name).write_text(golden_text(config_name))
