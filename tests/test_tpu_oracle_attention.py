"""`oracle_attention` on TPU against the reference, in strict TPU interpret mode."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu import forward as forward_kernel
from pallas_kernels.causal_attention_tpu import tiles as tpu_attention
from pallas_kernels.oracle_attention import reference
from pallas_kernels.oracle_attention.tpu import op as mosaic_tpu
from tests import tpu_interpret
from tests.attention_inputs import normal, packed_segments, qkv, small_integers
from tests.older import older
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

SCALE = 0.1


def both(segments=None, block_size=16, num_blocks=3, scale=SCALE,
         interpret=tpu_interpret.INTERPRET):
  """Kernel and reference as compiled functions (q, k, v) -> (out, indices)."""
  segments = None if segments is None else jnp.asarray(segments)
  options = dict(block_size=block_size, num_blocks=num_blocks, scale=scale, query_offset=0,
                 segment_ids=segments, kv_segment_ids=segments)
  return (jax.jit(functools.partial(mosaic_tpu.oracle_attention, interpret=interpret, **options)),
          jax.jit(functools.partial(reference.oracle_attention, **options)))


# batch, tokens, heads, kv_heads, head dim, v dim, dtype, block size, picks, padded tokens or None
CASES = {
  "group of 1, ragged": (2, 290, 1, 1, 64, 64, "float32", 16, 3, None),
  "group of 4, documents": (1, 250, 4, 1, 128, 128, "bfloat16", 16, 16, 30),
  "group of 8, wide": (1, 150, 8, 1, 256, 256, "float32", 8, 5, 11),
  "group of 16": (1, 256, 16, 1, 64, 64, "bfloat16", 8, 16, None),
  "two kv heads, other v dim": (1, 180, 6, 2, 40, 72, "float32", 24, 1, 7),
}


@pytest.mark.parametrize("case", older(
  CASES, "group of 4, documents", "two kv heads, other v dim"))
def test_values_gradients_and_indices(case, monkeypatch):
  B, T, N, K, H, E, dtype, block_size, picks, padding = CASES[case]
  tpu_interpret.small_tiles(monkeypatch)
  segments = None if padding is None else packed_segments(3, B, T, padding=padding)
  inputs = qkv(1, B, T, N, K, H, E, dtype=dtype)
  cotangent = normal(5, B, T, N, E, dtype=dtype)
  cores = tpu_interpret.TWO_CORES if B * K > 1 else tpu_interpret.INTERPRET
  kernel, plain = both(segments, block_size, picks, interpret=cores)
  (out, indices), grads = tpu_interpret.value_and_grads(kernel, inputs, cotangent)
  (want, want_indices), want_grads = tpu_interpret.value_and_grads(
    plain, tpu_interpret.as_float32(inputs), cotangent)
  assert out.dtype == dtype
  tpu_interpret.assert_like_reference(out, want, dtype)
  np.testing.assert_array_equal(indices, want_indices)
  for grad, want_grad in zip(grads, want_grads):
    assert grad.dtype == dtype
    tpu_interpret.assert_like_reference(grad, want_grad, dtype, grad=True)
  if segments is not None:
    assert (np.asarray(out)[segments == 0] == 0).all()
    assert (np.asarray(indices).transpose(0, 2, 1, 3)[segments == 0] == -1).all()


def test_default_tiles_and_blocks_of_64():
  inputs = qkv(2, 1, 1030, 2, 1, 64)
  kernel, plain = both(None, 64, 16)
  out, indices = kernel(*inputs)
  want, want_indices = plain(*inputs)
  tpu_interpret.assert_like_reference(out, want, "float32")
  np.testing.assert_array_equal(indices, want_indices)


def test_planted_ties_go_to_the_lower_block(monkeypatch):
  """Keys repeat with period 16, so blocks 0, 2, 4, ... hold equal keys and tie exactly.

  72 blocks: ties within and across the 64 that one iteration compares, and across sublanes.
  """
  tpu_interpret.small_tiles(monkeypatch, block_q=256, block_kv=256)
  q = small_integers(5, 1, 576, 2, 8)
  k = jnp.tile(small_integers(6, 1, 16, 1, 8), (1, 36, 1, 1))
  v = normal(7, 1, 576, 1, 8)
  kernel, plain = both(None, 8, 11, scale=1.0)
  out, indices = kernel(q, k, v)
  want, want_indices = plain(q, k, v)
  np.testing.assert_array_equal(indices, want_indices)
  tpu_interpret.assert_like_reference(out, want, "float32")
  assert (np.diff(indices[0, 0, -1]) == 2).all()      # the last query: 11 of 36 equal blocks


def test_all_keys_equal_picks_the_first_blocks():
  q, k = small_integers(8, 1, 80, 4, 8), jnp.ones((1, 80, 2, 8))
  _, indices = both(None, 8, 3)[0](q, k, k)
  np.testing.assert_array_equal(
    indices[0, 1], [[i if i <= t // 8 else -1 for i in range(3)] for t in range(80)])


def test_weights_that_underflow_keep_their_order():
  """Block i's logits are -200 i: every weight but block 0's is 0 in float32."""
  logits = -200.0 * np.asarray([0, 5, 2, 9, 1, 7])
  k = jnp.asarray(np.repeat(logits, 8), jnp.float32)[None, :, None, None]
  q, v = jnp.ones((1, 48, 1, 1)), normal(9, 1, 48, 1, 1)
  _, indices = both(None, 8, 3, scale=1.0)[0](q, k, v)
  np.testing.assert_array_equal(indices[0, 0, 47], [0, 2, 4])
  np.testing.assert_array_equal(indices[0, 0, 31], [0, 1, 2])


def test_a_segment_that_comes_back_is_one_segment(monkeypatch):
  tpu_interpret.small_tiles(monkeypatch)
  segments = np.repeat([[3, 1, 0, 3, 2, 1]], 35, axis=1).astype(np.int32)
  inputs = qkv(4, 1, 210, 2, 1, 16)
  kernel, plain = both(segments, 8, 12)
  out, indices = kernel(*inputs)
  want, want_indices = plain(*inputs)
  tpu_interpret.assert_like_reference(out, want, "float32")
  np.testing.assert_array_equal(indices, want_indices)


@pytest.mark.parametrize("seed", range(4))
def test_key_tile_bounds(seed):
  """Nothing visible before the first tile, all visible from the second up to the diagonal."""
  tiles = tpu_interpret.ForwardTiles(128, 256 if seed % 2 else 128, block_kv_compute=128)
  segments = np.sort(np.random.default_rng(seed).integers(0, 3, size=(2, 1024)), axis=1)
  if seed == 3:
    segments[:, 300:600] = 0
    segments[0] = segments[0, ::-1]
  segments = segments.astype(np.int32)
  origin = jnp.zeros(2, jnp.int32)
  first, clear, diagonals, *_ = np.asarray(forward_kernel.tile_bounds(
    origin, 1024, 1024, tiles, None, jnp.asarray(segments), jnp.asarray(segments)))
  seen = np.tril((segments[:, :, None] == segments[:, None]) & (segments[:, :, None] != 0))
  seen = seen.reshape(2, 8, 128, 1024 // tiles.block_kv, tiles.block_kv)
  some, every = seen.any((2, 4)), seen.all((2, 4))
  for b, i in np.ndindex(2, 8):
    diagonal = i * 128 // tiles.block_kv
    assert diagonals[b, i] == diagonal
    assert not some[b, i, :first[b, i]].any() and first[b, i] <= diagonal
    if (np.diff(segments[b]) >= 0).all():
      assert some[b, i, first[b, i]] or first[b, i] == diagonal
    assert every[b, i, clear[b, i]:diagonal].all()
    assert clear[b, i] == 0 or clear[b, i] >= diagonal or not every[b, i, clear[b, i] - 1]
  windowed = np.asarray(forward_kernel.tile_bounds(origin, 1024, 1024, tiles, 200))[0]
  np.testing.assert_array_equal(
    windowed, np.tile([max(i * 128 - 199, 0) // tiles.block_kv for i in range(8)], (2, 1)))


@pytest.mark.parametrize("block_q, block_kv, num_tiles, parts, window, offset, num_keys", [
  (128, 256, 6, 1, None, 0, 768), (128, 128, 5, 3, None, 0, 640), (256, 128, 1, 2, None, 0, 256),
  (128, 512, 8, 4, None, 0, 1024), (128, 128, 5, 2, 200, 0, 640), (256, 128, 3, 1, 1, 0, 768),
  (128, 256, 5, 2, None, 333, 1000), (128, 128, 4, 1, None, 1024, 1100),
  (256, 128, 3, 1, 130, 77, 900), (128, 128, 2, 1, 5, 2000, 600)])
@pytest.mark.parametrize("traced", [False, True])
def test_every_tile_is_walked_once(block_q, block_kv, num_tiles, parts, window, offset, num_keys,
                                   traced):
  """In one run of steps for each tile, part by part, from its first key tile to its last."""
  tiles = tpu_interpret.ForwardTiles(block_q, block_kv, block_kv_compute=block_kv)
  walk = forward_kernel.GridWalk(tiles, num_tiles, -(-num_keys // block_kv), parts, window,
                                 None if traced else offset)
  rows, steps = walk.grid()
  first, _, _, last, position = np.asarray(forward_kernel.tile_bounds(
    jnp.full(1, offset, jnp.int32), num_tiles * block_q, num_keys, tiles, window))[:, 0]
  seen = []
  for row in range(rows):
    found = walk.at(jnp.full(steps, row), jnp.arange(steps))
    i, part, step = (np.broadcast_to(x, steps) for x in found)
    j = first[i] + step
    live = j <= last[i]
    exact = walk.paired and not num_tiles % 2 and offset + num_tiles * block_q <= num_keys
    assert live.all() or not exact                                  # then no step is idle
    seen += np.stack([i, part, j], 1)[live].tolist()
  runs = {i: [(part, j) for tile, part, j in seen if tile == i] for i in range(num_tiles)}
  assert [i for i, _ in itertools.groupby(seen, key=lambda x: x[0])] == list(
    dict.fromkeys(i for i, _, _ in seen))
  for i, run in runs.items():
    assert position[i] == offset + i * block_q
    assert run == [(part, j) for part in range(parts) for j in range(first[i], last[i] + 1)]
    tokens = position[i] + np.arange(block_q)
    low = 0 if window is None else tokens[0] - window + 1
    needed = np.arange(max(low, 0), min(tokens[-1] + 1, num_keys)) // block_kv
    assert set(needed.tolist()) <= set(range(first[i], last[i] + 1))


def test_no_blocks_is_plain_causal_attention():
  inputs = qkv(10, 2, 65, 4, 2, 16)
  kernel, plain = both(None, 7, 0)
  out, indices = kernel(*inputs)
  assert indices.shape == (2, 2, 65, 0) and indices.dtype == jnp.int32
  tpu_interpret.assert_like_reference(out, plain(*inputs)[0], "float32")


@pytest.mark.parametrize("names, kernels", [
  ((), 3), (("oracle_out", "oracle_lse", "oracle_block_indices"), 2)])
def test_saved_names_spare_the_forward_kernel_under_remat(names, kernels):
  def loss(q):
    out, picked = mosaic_tpu.oracle_attention(
      q, q, q, block_size=64, num_blocks=4, segment_ids=None, scale=SCALE)
    return jnp.sin(out).sum() + picked.sum()

  policy = jax.checkpoint_policies.save_only_these_names(*names)
  step = jax.value_and_grad(jax.checkpoint(loss, policy=policy))
  text = tpu.lower_for("v5e", step, jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.float32)).as_text()
  assert text.count("@tpu_custom_call") == kernels


def test_tiles_fit_the_smallest_vmem():
  for tokens, group in ((8192, 4), (131072, 4), (131072, 16), (2**20, 4), (2**20, 16)):
    tiles = tpu_attention.forward_tiles(tokens, tokens, group, 512, block_size=64, num_blocks=16)
    held = tiles.heads + (tiles.heads < group)
    assert 4 * held * tokens // 64 * tiles.block_q <= 0.6 * 2**26
    assert group % tiles.heads == 0
  with pytest.raises(NotImplementedError, match="S=33554432 has 524288 blocks of 64"):
    tpu_attention.forward_tiles(1, 2**25, 4, 512, block_size=64, num_blocks=16)


@pytest.mark.parametrize("change, message", [
  (dict(dtype="float16"), "q, k, v are float16; wanted all bfloat16 or all float32"),
  (dict(head_dim=264), "head dim 264; wanted at most 256"),
  (dict(block_size=7), "block_size=7; wanted a multiple of 8"),
  (dict(block_size=512), "block_size=512; wanted a multiple of 8"),
])
def test_what_is_not_covered_is_named(change, message):
  x = jnp.zeros((1, 16, 1, change.get("head_dim", 8)), change.get("dtype", "float32"))
  with pytest.raises(NotImplementedError) as error:
    pallas_kernels.oracle_attention(x, x, x, block_size=change.get("block_size", 8),
                                    implementation="mosaic_tpu")
  assert message in str(error.value) and "\n" not in str(error.value)
