"""Configs: typed overrides, one-line errors, the layer pattern, and text and dict round trips."""

import dataclasses
import json

import pytest

from hysparse_jax import config
from hysparse_jax.config import (
  Config,
  LayerGroup,
  LayerRun,
  MeshConfig,
  ModelConfig,
  MoeConfig,
  RopeConfig,
)
from hysparse_jax.errors import UserError

MOE = Config(model=ModelConfig(moe=MoeConfig(8, 2, 16)))


@pytest.mark.parametrize("assignment,section,field,value", [
  ("model.window=64", "model", "window", 64),
  (" model.window = 64 ", "model", "window", 64),
  ("model.norm_eps=1", "model", "norm_eps", 1),
  ("optim.lr=3e-4", "optim", "lr", 3e-4),
  ("model.local_branch=False", "model", "local_branch", False),
  ("model.value_head_dim=16", "model", "value_head_dim", 16),
  ("model.value_head_dim=None", "model", "value_head_dim", None),
  ("model.implementation=reference", "model", "implementation", "reference"),
  ("model.moe=None", "model", "moe", None),
  ("data.source=123", "data", "source", "123"),
  ("data.source=/a=b", "data", "source", "/a=b"),
  ("optim.schedule=cosine", "optim", "schedule", "cosine"),
  ("mesh.tensor=-1", "mesh", "tensor", -1),
])
def test_override_sets_one_field(assignment, section, field, value):
  base = dataclasses.replace(MOE, mesh=MeshConfig(fsdp=1))
  changed = config.override(base, assignment)
  found = getattr(getattr(changed, section), field)
  assert found == value and type(found) is type(value)
  restored = dataclasses.replace(getattr(changed, section),
                                 **{field: getattr(getattr(base, section), field)})
  assert dataclasses.replace(changed, **{section: restored}) == base


def test_override_reaches_nested_sections_and_leaves_the_original():
  changed = config.override(MOE, "model.moe.experts_per_token=3")
  assert (changed.model.moe.experts_per_token, MOE.model.moe.experts_per_token) == (3, 2)
  assert config.override(MOE, "model.rope.base=640000").model.rope == RopeConfig(base=640_000)


def test_an_override_starts_the_window_layers_rope():
  changed = config.override(MOE, "model.rope_window.fraction=0.5", "model.rope.fraction=0").model
  assert changed.rope_window == RopeConfig(fraction=0.5)
  assert (changed.rope_of("full"), changed.rope_of("sparse")) == (RopeConfig(fraction=0),) * 2
  assert changed.rope_of("window").fraction == 0.5
  assert config.override(config.override(MOE, "model.rope_window.fraction=0.5"),
                         "model.rope_window=None") == MOE


BAD_OVERRIDES = {
  "no_equals": ("model.window", "has no '='"),
  "unknown_section": ("modle.window=1", "has no field 'modle'; did you mean 'model'?"),
  "unknown_field": ("model.windw=1", "has no field 'windw'; did you mean 'window'?"),
  "unknown_far": ("model.qqqq=1", "has no field 'qqqq' (fields: attention,"),
  "wrong_type": ("model.window=wide", "model.window=wide: expected int, got str"),
  "float_for_int": ("model.window=64.0", "expected int, got float"),
  "bool_for_int": ("model.window=True", "expected int, got bool"),
  "int_for_bool": ("model.sinks=1", "expected bool, got int"),
  "none_for_int": ("model.window=None", "expected int, got NoneType"),
  "choice": ("model.attention=flash", "attention is 'flash'; allowed: 'hysparse', 'full', 'swa'"),
  "section": ("model=3", "model is a section; set one of its fields, such as model.attention"),
  "field_of_value": ("model.window.x=3", "window is a value, it has no fields"),
  "empty": ("=3", "has no field ''"),
  "window_0": ("model.window=0", "ModelConfig.window is 0; it must be at least 1"),
  "heads": ("model.num_kv_heads=3", "num_heads=4 is not a multiple of model.num_kv_heads=3"),
  "odd_head": ("model.head_dim=31", "head_dim=31 is 31 channels, which is odd"),
  "selection": ("model.selected_tokens=100", "selected_tokens=100 is not a multiple of"),
  "local_kv": ("model.attention=full", "local_shares_kv=True needs attention='hysparse'"),
  "moved": ("model.rope_base=5", "model.rope_base is now model.rope.base"),
  "rope_base": ("model.rope.base=0", "rope.base is 0; it must exceed 1"),
  "rope_fraction": ("model.rope.fraction=0.16", "is 5 channels, which is odd"),
  "rope_factor": ("model.rope.factor=2", "rope.factor=2 does nothing with rope.scaling='none'"),
  "rope_betas": ("model.rope.beta_slow=40", "must exceed rope.beta_slow=40"),
  "pattern_word": ("model.pattern=full spares", "names a layer 'spares'; allowed: full, sparse"),
  "pattern_length": ("model.pattern=full sparse", "names 2 layers and model.num_layers is 8"),
  "pattern_sparse": ("model.pattern=" + "window sparse full " * 2 + "full full",
                     "layer 1 is sparse and no full layer comes before it"),
  "k_over_e": ("model.moe.experts_per_token=9", "experts_per_token=9 exceeds"),
  "heldout": ("data.heldout_fraction=1", "heldout_fraction is 1; it must be between 0 and 1"),
  "beta": ("optim.b2=1.5", "b2 is 1.5; it must be between 0 and 1"),
  "accum": ("train.grad_accum=3", "batch_size=8 is not a multiple of train.grad_accum=3"),
  "chunk": ("train.loss_chunk=100", "seq_len=512 is not a multiple of train.loss_chunk=100"),
  "warmup": ("train.steps=10", "warmup_steps=100 exceeds train.steps=10"),
  "two_fills": ("mesh.data=-1", "only one axis can be -1"),
  "context": ("mesh.context=2", "must be 1"),
  "mesh_0": ("mesh.tensor=0", "mesh.tensor is 0; it must be at least 1, or -1"),
}


@pytest.mark.parametrize("assignment,message", BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_bad_overrides_are_one_line(assignment, message):
  base = MOE if assignment != "model.attention=full" else config.override(
    MOE, "model.local_shares_kv=True")
  with pytest.raises(UserError) as caught:
    config.override(base, assignment)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_override_of_an_absent_section():
  with pytest.raises(UserError, match="moe is not set in this config; .*configs/tiny_moe.py"):
    config.override(Config(), "model.moe.d_ff=3")


def test_swa_needs_its_window():
  with pytest.raises(UserError, match="leaves attention='swa' with no attention at all"):
    ModelConfig(attention="swa", local_branch=False)


def test_layer_pattern_80b():
  cfg = ModelConfig(num_layers=49, sparse_per_full=11)
  full = [i for i, kind in enumerate(cfg.layer_kinds) if kind == "full"]
  assert full == [0, 12, 24, 36, 48]
  assert cfg.layer_groups == (LayerGroup(4, (LayerRun("sparse", 11),)), LayerGroup(1, ()))


def test_layer_pattern_7b():
  cfg = ModelConfig(num_layers=36, sparse_per_full=3)
  full = [i for i, kind in enumerate(cfg.layer_kinds) if kind == "full"]
  assert full == [*range(0, 33, 4), 35]
  assert cfg.layer_groups == (LayerGroup(8, (LayerRun("sparse", 3),)),
                              LayerGroup(1, (LayerRun("sparse", 2),)), LayerGroup(1, ()))


def test_layer_pattern_of_hysparse2():
  """Twelve windows, full, twelve windows, then four blocks of one full and five sparse layers."""
  cross = " ".join(["full" + 5 * " sparse"] * 4)
  cfg = config.override(Config(), "model.num_layers=49", "model.pattern=" + (
    12 * "window " + "full " + 12 * "window " + cross), "model.rope.fraction=0",
    "model.rope_window.fraction=0.25").model
  assert cfg.layer_groups == (
    LayerGroup(1, (LayerRun("window", 12),), has_full=False),
    LayerGroup(1, (LayerRun("window", 12),)), LayerGroup(4, (LayerRun("sparse", 5),)))
  assert dataclasses.replace(cfg, attention="swa").layer_kinds.count("window") == 44
  assert dataclasses.replace(cfg, attention="full").layer_groups == (LayerGroup(49, ()),)


@pytest.mark.parametrize("attention,kinds", [
  ("hysparse", "window full sparse window sparse full full sparse"),
  ("swa", "window full window window window full full window"), ("full", "full " * 8)])
def test_attention_keeps_what_it_says_of_a_pattern(attention, kinds):
  cfg = ModelConfig(pattern="window full sparse window sparse full full sparse",
                    attention=attention)
  assert cfg.layer_kinds == tuple(kinds.split())
  assert sum((group.kinds * group.count for group in cfg.layer_groups), ()) == cfg.layer_kinds


@pytest.mark.parametrize("attention,between", [("hysparse", "sparse"), ("swa", "window"),
                                               ("full", "full")])
@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 9, 13])
@pytest.mark.parametrize("M", [0, 1, 3, 20])
def test_groups_spell_the_layers(L, M, attention, between):
  cfg = ModelConfig(attention=attention, num_layers=L, sparse_per_full=M)
  kinds = [kind for group in cfg.layer_groups for kind in group.kinds * group.count]
  assert tuple(kinds) == cfg.layer_kinds
  assert kinds == ["full" if attention == "full" or i % (M + 1) == 0 or i == L - 1 else between
                   for i in range(L)]


@pytest.mark.parametrize("fields,local,owns", [
  ({}, True, True),
  (dict(local_branch=False), False, False),
  (dict(local_shares_kv=True), True, False),
])
def test_branches_of_each_kind(fields, local, owns):
  cfg = ModelConfig(**fields)
  assert (cfg.has_local_branch("sparse"), cfg.owns_kv("sparse")) == (local, owns)
  assert cfg.has_local_branch("window") and cfg.owns_kv("window")
  assert cfg.owns_kv("full") and not cfg.has_local_branch("full")


def test_derived_sizes():
  cfg = ModelConfig(num_heads=12, num_kv_heads=3, head_dim=32, selected_tokens=256, block_size=64)
  assert (cfg.group_size, cfg.v_dim, cfg.num_blocks) == (4, 32, 4)
  assert dataclasses.replace(cfg, value_head_dim=10).v_dim == 10


@pytest.mark.parametrize("cfg", [Config(), MOE], ids=["dense", "moe"])
def test_dict_round_trip_through_json(cfg):
  assert config.from_dict(json.loads(json.dumps(config.to_dict(cfg)))) == cfg


def test_from_dict_names_unknown_fields_and_rechecks():
  values = config.to_dict(MOE)
  values["model"]["moe"]["capacity"] = 1.0
  with pytest.raises(UserError, match=r"config.model.moe has unknown fields \['capacity'\]"):
    config.from_dict(values)
  with pytest.raises(UserError, match="window is 0"):
    config.from_dict({"model": {"window": 0}})


def test_the_config_of_an_older_run_still_loads():
  values = config.to_dict(MOE)
  for name in ("pattern", "rope", "rope_window"):
    del values["model"][name]
  values["model"]["rope_base"] = 640_000.0
  assert config.from_dict(values) == config.override(MOE, "model.rope.base=640000.0")
  assert "rope_base" in values["model"]           # the caller's dict is left as it was


def test_text_holds_every_field_and_overrides_rebuild_it():
  target = config.override(config.override(MOE, "model.rope.base=640000.0"), "data.source=a b")
  rebuilt = MOE
  for line in config.to_text(target).splitlines():
    name, _, value = line.partition(" = ")
    rebuilt = config.override(rebuilt, f"{name}={value}")
  assert rebuilt == target
  assert "model.moe.d_ff = 16" in config.to_text(target).splitlines()


BAD_FILES = {
  "absent": (None, "no config file"),
  "syntax": ("def get_config(:\n", "invalid syntax"),
  "empty": ("x = 1\n", "defines no get_config"),
  "wrong_type": ("def get_config(arg=None):\n  return 3\n", "get_config returned int"),
  "moved": ("from hysparse_jax.config import ModelConfig\ndef get_config(arg=None):\n"
            "  return ModelConfig(rope_base=3)\n", "model.rope_base is now model.rope.base"),
  "no_argument": ("def get_config():\n  return 3\n", "takes 0 positional arguments"),
}


@pytest.mark.parametrize("text,message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_config_files(text, message, tmp_path):
  path = tmp_path / "mine.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(UserError) as caught:
    config.load(f"{path}:arg")
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_load_passes_the_argument(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("from hysparse_jax.config import Config, ModelConfig\n"
                  "def get_config(arg='full'):\n"
                  "  return Config(model=ModelConfig(attention=arg))\n")
  assert config.load(str(path)).model.attention == "full"
  assert config.load(f"{path}:swa").model.attention == "swa"
