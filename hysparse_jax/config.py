"""Frozen configs that check themselves, loaded from a Python file, overridden by `a.b=v`.

A config file defines `get_config(arg=None) -> Config`. `load("configs/tiny.py:arg")` runs it;
`override(cfg, "model.window=64")` returns a copy with one field changed and everything rechecked.
Modules receive their own section whole; nothing is copied from field to field.
"""

import dataclasses
import difflib
import itertools
import pathlib
import types
import typing
from typing import Literal

from hysparse_jax import config_files
from hysparse_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")

IMPLEMENTATIONS = (None, "reference", "mosaic_gpu", "mosaic_tpu", "triton")
RENAMED = {"rope_base": "rope.base"}   # fields of `ModelConfig`; configs of old runs still load


def _require(ok: bool, message: str):
  if not ok:
    raise UserError(message)


class _Checked:
  """Base of the config sections: every `Literal` and numeric field is checked when built."""

  def _check_choices(self):
    section = type(self).__name__
    for name, kind in typing.get_type_hints(type(self)).items():
      value = getattr(self, name)
      if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        _require(value in allowed,
                 f"{section}.{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
      elif not _fits(value, kind):
        raise UserError(f"{section}.{name} is {value!r} ({type(value).__name__}); "
                        f"expected {_spell(kind)}")
      elif isinstance(value, int | float):
        _require(-2**63 < value < 2**63,
                 f"{section}.{name} is {value}; it must be a number of at most 63 bits")

  def _check_at_least(self, minimum, *names):
    for name in names:
      value = getattr(self, name)
      _require(value is None or value >= minimum,
               f"{type(self).__name__}.{name} is {value}; it must be at least {minimum}")

  def _check_unit_interval(self, *names):
    for name in names:
      value = getattr(self, name)
      _require(0.0 <= value <= 1.0,
               f"{type(self).__name__}.{name} is {value}; it must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MoeConfig(_Checked):
  """Mixture-of-experts FFN: a softmax router, the k best experts per token, none dropped."""

  num_experts: int = 512              # E
  experts_per_token: int = 8          # k
  d_ff: int = 512                     # F of one expert
  load_balance_weight: float = 1e-2   # of the load-balancing loss (Switch Transformer, eq. 4)
  router_z_weight: float = 1e-3       # of the router z-loss (ST-MoE, eq. 5)
  bias_update_rate: float = 0.0       # > 0: auxiliary-loss-free balancing by a bias (DeepSeek-V3)
  normalize_weights: bool = True      # the k chosen weights sum to 1

  def __post_init__(self):
    self._check_choices()
    self._check_at_least(1, "num_experts", "experts_per_token", "d_ff")
    self._check_at_least(0, "load_balance_weight", "router_z_weight", "bias_update_rate")
    _require(self.experts_per_token <= self.num_experts,
             f"moe.experts_per_token={self.experts_per_token} exceeds "
             f"moe.num_experts={self.num_experts}; choose at most that many")


@dataclasses.dataclass(frozen=True)
class RopeConfig(_Checked):
  """Rotary position embedding (RoFormer): channel pair i turns by `position * base ** (-2i / R)`.

  `ntk` and `yarn` stretch a model trained on rows of `original_tokens` to `factor` times as many.
  """

  base: float = 10_000.0
  fraction: float = 1.0               # share of a head's channels that turn (R / H); 0: NoPE
  scaling: Literal["none", "ntk", "yarn"] = "none"
  factor: float = 1.0                 # s: tokens at inference / tokens in training
  original_tokens: int = 8192         # yarn: tokens of a row in training
  beta_fast: float = 32.0             # yarn: pairs with more turns per row are not stretched
  beta_slow: float = 1.0              # yarn: pairs with fewer turns per row are stretched s times

  def __post_init__(self):
    self._check_choices()
    self._check_unit_interval("fraction")
    self._check_at_least(1, "factor", "original_tokens")
    _require(self.base > 1, f"rope.base is {self.base}; it must exceed 1")
    _require(self.beta_fast > self.beta_slow > 0,
             f"rope.beta_fast={self.beta_fast} must exceed rope.beta_slow={self.beta_slow}, and "
             "both must be positive")
    _require(self.scaling != "none" or self.factor == 1,
             f"rope.factor={self.factor} does nothing with rope.scaling='none'; use 'ntk' or "
             "'yarn'")

  def rotated_channels(self, head_dim: int) -> int:
    """R, the leading channels of a head that turn."""
    return round(self.fraction * head_dim)


LAYER_KINDS = ("full", "sparse", "window")


@dataclasses.dataclass(frozen=True)
class LayerRun:
  """`count` consecutive layers of one kind, "sparse" or "window"."""

  kind: str
  count: int


@dataclasses.dataclass(frozen=True)
class LayerGroup:
  """`count` equal hybrid blocks in a row: each one full layer, then its runs of other layers.

  Layers before the first full layer are a group of their own, without one.
  """

  count: int
  runs: tuple[LayerRun, ...]
  has_full: bool = True

  @property
  def has_sparse(self) -> bool:
    """Whether a layer of the hybrid block reads the full layer's selected blocks."""
    return any(run.kind == "sparse" for run in self.runs)

  @property
  def kinds(self) -> tuple[str, ...]:
    """The layers of one hybrid block."""
    return ("full",) * self.has_full + tuple(
      run.kind for run in self.runs for _ in range(run.count))


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Checked):
  """The backbone, the layer pattern and the paper's ablations.

  By default layer `i` is full attention iff `i % (sparse_per_full + 1) == 0 or i == num_layers - 1`
  (HySparse section 3.1), and the others are sparse. `pattern` names any other layout, such as
  "window window full sparse sparse full". Of either, `attention` keeps everything ("hysparse"),
  makes the sparse layers sliding-window layers ("swa"), or makes all layers full ("full").
  """

  attention: Literal["hysparse", "full", "swa"] = "hysparse"
  vocab_size: int = 256               # V
  num_layers: int = 8                 # L
  d_model: int = 128                  # D
  num_heads: int = 4                  # N query heads
  num_kv_heads: int = 2               # K
  head_dim: int = 32                  # H of queries and keys
  value_head_dim: int | None = None   # H of values; None: head_dim
  d_ff: int = 384                     # F of the dense SwiGLU; unused when moe is set
  moe: MoeConfig | None = None        # set: every layer's FFN is a mixture of experts
  sparse_per_full: int = 3            # M; unused when pattern is set
  pattern: str | None = None          # one of full, sparse, window per layer; None: the rule above
  block_size: int = 64                # keys in a selectable block
  selected_tokens: int = 1024         # keys selected per token; a multiple of block_size
  window: int = 128                   # tokens the local branch sees, self included
  local_branch: bool = True           # ablation 1: False drops the sliding-window branch
  local_shares_kv: bool = False       # ablation 2: True windows over the full layer's KV
  gate: Literal["elementwise", "per_head", "none"] = "elementwise"
  sinks: bool = True                  # per-head sink logits in sparse and sliding-window layers
  qk_norm: bool = False
  rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
  # A sparse layer's queries meet the full layer's keys, so those two kinds share `rope`.
  rope_window: RopeConfig | None = dataclasses.field(   # None: rope
    default=None, metadata={"starts_from": RopeConfig})
  norm_eps: float = 1e-6
  tied_embeddings: bool = False
  dtype: Literal["bfloat16", "float32"] = "bfloat16"   # compute; weights are kept in float32
  remat: Literal["none", "layer", "block"] = "none"    # what the backward pass recomputes
  block_choice: Literal["oracle", "random", "previous"] = "oracle"  # ablations, see block_choice.py
  implementation: str | None = None   # of every attention op; None picks by platform

  def __post_init__(self):
    self._check_choices()
    self._check_at_least(1, "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads",
                         "head_dim", "value_head_dim", "d_ff", "block_size", "selected_tokens",
                         "window")
    self._check_at_least(0, "sparse_per_full")
    _require(self.num_heads % self.num_kv_heads == 0,
             f"model.num_heads={self.num_heads} is not a multiple of "
             f"model.num_kv_heads={self.num_kv_heads}; every KV head serves the same number of "
             "query heads")
    for name, rope in (("rope", self.rope), ("rope_window", self.rope_window)):
      rotated = 0 if rope is None else rope.rotated_channels(self.head_dim)
      _require(rotated % 2 == 0,
               f"model.{name}.fraction={rope and rope.fraction} of model.head_dim={self.head_dim} "
               f"is {rotated} channels, which is odd; rotary embedding turns pairs of channels")
      _require(rope is None or rope.scaling == "none" or rotated > 2,
               f"model.{name}.scaling={rope and rope.scaling!r} stretches {rotated} channels; "
               "it needs at least 4")
    _require(self.selected_tokens % self.block_size == 0,
             f"model.selected_tokens={self.selected_tokens} is not a multiple of "
             f"model.block_size={self.block_size}; whole blocks are selected")
    _require(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}; it must be positive")
    _require(self.local_branch or self.attention != "swa",
             "model.local_branch=False leaves attention='swa' with no attention at all; "
             "use attention='hysparse'")
    _require(self.block_choice == "oracle" or self.attention == "hysparse",
             f"model.block_choice={self.block_choice!r} needs attention='hysparse'")
    _require(not self.local_shares_kv or (self.attention == "hysparse" and self.local_branch),
             "model.local_shares_kv=True needs attention='hysparse' and local_branch=True")
    _require(self.implementation in IMPLEMENTATIONS, f"model.implementation is "
             f"{self.implementation!r}; allowed: {', '.join(map(repr, IMPLEMENTATIONS))}")
    self._check_pattern()

  def _check_pattern(self):
    if self.pattern is None:
      return
    words = self.pattern.split()
    for word in words:
      _require(word in LAYER_KINDS,
               f"model.pattern names a layer {word!r}; allowed: {', '.join(LAYER_KINDS)}, "
               "separated by spaces")
    _require(len(words) == self.num_layers,
             f"model.pattern names {len(words)} layers and model.num_layers is {self.num_layers}; "
             "make them equal")
    first_sparse = words.index("sparse") if "sparse" in words else len(words)
    _require(first_sparse == len(words) or "full" in words[:first_sparse],
             f"model.pattern: layer {first_sparse} is sparse and no full layer comes before it, "
             "whose KV it would read; put a full layer in front")

  @property
  def group_size(self) -> int:
    """G, query heads per KV head."""
    return self.num_heads // self.num_kv_heads

  @property
  def v_dim(self) -> int:
    """Head dim of the values."""
    return self.head_dim if self.value_head_dim is None else self.value_head_dim

  @property
  def num_blocks(self) -> int:
    """P, key blocks selected per token and KV head."""
    return self.selected_tokens // self.block_size

  def has_local_branch(self, kind: str) -> bool:
    """Whether layers of that kind attend to a sliding window."""
    return kind == "window" or (kind == "sparse" and self.local_branch)

  def owns_kv(self, kind: str) -> bool:
    """Whether layers of that kind project keys and values of their own."""
    return kind == "full" or (self.has_local_branch(kind)
                              and not (kind == "sparse" and self.local_shares_kv))

  def rope_of(self, kind: str) -> RopeConfig:
    """The rotary embedding of that kind's queries and own keys."""
    return self.rope_window if kind == "window" and self.rope_window else self.rope

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """"full", "sparse" or "window" for each of the `num_layers` layers."""
    if self.pattern is not None:
      kinds = self.pattern.split()
    else:
      period, last = self.sparse_per_full + 1, self.num_layers - 1
      kinds = ["full" if i % period == 0 or i == last else "sparse"
               for i in range(self.num_layers)]
    if self.attention == "full":
      return ("full",) * self.num_layers
    if self.attention == "swa":
      return tuple("window" if kind == "sparse" else kind for kind in kinds)
    return tuple(kinds)

  @property
  def layer_groups(self) -> tuple[LayerGroup, ...]:
    """`layer_kinds` run-length coded: what the stack scans over."""
    hybrid_blocks: list[list[str]] = []
    for kind in self.layer_kinds:
      if kind == "full" or not hybrid_blocks:
        hybrid_blocks.append([])
      hybrid_blocks[-1].append(kind)
    groups: list[LayerGroup] = []
    for kinds in hybrid_blocks:
      has_full = kinds[0] == "full"
      runs = tuple(LayerRun(kind, len(list(layers)))
                   for kind, layers in itertools.groupby(kinds[has_full:]))
      if groups and (groups[-1].runs, groups[-1].has_full) == (runs, has_full):
        groups[-1] = dataclasses.replace(groups[-1], count=groups[-1].count + 1)
      else:
        groups.append(LayerGroup(1, runs, has_full))
    return tuple(groups)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
  """What is read, how it becomes tokens, and how documents are packed into rows."""

  source: str = "python_stdlib"       # or a file or folder
  format: Literal["auto", "text", "jsonl", "parquet", "arrayrecord"] = "auto"
  text_field: str = "text"            # of JSONL and parquet records
  tokenizer: str = "byte"             # or the path of a Hugging Face tokenizer.json
  seq_len: int = 512                  # T, tokens per row
  batch_size: int = 8                 # B, rows per optimizer step over all hosts
  packing: bool = True                # several documents per row, kept apart by segment ids
  align_documents: bool = True        # they start at multiples of model.block_size in their row
  heldout_fraction: float = 0.05      # share of documents, by hash, that training never sees
  workers: int = 0                    # reader processes; the batches do not depend on it
  seed: int = 0                       # of the order of documents
  task_share: float = 0.0             # share of rows that are recall tasks instead of text
  tasks: str = "all"                  # of tasks/token_tasks.py, separated by commas
  task_ids: int = 768                 # ids that tasks are spelled with, after the tokenizer's
  task_weight: float = 1.0            # loss weight of a task row's answers; a full text row has 1
  task_context_weight: float = 0.0    # of every other token of a task row; a text token has 1
  task_positions: int = 0             # positions a task sample spreads over; 0: as many as tokens
  task_warmup_steps: int = 0          # while task samples grow from 64 tokens to seq_len

  def __post_init__(self):
    self._check_choices()
    self._check_at_least(2, "seq_len")
    self._check_at_least(1, "batch_size", "task_ids")
    self._check_at_least(0, "workers", "seed", "task_weight", "task_context_weight",
                         "task_positions", "task_warmup_steps")
    self._check_unit_interval("task_share")
    for name, path in (("source", self.source), ("tokenizer", self.tokenizer)):
      _require(path.strip() != "" and "://" not in path,
               f"data.{name} is {path!r}; give a path of this machine, such as that of a mount")
    _require(0.0 < self.heldout_fraction < 1.0,
             f"data.heldout_fraction is {self.heldout_fraction}; it must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Checked):
  """Optimizer and schedule. Learning rates are peaks."""

  optimizer: Literal["adamw", "muon"] = "adamw"
  lr: float = 1e-3                    # of AdamW, and of what Muon leaves to it
  muon_lr: float = 2e-2               # of the matrices under Muon
  schedule: Literal["wsd", "cosine", "constant"] = "wsd"
  warmup_steps: int = 100
  decay_fraction: float = 0.2         # WSD: share of the run in the final linear decay
  final_lr_fraction: float = 0.0      # of the peak, at the last step
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1           # of matrices only
  clip_norm: float = 1.0              # global gradient norm; 0 turns clipping off

  def __post_init__(self):
    self._check_choices()
    self._check_at_least(0, "lr", "muon_lr", "warmup_steps", "weight_decay", "clip_norm")
    self._check_unit_interval("decay_fraction", "final_lr_fraction", "b1", "b2")
    _require(self.eps > 0, f"optim.eps is {self.eps}; it must be positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked):
  """The run: length, loss, what is logged, saved and tolerated."""

  steps: int = 1000
  grad_accum: int = 1                 # micro-batches per optimizer step
  z_loss: float = 0.0                 # weight of mean(logsumexp(logits) ** 2)
  loss_chunk: int = 0                 # tokens per row whose logits exist at once; 0: all
  seed: int = 0                       # of the initial weights
  log_every: int = 10                 # steps
  eval_every: int = 250               # steps; 0: only at the end
  eval_batches: int = 8
  checkpoint_every: int = 250         # steps; 0: only at the end
  keep_checkpoints: int = 3
  spike_factor: float = 10.0          # x the average gradient norm: skip the step; 0: off
  max_bad_steps: int = 5              # consecutive skipped steps that stop the run
  tensorboard: bool = False

  def __post_init__(self):
    self._check_choices()
    self._check_at_least(1, "steps", "grad_accum", "log_every", "eval_batches",
                         "keep_checkpoints", "max_bad_steps")
    self._check_at_least(0, "z_loss", "loss_chunk", "seed", "eval_every", "checkpoint_every",
                         "spike_factor")


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Checked):
  """Devices along each mesh axis; -1 on at most one axis takes what the others leave."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  expert: int = 1
  context: int = 1

  def __post_init__(self):
    self._check_choices()
    sizes = [getattr(self, axis) for axis in MESH_AXES]
    for axis, size in zip(MESH_AXES, sizes):
      _require(size == -1 or size >= 1, f"mesh.{axis} is {size}; it must be at least 1, or -1")
    _require(sizes.count(-1) <= 1, "mesh: only one axis can be -1")
    _require(self.context == 1,
             f"mesh.context is {self.context}; attention is not yet split along the sequence, "
             "so it must be 1")


@dataclasses.dataclass(frozen=True)
class Config(_Checked):
  """Everything a run depends on."""

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def __post_init__(self):
    _require(self.data.batch_size % self.train.grad_accum == 0,
             f"data.batch_size={self.data.batch_size} is not a multiple of "
             f"train.grad_accum={self.train.grad_accum}")
    _require(self.train.loss_chunk == 0 or self.data.seq_len % self.train.loss_chunk == 0,
             f"data.seq_len={self.data.seq_len} is not a multiple of "
             f"train.loss_chunk={self.train.loss_chunk}")
    _require(self.optim.warmup_steps <= self.train.steps,
             f"optim.warmup_steps={self.optim.warmup_steps} exceeds "
             f"train.steps={self.train.steps}")
    self.check_row_length(self.data.seq_len)

  @property
  def document_alignment(self) -> int:
    """Tokens: documents start at multiples of this in their row; 1 is anywhere.

    Key blocks are counted from the start of the row. A document that starts with a key block has
    the same blocks, and so the same selection and logits, as it has in a row of its own.
    """
    return self.model.block_size if self.data.align_documents else 1

  def check_row_length(self, seq_len: int):
    """Raises a UserError if packed rows of `seq_len` tokens cannot keep documents aligned."""
    _require(not self.data.packing or seq_len % self.document_alignment == 0,
             f"rows of {seq_len} tokens are not whole key blocks of model.block_size="
             f"{self.model.block_size}, to which data.align_documents aligns documents; make "
             "data.seq_len a multiple of it, or set data.align_documents=False")


def load(path: str | pathlib.Path, *assignments: str) -> Config:
  """Runs `get_config` of a file (`"mine.py:arg"`) or packaged config (`"tiny"`) and `override`s.

  Raises:
    UserError: no such file, no `get_config`, or a config that fails its checks.
  """
  filename, _, arg = str(path).partition(":")
  file = config_files.find(filename)
  if file is None:
    raise UserError(f"no config file {filename}{config_files.hint(filename)}")
  try:
    cfg = config_files.run(file, arg)
  except UserError:
    raise
  except (Exception, SystemExit) as error:       # whatever somebody's file does
    moved = "".join(f"; model.{old} is now model.{new}" for old, new in RENAMED.items()
                    if f"'{old}'" in str(error))
    raise UserError(config_files.spell(file, error) + moved) from error
  _require(isinstance(cfg, Config), f"{filename}: get_config returned {type(cfg).__name__}, "
                                    "not hysparse_jax.config.Config")
  return override(cfg, *assignments)


def override(cfg, *assignments: str):
  """`override(cfg, "model.window=64", "optim.lr=1e-3")`: a copy with those fields changed.

  Values are type-checked one by one, combinations once all of them are in; later ones win.

  Raises:
    UserError: no such field, a value of the wrong type, or a combination that cannot be.
  """
  edits = []
  for assignment in assignments:
    path, equals, text = assignment.partition("=")
    _require(bool(equals), f"override {assignment!r} has no '='; write it as model.window=64")
    edits.append((path.strip(), path.strip().split("."), text.strip()))
  return _override(cfg, edits)


def _override(section, edits):
  kinds = typing.get_type_hints(type(section))
  changes: dict = {}
  inner: dict[str, list] = {}
  for path, (name, *rest), text in edits:
    if name not in kinds:
      _require(name not in RENAMED or not isinstance(section, ModelConfig),
               f"{path} is now {path.removesuffix(name)}{RENAMED.get(name)}")
      near = difflib.get_close_matches(name, kinds, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise UserError(f"{path}: {type(section).__name__} has no field {name!r}{hint} "
                      f"(fields: {', '.join(kinds)})")
    current = _section(section, name)
    if rest:
      _require(current is not None, f"{path}: {name} is not set in this config; start from one "
                                    "that sets it (for moe: configs/tiny_moe.py)")
      _require(dataclasses.is_dataclass(current), f"{path}: {name} is a value, it has no fields")
      inner.setdefault(name, []).append((path, rest, text))
    else:
      current = getattr(section, name)
      _require(not dataclasses.is_dataclass(current) or text == "None",
               f"{path}: {name} is a section; set one of its fields, such as "
               f"{path}.{next(iter(typing.get_type_hints(type(current))), '')}")
      changes[name] = _parse(text, kinds[name], path)
  for name, its_edits in inner.items():
    changes[name] = _override(_section(section, name), its_edits)
  return dataclasses.replace(section, **changes)


def _section(section, name):
  """The value of a field; where it is None, the section that setting one of its fields starts."""
  value = getattr(section, name)
  start = section.__dataclass_fields__[name].metadata.get("starts_from")
  return start() if value is None and start else value


def _parse(text, kind, path):
  value = config_files.literal(text)
  if not _fits(value, kind) and _fits(text, kind):
    value = text
  _require(_fits(value, kind),
           f"{path}={text}: expected {_spell(kind)}, got {type(value).__name__}")
  return value


def _fits(value, kind) -> bool:
  if typing.get_origin(kind) is Literal:
    return isinstance(value, str)
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  if float in kinds and type(value) is int:
    return True
  return type(value) in kinds


def _spell(kind) -> str:
  if typing.get_origin(kind) is Literal:
    return "one of " + ", ".join(map(repr, typing.get_args(kind)))
  return " or ".join("None" if k is type(None) else k.__name__
                     for k in (typing.get_args(kind) or (kind,)))


def to_dict(cfg) -> dict:
  """The config as nested plain dicts, ready for JSON."""
  return dataclasses.asdict(cfg)


def from_dict(values: dict) -> Config:
  """The inverse of `to_dict`; takes what older versions wrote, rejects unknown fields."""
  model = dict(values.get("model") or {})
  for old, new in RENAMED.items():
    section, field = new.split(".")
    if old in model:
      model[section] = {**model.get(section, {}), field: model.pop(old)}
  return _from_dict(Config, {**values, "model": model}, "config")


def _from_dict(cls, values, path):
  kinds = typing.get_type_hints(cls)
  unknown = sorted(set(values) - set(kinds))
  _require(not unknown, f"{path} has unknown fields {unknown}; it was written by another version")
  built = {}
  for name, value in values.items():
    options = typing.get_args(kinds[name]) or (kinds[name],)
    section = next((k for k in options if dataclasses.is_dataclass(k)), None)
    built[name] = (_from_dict(section, value, f"{path}.{name}")
                   if section is not None and value is not None else value)
  return cls(**built)


def to_text(cfg) -> str:
  """The resolved config, one `a.b = value` per line: what golden files hold and diffs show."""
  lines = []

  def walk(prefix, section):
    for field in dataclasses.fields(section):
      value = getattr(section, field.name)
      if dataclasses.is_dataclass(value):
        walk(f"{prefix}{field.name}.", value)
      else:
        lines.append(f"{prefix}{field.name} = {value!r}")

  walk("", cfg)
  return "\n".join(lines) + "\n"
