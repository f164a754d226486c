"""`experiments.compile_tpu`: a model's steps with its kernels, compiled for a TPU slice."""

import dataclasses
import importlib.util

import pytest

from experiments import compile_tpu
from hysparse_jax import config, sharding
from pallas_kernels import tpu

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not published for this platform")


def test_steps_compile_over_a_slice():
  cfg = config.override(
    config.load("configs/hysparse_7b.py"), "model.num_layers=3", "model.d_model=256",
    "model.num_heads=4", "model.num_kv_heads=2", "model.d_ff=256", "model.vocab_size=512",
    "data.seq_len=1024", "data.batch_size=4", "mesh.fsdp=2", "mesh.tensor=2")
  mesh = sharding.make_mesh(cfg.mesh, tpu.topology("v5p:2x2x1").devices)
  train = compile_tpu.lower("train", cfg, mesh, tokens=2048, chunk=256)
  text = train.as_text()
  for kernel in ("oracle_attention_forward", "block_sparse_forward", "block_sparse_backward",
                 "attention_backward"):
    assert f'kernel_name = "{kernel}"' in text
  memory = train.compile().memory_analysis()
  # The state is split four ways and donated: what goes in comes out in place.
  assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
  cache = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=8))
  sizes = {}
  for room in (2048, 4096):
    decode = compile_tpu.lower("decode", cache, mesh, tokens=room, chunk=256)
    text = decode.as_text()
    for kernel in ("paged_oracle_attention", "paged_sparse_layer_attention"):
      assert f'kernel_name = "{kernel}"' in text
    memory = decode.compile().memory_analysis()
    sizes[room] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  # Only the full layers' KV grows: 2 of 3 layers, K and V, 4 rows and 1 head to a device, bf16.
  growth = 2048 * 2 * 2 * 4 * 128 * 2
  assert sizes[4096][0] - sizes[2048][0] == growth
  # The kernels read the cache in place: a copy of one layer's keys would be a quarter of it.
  assert sizes[4096][1] - sizes[2048][1] < growth // 8
