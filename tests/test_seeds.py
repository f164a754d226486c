"""Seeds of up to 63 bits."""

import jax
import numpy as np

from hysparse_jax.config import ModelConfig
from hysparse_jax.inference import sampling
from hysparse_jax.seeds import key_of

HIGH = (2**32, 2**32 + 7, 2**33 + 7, 2**62, 2**63 - 1)


def words(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_seeds_below_32_bits_keep_their_draws():
  for seed in (0, 7, 2**31, 2**32 - 1):
    assert words(key_of(seed)) == words(jax.random.key(seed))


def test_seeds_that_differ_in_their_upper_bits_alone_differ():
  found = {words(key_of(seed)) for seed in (0, 7, 2**32 - 1, *HIGH)}
  assert len(found) == 3 + len(HIGH)
  with jax.enable_x64(True):
    assert {words(key_of(seed)) for seed in (0, 7, 2**32 - 1, *HIGH)} == found


def test_generation_draws_from_all_bits_of_its_seed(monkeypatch):
  class Model:
    cfg = ModelConfig(vocab_size=256)

  monkeypatch.setattr(sampling, "mesh_of", lambda model: None)
  monkeypatch.setattr(sampling, "_generate", lambda *args, **_: words(args[4]))
  drawn = {sampling.generate(Model(), [[1]], 1, seed=seed) for seed in (7, 2**32 + 7, 2**33 + 7)}
  assert len(drawn) == 3
