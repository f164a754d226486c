"""Compiles the training and decoding steps of a config for a TPU slice, on a machine without one.

    python -m experiments.compile_tpu --config=configs/hysparse_7b.py --set model.num_layers=4 \
        --set data.batch_size=4 --topology=v5p:2x2x1 --mesh=fsdp=2,tensor=2 [--step=train,decode]
        [--cache_tokens=32768] [--json]

Says for each step what a device needs of its memory, and fails where the TPU compiler would: VMEM
of a kernel, HBM of the step. `libtpu` (requirements-dev.txt) is the compiler. Nothing runs.
"""

import time

import jax
import jax.numpy as jnp
from absl import flags

from hysparse_jax import config, sharding
from hysparse_jax.data.batches import Batch
from hysparse_jax.errors import UserError
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.training import step as train_step
from pallas_kernels import tpu

from . import cli

STEPS = ("train", "prefill", "decode")

for _flag in (cli.CONFIG, cli.SET, cli.MESH, cli.JSON):
  flags.declare_key_flag(_flag)
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "Slice as libtpu names it: v5e:2x2, "
                                                         "v5p:2x2x1, v6e:2x2, v5p:8x8x8, ...")
_STEP = flags.DEFINE_list("step", ["train", "decode"], "Which of " + ", ".join(STEPS))
_CACHE_TOKENS = flags.DEFINE_integer("cache_tokens", 32_768, "Of prefill and decode.",
                                     lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 2048, "Tokens that prefill takes at once.", lower_bound=1)


def lower(step: str, cfg: config.Config, mesh: jax.sharding.Mesh, tokens: int, chunk: int):
  """One step of `cfg` over `mesh`, traced and lowered for its devices, which may be absent.

  Args:
    step: "train" (donates its state), "prefill" or "decode" (donate the cache).
    cfg: its batch_size sequences, over all devices.
    mesh: of `tpu.topology` or of real devices.
    tokens: room of the cache.
    chunk: tokens of a prefill call.
  """
  rows = sharding.batch_sharding(mesh)
  B, T = cfg.data.batch_size, cfg.data.seq_len
  described = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  if step == "train":
    program = train_step.build(cfg, mesh)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=rows)
    with described:
      return program.step.lower(program.abstract_state, Batch(ids, ids, ids, ids, weights))
  sharding.check_divisible(cfg, mesh)
  model = train_step.abstract_model(cfg, mesh)
  cache = jax.eval_shape(lambda: kv_cache.init_cache(cfg.model, B, tokens))
  places = kv_cache.shardings(cache, mesh)
  cache = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                       cache, places)
  if step == "decode":
    new = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=places.length)
    call = lambda model, new, cache: model.decode(new, cache)
  else:
    new = jax.ShapeDtypeStruct((B, chunk), jnp.int32, sharding=rows)
    call = lambda model, new, cache: model.prefill(new, cache)
  with described:
    return jax.jit(call, donate_argnums=2, out_shardings=(None, places)).lower(model, new, cache)


def main(argv):
  """Compiles what the flags name."""
  del argv
  if not _STEP.value:
    raise UserError(f"--step is empty; give some of {', '.join(STEPS)}")
  cfg = cli.load_config()
  unknown = sorted(set(_STEP.value) - set(STEPS))
  if unknown:
    raise UserError(f"--step: got {','.join(unknown)}, want some of {', '.join(STEPS)}")
  try:
    devices = tpu.topology(_TOPOLOGY.value).devices
  except (RuntimeError, ValueError) as error:
    raise UserError(f"--topology={_TOPOLOGY.value}: {error}") from error
  mesh = sharding.make_mesh(cfg.mesh, devices)
  for step in _STEP.value:
    start = time.perf_counter()
    lowered = lower(step, cfg, mesh, _CACHE_TOKENS.value, _CHUNK.value)
    try:
      memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
      raise UserError(f"{step} does not fit {_TOPOLOGY.value}: {error}") from error
    row = {
      "step": step, "topology": _TOPOLOGY.value,
      "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
      "argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes,
      "peak_bytes": memory.peak_memory_in_bytes,
      "compile_seconds": round(time.perf_counter() - start, 1)}
    split = ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items()) or "one device"
    print(cli.to_json(row) if cli.JSON.value else
          f"{step:8} {_TOPOLOGY.value} {split}: {row['peak_bytes'] / 2**30:.2f} GiB a device "
          f"({row['argument_bytes'] / 2**30:.2f} arguments, {row['temp_bytes'] / 2**30:.2f} "
          f"temporaries), compiled in {row['compile_seconds']} s", flush=True)


if __name__ == "__main__":
  cli.run(main)
