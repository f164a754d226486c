"""Sampling: distributions, determinism, chunked prefill, stopping, streaming text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hysparse_jax.config import MeshConfig, ModelConfig
from hysparse_jax.data.tokenizer import ByteTokenizer
from hysparse_jax.errors import UserError
from hysparse_jax.inference import sampling
from hysparse_jax.inference.sampling import generate, generate_text, sample_token
from hysparse_jax.inference.text_stream import TextStream
from hysparse_jax.sharding import make_mesh, shardings
from tests.tolerances import assert_close
from tests.weights import drawn

LOGITS = np.log([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.fixture(scope="module")
def model():
  cfg = ModelConfig(num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
                    sparse_per_full=1, block_size=4, selected_tokens=8, window=8, dtype="float32")
  return drawn(cfg)


@pytest.fixture(scope="module")
def prompt():
  return np.random.default_rng(0).integers(0, 256, (2, 21))


def _frequencies(**settings):
  rows = 20_000
  draws = sample_token(jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (rows, 5)),
                       jax.random.key(3), **settings)
  return np.bincount(np.asarray(draws), minlength=5) / rows


@pytest.mark.parametrize("settings, weights", [
  (dict(), [0.05, 0.4, 0.1, 0.3, 0.15]),
  (dict(temperature=0.5), [0.05**2, 0.4**2, 0.1**2, 0.3**2, 0.15**2]),
  (dict(temperature=2.0), np.sqrt([0.05, 0.4, 0.1, 0.3, 0.15])),
  (dict(top_k=2), [0, 0.4, 0, 0.3, 0]),
  (dict(top_k=9), [0.05, 0.4, 0.1, 0.3, 0.15]),
  (dict(top_p=0.69), [0, 0.4, 0, 0.3, 0]),            # 0.4 is below, 0.7 reaches it
  (dict(top_p=0.71), [0, 0.4, 0, 0.3, 0.15]),
  (dict(top_p=1e-6), [0, 1, 0, 0, 0]),
  (dict(top_k=3, top_p=0.8), [0, 0.4, 0, 0.3, 0]),    # of what top-k leaves: 0.7 / 0.85 > 0.8
  (dict(top_k=1), [0, 1, 0, 0, 0]),
])
def test_draws_follow_the_distribution(settings, weights):
  expected = np.asarray(weights) / np.sum(weights)
  seen = _frequencies(**settings)
  np.testing.assert_array_equal(seen > 0, expected > 0)
  assert_close(seen, expected, "draw_frequency")


def test_temperature_zero_takes_the_first_of_the_most_likely():
  logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, 1.0, 2.0]])
  np.testing.assert_array_equal(sample_token(logits, jax.random.key(0), temperature=0), [1, 0])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nan_row_is_minus_one_and_others_are_not(temperature):
  logits = jnp.asarray([[0.0, jnp.nan, 9.0], [0.0, -jnp.inf, -jnp.inf]])
  draws = sample_token(logits, jax.random.key(0), temperature=temperature)
  np.testing.assert_array_equal(draws, [-1, 0])


def test_greedy_is_the_argmax_of_one_forward_pass(model, prompt):
  out = generate(model, prompt, 8, temperature=0)
  assert out.shape == (2, 8) and out.dtype == np.int32
  logits = model(jnp.concatenate([prompt, out], axis=1))
  np.testing.assert_array_equal(out, jnp.argmax(logits, -1)[:, prompt.shape[1] - 1:-1])


@pytest.mark.parametrize("chunk", [8, 20])
def test_chunked_prefill_changes_nothing(model, prompt, chunk, monkeypatch):
  whole = generate(model, prompt, 8, seed=4)
  monkeypatch.setitem(sampling.PREFILL_CHUNK, "cpu", chunk)   # 21 tokens: the last chunk is padded
  np.testing.assert_array_equal(generate(model, prompt, 8, seed=4), whole)


def test_seed_decides(model, prompt):
  first = generate(model, prompt, 8, seed=1)
  np.testing.assert_array_equal(generate(model, prompt, 8, seed=1), first)
  assert (generate(model, prompt, 8, seed=2) != first).any()


def test_stop_tokens_end_their_row_alone(model, prompt):
  free = generate(model, prompt, 8, seed=1)
  stop = int(free[0, 2])
  assert stop not in free[0, :2]
  out = generate(model, prompt, 8, seed=1, stop_tokens=(stop,))
  np.testing.assert_array_equal(out[0, 2:], stop)
  length = np.flatnonzero(free[1] == stop)[0] if stop in free[1] else out.shape[1]
  np.testing.assert_array_equal(out[1, :length], free[1, :length])
  ended = generate(model, prompt, 8, seed=1, stop_tokens=tuple(range(256)))
  assert ended.shape == (2, 1)


def test_on_token_sees_every_step_and_may_end_it(model, prompt):
  seen = []
  out = generate(model, prompt, 8, seed=1, on_token=seen.append)
  np.testing.assert_array_equal(np.stack(seen, 1), out)
  short = generate(model, prompt, 8, seed=1, on_token=lambda tokens: True)
  np.testing.assert_array_equal(short, out[:, :1])


def test_nan_weights_are_named(model, prompt):
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, model)
  with pytest.raises(FloatingPointError, match="new token 0 are NaN"):
    generate(broken, prompt, 8)


@pytest.mark.parametrize("changes, message", [
  (dict(prompt=np.zeros((1, 0), int)), "the prompt is empty"),
  (dict(prompt=np.zeros((3,), int)), r"has shape \(3,\)"),
  (dict(prompt=np.array([[1, 256]])), "token 256 is outside the vocabulary"),
  (dict(prompt=np.array([[2**40]])), "token 1099511627776 is outside"),
  (dict(max_new_tokens=0), "max_new_tokens is 0"),
  (dict(temperature=-1.0), "temperature is -1.0"),
  (dict(temperature=float("nan")), "temperature is nan"),
  (dict(top_k=-1), "top_k is -1"),
  (dict(top_p=0.0), "top_p is 0.0"),
])
def test_bad_input_is_one_line(model, changes, message):
  arguments = dict(prompt=np.array([[1, 2]]), max_new_tokens=2) | changes
  with pytest.raises(UserError, match=message) as error:
    generate(model, **arguments)
  assert "\n" not in str(error.value)


# Streaming text.

def _stream(data: bytes, stop=None):
  stream = TextStream(ByteTokenizer(), stop)
  pieces = []
  for byte in data:
    pieces.append(stream.add(byte))
    if stream.stopped:
      break
  return [*pieces, stream.finish()]


@pytest.mark.parametrize("data", [
  b"plain", "naïve €5 𝄞 ok".encode(), b"\xff\xff\xff\xff\xffa", b"\xe2\x82", b"\xe2\x82A",
  b"\xf0\x9d\x84", b"a\xc3(\xe0\x80\xaf\xf0\x9f\x92z", b"\xef\xbf\xbd\xef\xbf\xbd x", b"",
])
def test_stream_equals_decoding_at_once(data):
  pieces = _stream(data)
  assert "".join(pieces) == ByteTokenizer().decode(list(data))


def test_stream_shows_no_half_character():
  assert _stream("a€b".encode()) == ["a", "", "", "€", "b", ""]


@pytest.mark.parametrize("text, stop, expected", [
  ("one END two", "END", "one "),
  ("ENEND", "END", "EN"),
  ("aaab", "aab", "a"),
  ("EN", "END", "EN"),
  ("x€y", "€", "x"),
  ("END", "END", ""),
  ("one END two", ("two", "END"), "one "),
  ("abcd", ("abcd", "bc"), "a"),            # the one that is complete first, byte by byte
  ("abd", ("abc", "bd"), "a"),
  ("ab", ("abc", "bd"), "ab"),
])
def test_stop_string(text, stop, expected):
  pieces = _stream(text.encode(), stop)
  assert "".join(pieces) == expected


def test_stop_string_is_never_shown_in_part():
  assert _stream(b"abEND", "END")[:4] == ["a", "b", "", ""]


def test_generate_text_streams_what_it_returns(model):
  pieces = []
  text = generate_text(model, ByteTokenizer(), "def f(", 20, seed=5, on_text=pieces.append)
  assert "".join(pieces) == text
  ids = generate(model, ByteTokenizer().encode("def f(")[None], 20, seed=5)[0]
  assert text == ByteTokenizer().decode(ids)
  stop = text[7:9]
  cut = generate_text(model, ByteTokenizer(), "def f(", 20, seed=5, stop=stop)
  assert cut == text[:text.index(stop)]


@pytest.mark.parametrize("changes, message", [
  (dict(prompt=""), "the prompt is empty"),
  (dict(stop=""), "the stop string is empty"),
  (dict(prompt="a\udcff"), "not valid Unicode at character 1"),
])
def test_generate_text_bad_input(model, changes, message):
  with pytest.raises(UserError, match=message):
    generate_text(model, ByteTokenizer(), **(dict(prompt="a", max_new_tokens=2) | changes))


@pytest.mark.parametrize("committed", [False, True])
def test_prompts_of_many_lengths_share_their_programs(model, committed):
  """One prefill and one decode program for each cache length, also of weights that are placed."""
  if committed:
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    model = jax.device_put(model, shardings(model, mesh))
  programs = sampling._programs_of(model)
  for program in programs:
    program.clear_cache()
  for length in (1, 5, 21, 56):                  # with 8 new tokens: 64 of cache
    generate(model, np.ones((1, length), int), 8)
  assert [program._cache_size() for program in programs] == [1, 1, 1]
  generate(model, np.ones((1, 60), int), 8)      # 68: a cache of 96
  assert [program._cache_size() for program in programs] == [2, 2, 2]
  for length in (600, 700):                      # chunks of 512, caches of 768
    generate(model, np.ones((1, length), int), 8)
  assert [program._cache_size() for program in programs] == [3, 3, 3]


def test_padded_lengths_are_few_and_never_short():
  lengths = [sampling.padded_length(n) for n in range(1, 5000)]
  assert all(n <= length <= max(64, 1.5 * n) for n, length in enumerate(lengths, 1))
  assert sorted(set(lengths)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072,
                                  4096, 6144]
