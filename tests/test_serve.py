"""The server, asked by OpenAI's client over a real connection."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from experiments.serve.app import Limits, Server, bound
from hysparse_jax.config import Config, DataConfig, ModelConfig
from hysparse_jax.data.tokenizer import ByteTokenizer
from hysparse_jax.errors import UserError
from hysparse_jax.inference.engine import Engine, prefill_size
from hysparse_jax.inference.sampling import generate_text, visible_tokens
from hysparse_jax.inference.worker import Worker, warm_up
from hysparse_jax.training import run
from hysparse_jax.training.checkpoint import Checkpoints
from tests import weights
from tests.tolerances import assert_close

CFG = ModelConfig(num_layers=3, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16,
                  sparse_per_full=1, block_size=4, selected_tokens=8, window=8, dtype="float32")
ROOM = dict(slots=2, max_tokens=256, chunk=64)
MOST_WAITING = 4
PROMPT = "def main("
ENDLESS = dict(prompt=PROMPT, max_tokens=240, seed=1)     # while the engine is slowed down


@pytest.fixture(scope="module")
def model():
  return weights.drawn(CFG)


class Served:
  """A server in a thread, its engine in another."""

  def __init__(self, model, seconds=60.0):
    self.engine = Engine(model, tokenizer=ByteTokenizer(), **ROOM)
    self.pause = 0.0                                       # before each round
    step = self.engine.step

    def slowed():
      time.sleep(self.pause)
      return step()

    self.engine.step = slowed
    self.worker = Worker(self.engine, MOST_WAITING)
    self.server = uvicorn.Server(uvicorn.Config(
      Server(self.worker, ByteTokenizer(), "tiny", Limits(20_000, seconds)).app, lifespan="off",
      log_level="error"))
    listener = socket.create_server(("127.0.0.1", 0))
    self.port = listener.getsockname()[1]
    self.thread = threading.Thread(
      target=lambda: asyncio.run(self.server.serve(sockets=[listener])), daemon=True)
    self.thread.start()
    self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none",
                                max_retries=0, timeout=60)

  def complete(self, **fields):
    return self.client.completions.create(**{"model": "tiny", "prompt": PROMPT, **fields})

  def send(self, body, path="/v1/completions", method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, response.read().decode()

  def metrics(self):
    families = text_string_to_metric_families(self.send(None, "/metrics", "GET")[1])
    return {(sample.name, *sample.labels.values()): sample.value
            for family in families for sample in family.samples}

  def wait_for(self, fits, what="idle"):
    for _ in range(600):
      if fits(self.worker.stats):
        return
      time.sleep(0.02)
    pytest.fail(f"never {what}: {self.worker.stats}")

  def wait_until_free(self):
    """No request, and no page but those of prefixes."""
    self.wait_for(lambda stats: stats.running == stats.waiting == 0
                  and stats.pages_used == stats.pages_cached)

  def end(self):
    self.server.should_exit = True
    self.thread.join(20)
    self.worker.stop()
    assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def served(model):
  one = Served(model)
  yield one
  one.end()


@pytest.fixture
def slow(served):
  """Rounds of at least 50 ms: long requests are still running when the test looks."""
  served.wait_until_free()
  served.pause = 0.05
  yield served
  served.pause = 0.0
  served.wait_until_free()


def test_a_completion_is_what_generate_says(served, model):
  for settings in (dict(temperature=0), dict(temperature=0.8, top_p=0.9, seed=7)):
    want = generate_text(model, ByteTokenizer(), PROMPT, 12, **settings)
    answer = served.complete(max_tokens=12, **settings)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (want, "length", None)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens,
            answer.usage.total_tokens) == (9, 12, 21)
    as_tokens = served.complete(prompt=list(PROMPT.encode()), max_tokens=12, **settings)
    assert as_tokens.choices[0].text == want
  top_k = dict(temperature=2.0, seed=3, max_tokens=12)
  assert served.complete(**top_k, extra_body={"top_k": 1}).choices[0].text == served.complete(
    temperature=0, max_tokens=12).choices[0].text
  assert served.complete(user="me", extra_body=dict(echo=False, best_of=1, seed=None)).choices
  assert len({served.complete(max_tokens=20).choices[0].text for _ in range(3)}) == 3


def test_a_stream_is_the_same_in_pieces(served):
  fields = dict(max_tokens=30, seed=5, n=2, logprobs=2)
  whole = served.complete(**fields)
  texts, reasons, tokens, usages = ["", ""], [None, None], [[], []], []
  for part in served.complete(stream=True, stream_options={"include_usage": True}, **fields):
    usages.append(part.usage)
    for choice in part.choices:
      assert reasons[choice.index] is None
      texts[choice.index] += choice.text
      tokens[choice.index] += choice.logprobs.tokens
      reasons[choice.index] = choice.finish_reason
  assert texts == [choice.text for choice in whole.choices]
  assert tokens == [choice.logprobs.tokens for choice in whole.choices]
  assert reasons == ["length", "length"] and len(usages) > 10
  assert usages[:-1] == [None] * (len(usages) - 1) and usages[-1] == whole.usage
  assert whole.usage.completion_tokens == 60 and whole.usage.prompt_tokens == 9


def test_choices_of_prompts(served):
  one = lambda prompt, seed: served.complete(prompt=prompt, seed=seed).choices[0].text
  answer = served.complete(prompt=["ab", "xyz"], n=2, seed=10)
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
  assert [choice.text for choice in answer.choices] == [
    one(prompt, seed) for prompt in ("ab", "xyz") for seed in (10, 11)]
  assert answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens == 64
  assert served.complete(prompt=[[97, 98], [120]], seed=10).choices[0].text == one("ab", 10)


def test_stop_strings(served):
  text = served.complete(seed=4, max_tokens=40).choices[0].text
  stop = text[10:12]
  for given in (stop, ["never to be seen", stop]):
    (choice,) = served.complete(seed=4, max_tokens=40, stop=given).choices
    assert choice.text == text[:text.index(stop)] and choice.finish_reason == "stop"
  served.wait_until_free()


def test_logprobs_are_the_models(served, model):
  (choice,) = served.complete(temperature=0, max_tokens=6, logprobs=3).choices
  got, ids = choice.logprobs, list(PROMPT.encode())
  new = [int(name.removeprefix("token_id:")) if name.startswith("token_id:") else ord(name)
         for name in got.tokens]
  rows = np.asarray(jax.nn.log_softmax(model(np.asarray([ids + new]))[0]))[len(ids) - 1:]
  for index, row in enumerate(rows[:6]):
    best = np.argsort(-row, kind="stable")[:3]
    assert_close(np.float32(got.token_logprobs[index]), row[best[0]], "decode_f32")
    named = [chr(token) if token < 128 else f"token_id:{token}" for token in best]
    assert got.tokens[index] == named[0] and list(got.top_logprobs[index]) == named
  assert got.text_offset == list(range(6))
  (choice,) = served.complete(temperature=0, max_tokens=6, logprobs=0).choices
  assert choice.logprobs.top_logprobs == [{}] * 6 and len(choice.logprobs.token_logprobs) == 6


def body(**fields):
  return json.dumps({"model": "tiny", "prompt": "a", **fields})


# Body, then the field that is named and a part of the sentence.
WRONG = {
  "no_json": ("{", None, "the body is not JSON"),
  "deep": ("[" * 100_000, None, "the body has 100,000 bytes"),
  "deep_but_short": ("[" * 15_000, None, "the body is not JSON"),
  "nan": ('{"model": "tiny", "prompt": "a", "top_p": NaN}', None, "NaN is no JSON number"),
  "list": ("[]", None, "the body is a list; give a JSON object"),
  "no_model": ('{"prompt": "a"}', "model", "model is missing"),
  "no_prompt": ('{"model": "tiny"}', "prompt", "prompt is missing"),
  "unknown": (body(mnax_tokens=3), "mnax_tokens", "no field 'mnax_tokens'; there are model,"),
  "echo": (body(echo=True), "echo", "echo is not supported"),
  "best_of": (body(best_of=2), "best_of", "best_of is not supported"),
  "empty": (body(prompt=""), None, "the prompt is empty"),
  "empty_list": (body(prompt=[]), "prompt", "prompt must be a string, a list"),
  "mixed": (body(prompt=["a", 1]), "prompt", "prompt must be"),
  "bools": (body(prompt=[True]), "prompt", "prompt must be"),
  "surrogate": (body(prompt="a\ud800"), "prompt", "not valid Unicode at character 1"),
  "vocabulary": (body(prompt=[256]), None, "256"),
  "huge_token": (body(prompt=[10**30]), None, "integers"),
  "too_long": (body(prompt="a" * 300), None, "the cache has room for 256"),
  "second_too_long": (body(prompt=["a", "a" * 300]), None, "the cache has room for 256"),
  "max_tokens": (body(max_tokens=0), None, "max_new_tokens is 0"),
  "max_tokens_text": (body(max_tokens="9"), "max_tokens", "max_tokens must be an integer"),
  "temperature": (body(temperature=-1), "temperature", "a number, at least 0"),
  "temperature_huge": (body(temperature=10**400), "temperature", "a number, at least 0"),
  "top_p": (body(top_p=2), None, "top_p is 2.0"),
  "top_k": (body(top_k=-1), None, "top_k is -1"),
  "seed": (body(seed=2**63), None, "less than 2**63"),
  "n": (body(n=0), "n", "at least 1"),
  "n_huge": (body(n=10**9), "n", "more than the 6 choices"),
  "stop_five": (body(stop=list("abcde")), "stop", "up to 4"),
  "stop_empty": (body(stop=""), None, "a stop string is empty"),
  "logprobs": (body(logprobs=6), None, "it must be from 0 to 5"),
  "stream": (body(stream="yes"), "stream", "true or false"),
  "stream_options": (body(stream=True, stream_options={"x": 1}), "stream_options", "include_usage"),
  "options_alone": (body(stream_options={"include_usage": True}), "stream_options", "stream=true"),
}


@pytest.mark.parametrize("text, field, message", WRONG.values(), ids=WRONG)
def test_a_wrong_body_is_one_sentence(served, text, field, message):
  status, answer = served.send(text)
  error = json.loads(answer)["error"]
  assert status == (413 if len(text) > 20_000 else 400)
  assert set(error) == {"message", "type", "param", "code"}
  assert message in error["message"] and "\n" not in error["message"]
  assert (error["param"], error["type"]) == (field, "invalid_request_error")
  served.wait_until_free()


def test_errors_are_those_of_the_client(served):
  with pytest.raises(openai.BadRequestError, match="echo is not supported") as caught:
    served.complete(echo=True)
  assert caught.value.param == "echo"
  with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as caught:
    served.complete(model="gpt")
  assert caught.value.code == "model_not_found"
  with pytest.raises(openai.APIStatusError, match="this server takes 20,000") as caught:
    served.complete(prompt="a" * 3_000_000)
  assert caught.value.status_code == 413
  with pytest.raises(openai.NotFoundError, match="this server has POST /v1/completions"):
    served.client.chat.completions.create(model="tiny", messages=[])
  assert served.send(None, method="GET")[0] == 405


def test_models_and_health(served):
  assert [model.id for model in served.client.models.list()] == ["tiny"]
  assert served.client.models.retrieve("tiny").object == "model"
  with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
    served.client.models.retrieve("other/model")
  assert served.send(None, "/health", "GET") == (200, '{"status": "ok"}')


def test_metrics(served):
  before = served.metrics()
  served.complete(max_tokens=7)
  served.send("{")
  served.wait_until_free()
  after = served.metrics()
  gained = {name: after[name] - before.get(name, 0) for name in after}
  assert gained["hysparse_requests_total", "200"] == 1
  assert gained["hysparse_requests_total", "400"] == 1
  assert gained["hysparse_new_tokens_total",] == 7
  assert gained["hysparse_prompt_tokens_total",] == len(PROMPT)
  assert after["hysparse_pages",] == 2 * 256 / 4 and after["hysparse_waiting",] == 0
  assert ("hysparse_preemptions_total",) in after and ("hysparse_pages_used",) in after


def test_who_hangs_up_frees_slot_and_pages(slow):
  """While streaming, while waiting for the whole, and while waiting for a slot."""
  hung_up = lambda: slow.metrics().get(("hysparse_requests_total", "499"), 0)
  before = hung_up()
  streams = [slow.complete(**ENDLESS, stream=True) for _ in range(3)]
  next(iter(streams[0]))
  slow.wait_for(lambda stats: (stats.running, stats.waiting) == (2, 1), "with one waiting")
  streams[2].close()                                       # has no slot
  slow.wait_for(lambda stats: (stats.running, stats.waiting) == (2, 0), "without the third")
  streams[0].close()
  slow.wait_for(lambda stats: (stats.running, stats.waiting) == (1, 0), "without the first")
  with pytest.raises(openai.APITimeoutError):
    slow.client.with_options(timeout=0.5).completions.create(model="tiny", **ENDLESS)
  slow.wait_for(lambda stats: (stats.running, stats.waiting) == (1, 0), "without the fourth")
  streams[1].close()
  slow.wait_until_free()
  for _ in range(100):
    if hung_up() == before + 4:
      return
    time.sleep(0.02)
  pytest.fail(f"{hung_up()} hung up, before {before}")


def test_a_full_queue_is_429(slow):
  streams = [slow.complete(**ENDLESS, n=3, stream=True) for _ in range(2)]
  with pytest.raises(openai.RateLimitError, match="4 requests are waiting for a slot; try again"):
    slow.complete()
  for stream in streams:
    stream.close()
  slow.wait_until_free()
  assert slow.complete(max_tokens=2).usage.completion_tokens == 2


def test_a_request_that_takes_too_long(model):
  served = Served(model, seconds=1.0)
  served.pause = 0.02
  with pytest.raises(openai.APIStatusError, match="longer than this server's limit") as caught:
    served.complete(**ENDLESS)
  assert caught.value.status_code == 504
  with pytest.raises(openai.APIError, match="longer than this server's limit"):
    text = "".join(part.choices[0].text for part in served.complete(**ENDLESS, stream=True))
    pytest.fail(f"no error after {text!r}")
  served.wait_until_free()
  served.end()


def test_nan_logits_end_one_request(served):
  """Its prompt has the token whose embedding is NaN; the neighbour draws from the rest."""
  model = weights.drawn(CFG)
  model.embedding[...] = model.embedding[...].at[7].set(np.nan)
  broken = Served(model)
  neighbour = broken.complete(temperature=0, max_tokens=60, stream=True)
  with pytest.raises(openai.InternalServerError, match="NaN; the weights are broken"):
    broken.complete(prompt=[7, 7])
  assert "".join(part.choices[0].text for part in neighbour) == served.complete(
    temperature=0, max_tokens=60).choices[0].text
  broken.end()


def test_an_engine_that_fails_answers_everybody(model):
  served = Served(model)
  ended = threading.Event()
  served.worker._on_failure = ended.set
  served.pause = 0.05
  stream = served.complete(**ENDLESS, stream=True)
  next(iter(stream))

  def fails():
    raise RuntimeError("RESOURCE_EXHAUSTED: no memory")

  served.engine.step = fails
  with pytest.raises(openai.APIError, match=r"the server failed \(RuntimeError\)"):
    for _ in stream:
      pass
  with pytest.raises(openai.InternalServerError, match="its log says more"):
    served.complete()
  assert ended.wait(10) and "RESOURCE" in str(served.worker.error)
  assert served.send(None, "/health", "GET")[0] == 503
  served.end()


def test_what_runs_at_the_end_is_finished_or_cut(model):
  served = Served(model)
  served.pause = 0.02
  short, long = (served.complete(seed=1, max_tokens=tokens, stream=True) for tokens in (10, 240))
  next(iter(long))
  served.worker.drain(1.0)
  with pytest.raises(openai.InternalServerError, match="the server is stopping") as caught:
    served.complete()
  assert caught.value.status_code == 503 and served.send(None, "/health", "GET")[0] == 503
  assert [part.choices[0].finish_reason for part in short][-1] == "length"
  with pytest.raises(openai.APIError, match="the server is stopping"):
    for _ in long:
      pass
  served.end()
  assert not served.engine.busy


def test_the_warm_up_of_a_large_cache():
  """Which prompts it takes, against all that there can be."""

  class Recorder:
    busy, chunk, max_tokens = False, 512, 9000

    def __init__(self):
      self.lengths = []

    def submit(self, request):
      self.lengths.append(len(request.tokens))

    def run(self):
      pass

  engine = Recorder()
  programs = lambda lengths: {
    (prefill_size(length - (length - 1) // 512 * 512, 512), visible_tokens(length, 9000))
    for length in lengths}
  assert warm_up(engine) == len(engine.lengths) <= 12
  assert programs(engine.lengths) == programs(range(1, 9000))


def test_the_program(tmp_path):
  """From a run that was never trained: starts, answers, and ends by a signal with 0."""
  cfg = Config(model=CFG, data=DataConfig(seq_len=64, batch_size=2))
  folder = tmp_path / "tiny"
  folder.mkdir()
  run.write_config(folder, cfg)
  with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, {"model": weights.drawn(cfg.model)}, {}, block=True)
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.serve", f"--workdir={folder}", "--max_tokens=64",
     "--slots=2", "--chunk=64", "--num_pages=32", "--grace=20", "--port=0"],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"})
  try:
    assert process.stdout.readline().startswith("warming up: ")
    assert re.match(r"warmed up with 1 prompts of up to 64 tokens, ", process.stdout.readline())
    serving = process.stdout.readline()
    address = re.fullmatch(r"serving tiny, step 3, at (http://127\.0\.0\.1:(\d+)/v1)\n", serving)
    client = openai.OpenAI(base_url=address[1], api_key="none", max_retries=0, timeout=60)
    assert client.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16
    with pytest.raises(UserError, match="Address already in use; choose others"):
      bound("127.0.0.1", int(address[2]))
    stream = iter(client.completions.create(model="tiny", prompt="a", max_tokens=60, stream=True))
    next(stream)
    process.send_signal(signal.SIGTERM)
    assert [part.choices[0].finish_reason for part in stream][-1] == "length"
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
  finally:
    process.kill()


def test_a_missing_package_is_one_line(tmp_path):
  (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError('none', name='starlette')")
  done = subprocess.run(
    [sys.executable, "-m", "experiments.serve"], capture_output=True, text=True, check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu",
                      "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])})
  assert (done.returncode, done.stdout, done.stderr) == (
    2, "", "error: starlette is missing; pip install hysparse-jax[serve]\n")
