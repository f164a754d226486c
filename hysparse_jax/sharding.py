"""One mesh, one table from logical axes to mesh axes, one from arguments of ops to logical axes.

Parameters carry logical names (`layers.weight`), activations name theirs where they are
constrained, optimizer moments mirror the parameters, and the arguments of an attention op go by
their own names. A mesh axis of size 1 changes nothing, so one device and a pod run the same
program.
"""

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hysparse_jax.config import MESH_AXES, Config, MeshConfig
from hysparse_jax.errors import UserError

BATCH_AXES = ("data", "fsdp", "expert")

RULES = {
  "embed": "fsdp",          # D of every weight: gathered before use, its gradient scattered
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "expert": "expert",
  "batch": BATCH_AXES,      # outside the experts, the expert axis is one more batch axis
  "seq": "context",
}

TOKENS = ("batch", "seq")
STREAM = ("batch", "seq", None)
HEADS = ("batch", "seq", "heads", None)
KV = ("batch", "seq", "kv_heads", None)
SELECTED = ("batch", "kv_heads", "seq", None)

# Logical axes of the arguments and results of attention ops, the same whichever op has them. They
# are the last axes of an array: axes stacked in front, such as a cache's layers, are not split. Of
# a plan they are the leading axes of every leaf.
OPERANDS = {
  **dict.fromkeys(("q", "gate_sparse", "gate_local", "out"), HEADS),
  **dict.fromkeys(("k", "v", "k_local", "v_local"), KV),
  "block_indices": SELECTED,
  "plan": ("batch", "kv_heads"),
  **dict.fromkeys(("sinks", "sinks_sparse", "sinks_local"), ("heads",)),
  **dict.fromkeys(("segment_ids", "kv_segment_ids", "local_kv_segment_ids", "query_positions",
                   "valid"), TOKENS),
  **dict.fromkeys(("query_offset", "local_query_offset", "lengths"), ("batch",)),
  # A row's pages lie with the row, and its page table counts from the first page of the shard.
  **dict.fromkeys(("k_pages", "v_pages", "k_ring", "v_ring"),
                  (None, "batch", "kv_heads", None, None)),
  "page_table": ("batch", None),
  **dict.fromkeys(("layer", "ring_layer"), ()),
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
  """The mesh over `devices` (default: all) with the axes `config.MESH_AXES`.

  Raises:
    UserError: the axis sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(cfg, axis) for axis in MESH_AXES]
  given = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes:
    if len(devices) % known:
      raise UserError(f"mesh {given}: {known} does not divide the {len(devices)} devices here")
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise UserError(f"mesh {given} needs {math.prod(sizes)} devices, here are {len(devices)}; "
                    "change mesh, or set one axis to -1 to fill up")
  return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES,
              axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_divisible(cfg: Config, mesh: Mesh, *, rows: bool = True):
  """Raises a UserError naming the first size of the model, or of a batch (`rows`), that the mesh
  cannot split."""
  model, size = cfg.model, mesh.shape
  wanted = [
    ("model.num_heads", model.num_heads, "tensor", size["tensor"]),
    ("model.num_kv_heads", model.num_kv_heads, "tensor", size["tensor"]),
    ("model.vocab_size", model.vocab_size, "tensor", size["tensor"]),
    ("model.d_model", model.d_model, "fsdp", size["fsdp"]),
  ]
  if rows:
    wanted.append(("data.batch_size / train.grad_accum",
                   cfg.data.batch_size // cfg.train.grad_accum, "data * fsdp * expert",
                   math.prod(size[axis] for axis in BATCH_AXES)))
  if model.moe is None:
    wanted.append(("model.d_ff", model.d_ff, "tensor", size["tensor"]))
    if size["expert"] > 1:
      raise UserError(f"mesh.expert is {size['expert']}, but the model has no experts; "
                      "use data or fsdp")
  else:
    wanted.append(("model.moe.d_ff", model.moe.d_ff, "tensor", size["tensor"]))
    wanted.append(("model.moe.num_experts", model.moe.num_experts, "expert", size["expert"]))
  for field, value, axis, parts in wanted:
    if value % parts:
      raise UserError(f"{field}={value} cannot be split over mesh {axis}={parts}; "
                      "choose sizes that divide it")


def spec(names) -> PartitionSpec:
  """`("batch", "seq", None)` -> the PartitionSpec of those logical axes.

  Raises:
    ValueError: a name that is not in RULES.
  """
  for name in names:
    if name is not None and name not in RULES:
      raise ValueError(f"{name!r} is not a logical axis; use one of {', '.join(RULES)}, or None")
  return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def shardings(tree, mesh: Mesh):
  """A NamedSharding for every leaf of a tree of modules, optimizer states and arrays.

  Names on an `nnx.Param` describe its trailing dims; stack axes in front are not split, and leaves
  without names are replicated. Works on real arrays and on the result of `jax.eval_shape`.
  """
  def resolve(leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, PartitionSpec())
    names = leaf.get_metadata().get("out_sharding") or ()
    ndim = len(leaf.get_value().shape)
    if ndim < len(names):    # a statistic reduced over the parameter, not a mirror of it
      names = ()
    stack = (None,) * (ndim - len(names))
    return leaf.replace(NamedSharding(mesh, PartitionSpec(*stack, *spec(names))))

  return jax.tree.map(resolve, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_shards() -> int:
  """Parts that the mesh of `jax.set_mesh` splits rows into; 1 outside of one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays [B, T, ...]: rows over the batch axes."""
  return NamedSharding(mesh, spec(("batch", "seq")))


def constrain(x, *names):
  """Pins an activation to the mesh that `jax.set_mesh` named; outside of one there is nothing to
  pin to."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names))


def sharded(op, *, returns="out", **operands):
  """`op(**operands)` on each device's own shard: kernels are calls that XLA cannot split.

  Args:
    op: a function of keyword arguments; fix its static options with `functools.partial`.
    returns: the name of its result in OPERANDS, or a tuple of names for several results.
    **operands: arrays, pytrees of arrays or None, under their names in OPERANDS.

  Raises:
    ValueError: a name that is not in OPERANDS.
  """
  in_specs = {name: _operand_spec(name, value) for name, value in operands.items()}
  several = isinstance(returns, tuple)
  out_specs = tuple(map(_operand_spec, returns)) if several else _operand_spec(returns)
  if jax.sharding.get_abstract_mesh().empty:
    return op(**operands)
  return jax.shard_map(lambda operands: op(**operands), in_specs=(in_specs,), out_specs=out_specs,
                       check_vma=False)(operands)


def _operand_spec(name, value=None) -> PartitionSpec:
  if name not in OPERANDS:
    raise ValueError(f"{name!r} is not an operand of an attention op; add its logical axes to "
                     "sharding.OPERANDS")
  axes = OPERANDS[name]
  stack = max(0, value.ndim - len(axes)) if hasattr(value, "ndim") else 0
  return spec((None,) * stack + axes)
