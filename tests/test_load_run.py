"""Loading weights: any mesh, bfloat16, and 64-bit JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hysparse_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MoeConfig
from hysparse_jax.errors import UserError
from hysparse_jax.inference.load import load_run, with_dtype
from hysparse_jax.inference.sampling import generate
from hysparse_jax.sharding import make_mesh
from hysparse_jax.training import run
from hysparse_jax.training.checkpoint import Checkpoints
from tests.weights import drawn


def config(dtype):
  return Config(model=ModelConfig(
    num_layers=3, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16, sparse_per_full=1,
    block_size=8, selected_tokens=16, window=8, qk_norm=True, dtype=dtype,
    moe=MoeConfig(4, 2, 8, bias_update_rate=0.1)), data=DataConfig(seq_len=64, batch_size=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder, cfg = tmp_path_factory.mktemp("run"), config("float32")
  run.write_config(folder, cfg)
  with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, {"model": drawn(cfg.model)}, {}, block=True)
  return folder


def test_a_mesh_of_four_says_what_one_device_says(saved):
  prompt = np.random.default_rng(0).integers(0, 256, (1, 20))
  want = generate(load_run(saved).model, prompt, 6, seed=1)
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
  loaded = load_run(saved, mesh=mesh)
  assert len(loaded.model.embedding[...].sharding.device_set) == 4
  assert loaded.model.embedding[...].addressable_shards[0].data.shape == (128, 8)
  np.testing.assert_array_equal(generate(loaded.model, prompt, 6, seed=1), want)
  with pytest.raises(UserError, match="num_heads=2 cannot be split over mesh tensor=4"):
    load_run(saved, mesh=make_mesh(MeshConfig(fsdp=1, tensor=4), jax.devices()[:4]))


def test_bfloat16_weights(saved):
  model = load_run(saved, dtype="bfloat16").model
  kept = {jax.tree_util.keystr(path).split("'")[-2] if "'" in jax.tree_util.keystr(path) else
          jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(model)
          if leaf.dtype == jnp.float32}
  assert kept and all(any(word in name for word in ("norm", "sinks", "router")) for name in kept)
  assert model.embedding[...].dtype == model.head[...].dtype == jnp.bfloat16
  with pytest.raises(UserError, match="dtype is 'int8'; allowed"):
    load_run(saved, dtype="int8")


def test_bfloat16_weights_change_no_logit_of_a_bfloat16_model():
  model = drawn(config("bfloat16").model)
  tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
  logits = jax.jit(lambda model, tokens: model(tokens))
  np.testing.assert_array_equal(logits(with_dtype(model, "bfloat16"), tokens),
                                logits(model, tokens))


def test_prefill_and_decode_in_64_bit_jax():
  prompt = np.random.default_rng(0).integers(0, 256, (2, 20))
  model = drawn(config("float32").model)
  want = generate(model, prompt, 4, temperature=0)
  with jax.enable_x64(True):
    np.testing.assert_array_equal(generate(model, prompt, 4, temperature=0), want)
    cache = model.init_cache(2, 32)
    assert model.prefill(jnp.asarray(prompt, jnp.int32), cache)[0].dtype == jnp.float32
