"""The server's addresses: `/v1/completions`, `/v1/models`, `/metrics`, `/health`."""

import asyncio
import contextlib
import socket
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from typing import NamedTuple

import prometheus_client
from prometheus_client import core
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hysparse_jax.errors import UserError
from hysparse_jax.inference.worker import QueueFullError, StoppingError, Worker

from .. import cli
from . import completions

HUNG_UP = 499            # what logs call a client that did not wait for its answer
# Of `Stats`: what each is.
MEASURED = {
  "waiting": "Requests without a slot.",
  "running": "Requests with a slot.",
  "pages": "Pages of the KV cache.",
  "pages_used": "Pages held by requests or by prefixes.",
  "pages_cached": "Pages held by prefixes alone.",
  "prompt_tokens": "Prompt tokens prefilled, those of the warm-up included.",
  "reused_tokens": "Prompt tokens whose KV was there already.",
  "new_tokens": "Tokens drawn, those of the warm-up included.",
  "preemptions": "Requests that lost their slot and waited again.",
}


class Limits(NamedTuple):
  """What one request can take."""

  body_bytes: int
  seconds: float           # from its first byte to its last token


class TooLargeError(Exception):
  """The body is larger than the limit."""


class Server:
  """Answers over HTTP with a worker's engine.

  Args:
    worker: of the engine, which has the tokenizer.
    tokenizer: of the model.
    name: of the model, as clients call it.
    limits: of each request.
  """

  def __init__(self, worker: Worker, tokenizer, name: str, limits: Limits):
    self.worker, self.tokenizer, self.name, self._limits = worker, tokenizer, name, limits
    self._created = int(time.time())
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(self)
    self._answered = prometheus_client.Counter(
      "hysparse_requests", "Requests for completions that are over, by HTTP status; 499: hung up.",
      ["status"], registry=self._registry)
    self.app = Starlette(
      routes=[Route("/v1/completions", self._complete, methods=["POST"]),
              Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._model),
              Route("/metrics", self._metrics), Route("/health", self._health)],
      exception_handlers={HTTPException: _http_error})

  def collect(self):
    """The engine's counts, for `prometheus_client`."""
    for name, value in self.worker.stats._asdict().items():
      family = (core.CounterMetricFamily
                if name.endswith("_tokens") or name == "preemptions" else core.GaugeMetricFamily)
      yield family(f"hysparse_{name}", MEASURED[name], value=value)

  async def _metrics(self, request):
    del request
    return Response(prometheus_client.generate_latest(self._registry),
                    media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def _health(self, request):
    del request
    ready = self.worker.error is None and not self.worker.stopping
    return _json({"status": "ok" if ready else "stopping"}, 200 if ready else 503)

  async def _models(self, request):
    del request
    return _json({"object": "list", "data": [self._card()]})

  async def _model(self, request):
    asked = request.path_params["name"]
    if asked != self.name:
      return _json(*_refusal(completions.UnknownModelError(
        "model", f"model is {asked!r}; this server has {self.name!r}")))
    return _json(self._card())

  def _card(self):
    return {"id": self.name, "object": "model", "created": self._created,
            "owned_by": "hysparse_jax"}

  async def _complete(self, request: Request):
    deadline = asyncio.get_running_loop().time() + self._limits.seconds
    answer = None
    try:
      async with asyncio.timeout_at(deadline):
        body = await self._body(request)
      call = await run_in_threadpool(completions.parse, body, self.name, self.tokenizer,
                                     self.worker.most)
      answer = _Answer(self, call, deadline)
      await answer.accepted()
      if call.stream:
        return _Stream(answer)
      response = _json(await _while_there(request, answer.whole()))
    except ClientDisconnect:
      response = Response(status_code=HUNG_UP)
    except Exception as error:
      response = _json(*_refusal(error))
    finally:
      if answer is not None and not answer.streams:
        answer.close()
    self.count(response.status_code)
    return response

  async def _body(self, request) -> bytes:
    """All is read, so that a client that still sends gets the answer; what is too much is lost."""
    parts, size = [], 0
    async for part in request.stream():
      size += len(part)
      if size <= self._limits.body_bytes:
        parts.append(part)
    if size > self._limits.body_bytes:
      raise TooLargeError(f"the body has {size:,} bytes; this server takes "
                          f"{self._limits.body_bytes:,}")
    return b"".join(parts)

  def count(self, status: int):
    """A request is over."""
    self._answered.labels(status).inc()


class _Answer:
  """One body's choices while they come."""

  def __init__(self, server: Server, call: completions.Call, deadline: float):
    loop = asyncio.get_running_loop()
    self._events: asyncio.Queue = asyncio.Queue()

    def listener(event):
      with contextlib.suppress(RuntimeError):      # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(self._events.put_nowait, event)

    self.server, self._call, self._deadline = server, call, deadline
    self._ticket = server.worker.submit(call.requests, listener)
    self._choices = [completions.Choice(index, server.tokenizer, request.logprobs is not None)
                     for index, request in enumerate(call.requests)]
    self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion",
                  "created": int(time.time()), "model": server.name}
    self.streams = False                           # whether a stream will close it
    self.status = HUNG_UP

  def close(self):
    """Ends what is not done."""
    self.server.worker.cancel(self._ticket)

  async def accepted(self):
    """Returns when the requests are in the engine's queue; raises what they were refused with."""
    await self._next()
    self.streams = self._call.stream

  async def _next(self):
    async with asyncio.timeout_at(self._deadline):
      event = await self._events.get()
    if isinstance(event, Exception):
      raise event
    return event

  async def _pieces(self) -> AsyncIterator[dict]:
    while not all(choice.finish_reason for choice in self._choices):
      progress = await self._next()
      if progress.error is not None:
        raise progress.error
      piece = self._choices[progress.number].add(progress)
      if piece is not None:
        yield piece

  async def whole(self) -> dict:
    """The answer when all is there."""
    async for _ in self._pieces():
      pass
    return self._head | {"choices": [choice.whole() for choice in self._choices],
                         "usage": completions.usage(self._call.prompt_tokens, self._choices)}

  async def stream(self) -> AsyncIterator[str]:
    """The answer as server-sent events; an error is one, and the last."""
    event = lambda value: f"data: {cli.to_json(value)}\n\n"
    no_usage = {"usage": None} if self._call.include_usage else {}
    try:
      async for piece in self._pieces():
        yield event(self._head | {"choices": [piece]} | no_usage)
    except Exception as error:
      body, self.status = _refusal(error)
      yield event(body)
      return
    if self._call.include_usage:
      usage = completions.usage(self._call.prompt_tokens, self._choices)
      yield event(self._head | {"choices": [], "usage": usage})
    self.status = 200
    yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
  """Sends an answer as it comes, and closes it when the client hangs up."""

  def __init__(self, answer: _Answer):
    super().__init__(answer.stream(), media_type="text/event-stream",
                     headers={"cache-control": "no-store"})
    self._answer = answer

  async def __call__(self, scope, receive, send):
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._answer.close()
      self._answer.server.count(self._answer.status)


async def _while_there(request: Request, work):
  """What `work` returns; ClientDisconnect if the client hangs up before."""
  tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise ClientDisconnect
    return tasks[0].result()
  finally:
    for task in tasks:
      task.cancel()


async def _hung_up(request: Request):
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _json(value: dict, status: int = 200) -> Response:
  return Response(cli.to_json(value), status, media_type="application/json")


def _refusal(error: Exception) -> tuple[dict, int]:
  """The body and the HTTP status of an answer that is an error."""
  message, field, code = str(error), None, None
  match error:
    case completions.UnknownModelError():
      status, field, code = 404, error.field, "model_not_found"
    case completions.FieldError():
      status, field = 400, error.field
    case UserError():
      status = 400
    case TooLargeError():
      status = 413
    case QueueFullError():
      status = 429
    case TimeoutError():
      status, message = 504, "the request took longer than this server's limit; ask for less"
    case StoppingError():
      status = 503
    case FloatingPointError():
      status = 500
    case _:
      traceback.print_exception(error)
      status, message = 500, f"the server failed ({type(error).__name__}); its log says more"
  kind = "invalid_request_error" if status < 500 and status != 429 else (
    "rate_limit_error" if status == 429 else "server_error")
  return {"error": {"message": message, "type": kind, "param": field, "code": code}}, status


async def _http_error(request: Request, error: HTTPException) -> Response:
  """No such address, or another method."""
  message = f"{request.method} {request.url.path}: {error.detail}; this server has " \
            "POST /v1/completions and GET /v1/models, /metrics and /health"
  body = {"error": {"message": message, "type": "invalid_request_error", "param": None,
                    "code": None}}
  return _json(body, error.status_code)


def bound(host: str, port: int) -> socket.socket:
  """A socket that does not listen yet: who connects before that is refused.

  Raises:
    UserError: no such address, or it is taken.
  """
  try:
    family, kind, proto, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except OSError as error:
    raise UserError(f"--host={host} --port={port}: {error.strerror}; choose others") from error
  return listener
