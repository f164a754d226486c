"""The sparse GPU ops where the queries are not all keys: offsets, S != T, segments of both sides,
absent branches and gates.

On CPU the Mosaic kernels run in interpret mode and the Triton kernels on Triton's interpreter,
with outputs poisoned by NaN; with `-m gpu` the same cases run compiled, at larger sizes. Every case
is compared with the reference in float32, forward and gradients, row by row too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_sparse_attention.gpu import op as gpu
from tests import triton_interpreter
from tests.tolerances import assert_norm_close


@pytest.fixture(scope="module")
def on_cpu():
  if jax.default_backend() != "cpu":
    pytest.skip("interpreters run on CPU")
  patch = pytest.MonkeyPatch()
  triton_interpreter.install_all(patch)
  yield
  patch.undo()


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of an op on some of the queries."""

  offsets: tuple[int, ...]          # of each batch row
  tokens: int                       # T
  keys: int                         # S
  group: int = 4
  threshold: int | None = None      # of the plan
  traced: bool = True               # whether the offset is an array
  documents: int = 0                # segments of a row, 0: no segment ids
  selected: int = 3                 # P
  window: int = 40
  local_keys: int | None = None     # L of the sparse layer; None: S, and the same offset
  gates: tuple[str, str] = ("element", "head")
  implementation: str = "mosaic_gpu"
  kv_heads: int = 1
  head_dim: int = 64
  dtype: str = "float16"

  @property
  def offset(self):
    """What the op is given."""
    return jnp.asarray(self.offsets, jnp.int32) if self.traced else self.offsets[0]


def segments_of(rng, batch, keys, documents):
  """i32 [B,S]: documents of random lengths, some padding (0) between two of them."""
  if not documents:
    return None
  ids = np.zeros((batch, keys), np.int32)
  for row in ids:
    cuts = np.sort(rng.integers(0, keys + 1, documents - 1))
    row[:] = 1 + np.searchsorted(cuts, np.arange(keys), side="right")
    hole = rng.integers(0, max(keys - 5, 1))
    row[hole:hole + 5] = 0
  return ids


def at_positions(x, case):
  """Rows offset .. offset + T of x [B,S,...], 0 past its end."""
  rows = np.zeros((x.shape[0], case.tokens, *x.shape[2:]), x.dtype)
  for b, offset in enumerate(case.offsets):
    part = x[b, offset:offset + case.tokens]
    rows[b, :len(part)] = part
  return rows


def selected_blocks(rng, case):
  """i32 [B,K,T,P]: up to P distinct causal blocks of each query, ascending, -1 last."""
  out = np.full((len(case.offsets), case.kv_heads, case.tokens, case.selected), -1, np.int32)
  for at in np.ndindex(out.shape[:3]):
    own = min(case.offsets[at[0]] + at[2], case.keys - 1) // 64
    count = rng.integers(at[2] % 4 != 3, min(own + 1, case.selected) + 1)      # some have none
    out[at][:count] = np.sort(rng.choice(own + 1, count, replace=False))
  return out


def make(case, seed=0):
  """Float arrays by name, integer arrays by name, and the cotangent."""
  rng = np.random.default_rng(seed)
  batch, heads = len(case.offsets), case.kv_heads * case.group
  draw = lambda t, n, h=case.head_dim: jnp.asarray(
    rng.standard_normal((batch, t, n, h)), case.dtype)
  local = case.keys if case.local_keys is None else case.local_keys
  floats = {"q": draw(case.tokens, heads), "k": draw(case.keys, case.kv_heads),
            "v": draw(case.keys, case.kv_heads), "k_local": draw(local, case.kv_heads),
            "v_local": draw(local, case.kv_heads)}
  for name, kind in zip(("gate_sparse", "gate_local"), case.gates):
    if kind != "none":
      width = case.head_dim if kind == "element" else 1
      floats[name] = jax.nn.sigmoid(draw(case.tokens, heads, width))
  for name in ("sinks_sparse", "sinks_local"):
    floats[name] = jnp.asarray(rng.standard_normal(heads), jnp.float32)
  integers = {"block_indices": selected_blocks(rng, case), "query_offset": case.offset}
  ids = segments_of(rng, batch, case.keys, case.documents)
  if ids is not None:
    integers["segment_ids"] = at_positions(ids, case)
    integers["kv_segment_ids"] = ids
  if case.local_keys is not None:                 # the last L keys before the last query
    assert case.local_keys >= case.tokens, "an offset is at least 0"
    start = [max(offset + case.tokens - local, 0) for offset in case.offsets]
    own = [offset - s for offset, s in zip(case.offsets, start)]
    integers["local_query_offset"] = jnp.asarray(own, jnp.int32) if case.traced else own[0]
    if ids is not None:
      padded = np.pad(ids, ((0, 0), (0, local)))
      integers["local_kv_segment_ids"] = np.stack(
        [row[s:s + local] for row, s in zip(padded, start)])
  return floats, jax.tree.map(lambda x: x if isinstance(x, int) else jnp.asarray(x), integers), \
    draw(case.tokens, heads)


FLOATS = {
  "block_sparse_attention": ("q", "k", "v", "sinks_sparse"),
  "sliding_window_attention": ("q", "k_local", "v_local", "sinks_local"),
  "sparse_layer_attention": ("q", "k", "v", "k_local", "v_local", "gate_sparse", "gate_local",
                             "sinks_sparse", "sinks_local")}


def call(op, floats, integers, *, window, implementation, plan=None):
  """The public op on named arrays; what is absent stays None."""
  floats, integers = dict(floats), dict(integers)
  run = functools.partial(getattr(pallas_kernels, op), implementation=implementation)
  if op == "sliding_window_attention":
    integers.pop("block_indices")
    return run(floats["q"], floats["k_local"], floats["v_local"], sinks=floats["sinks_local"],
               window=window, **integers)
  if op == "block_sparse_attention":
    return run(floats["q"], floats["k"], floats["v"], integers.pop("block_indices"),
               sinks=floats["sinks_sparse"], plan=plan, **integers)
  q, rest = floats.pop("q"), [floats.pop(n, None) for n in ("k", "v")]
  local = [floats.pop(n, None) for n in ("k_local", "v_local")]
  indices = integers.pop("block_indices", None)
  return run(q, *rest, indices, *local, window=window, plan=plan, **floats, **integers)


def compare(op, case, without=()):
  """Forward and gradients of an op against the reference in float32; `without`: absent floats."""
  floats, integers, dout = make(case)
  floats = {n: x for n, x in floats.items() if n in FLOATS[op] and n not in without}
  for name in set(without) & set(integers):
    del integers[name]
  static = {n: x for n, x in integers.items() if isinstance(x, int)}
  arrays = {n: x for n, x in integers.items() if n not in static}

  def plan_of(arrays):
    if case.threshold is None or "block_indices" not in arrays:
      return None
    return gpu.make_plan(arrays["block_indices"], case.group, case.keys,
                         (static | arrays)["query_offset"], case.threshold)

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, floats, arrays, dout):
    plan = None if implementation == "reference" else plan_of(arrays)
    out, pullback = jax.vjp(lambda floats: call(
      op, floats, static | arrays, window=case.window, implementation=implementation, plan=plan),
      floats)
    return out, pullback(dout.astype(out.dtype))[0]

  out, grads = run(case.implementation, floats, arrays, dout)
  want, want_grads = run("reference", *jax.tree.map(
    lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    (floats, arrays, dout)))
  assert out.dtype == case.dtype and np.linalg.norm(want) > 0
  assert_norm_close(out, want, f"gpu_sparse_{case.dtype}_norm")
  for name, grad in grads.items():
    if name.startswith("sinks"):          # one number a head, of terms that cancel
      error = np.abs(np.asarray(grad) - np.asarray(want_grads[name])).max()
      assert error < 0.02 * max(np.abs(want_grads[name]).max(), 1.0), name
    else:
      assert_norm_close(grad, want_grads[name], f"gpu_sparse_grad_{case.dtype}_norm")
  return out, want


SPARSE_CASES = [
  Case((70,), 65, 150, threshold=12, traced=False),                   # hot and rare, mid-block
  Case((3, 100), 7, 130, group=16, threshold=1, documents=3),         # split kernel, per row
  Case((125,), 64, 200, group=16, threshold=1, traced=False),         # tiles that straddle blocks
  Case((90, 0), 64, 100, group=3, documents=2, implementation="triton"),   # past the last key
  Case((0,), 60, 60, group=8, threshold=1, traced=False, documents=2),
  Case((64,), 1, 128, threshold=1, documents=1),
]


@pytest.mark.parametrize("case", SPARSE_CASES, ids=str)
def test_block_sparse_ranges(on_cpu, case):
  compare("block_sparse_attention", case)


@pytest.mark.parametrize("case", [
  Case((37, 90), 65, 140, window=50, documents=3),
  Case((64,), 64, 128, window=20, group=8, traced=False),
  Case((100,), 30, 110, window=70, implementation="triton"),          # past the last key
], ids=str)
def test_sliding_window_ranges(on_cpu, case):
  compare("sliding_window_attention", case)


@pytest.mark.parametrize("case,without", [
  (Case((70, 120), 30, 160, threshold=12, local_keys=70, documents=2), ()),
  (Case((65,), 60, 128, threshold=12, traced=False, gates=("none", "element")), ()),
  (Case((65,), 60, 128, threshold=1, gates=("head", "none")), ()),
  (Case((65,), 60, 128, threshold=12), ("k_local", "v_local", "gate_local", "sinks_local")),
  (Case((20,), 60, 128, documents=2),
   ("k", "v", "block_indices", "gate_sparse", "sinks_sparse", "kv_segment_ids")),
  (Case((65, 2), 60, 128, implementation="triton", documents=2), ()),
], ids=str)
def test_sparse_layer_ranges(on_cpu, case, without):
  if "k" in without:                              # the local keys are the only ones
    case = dataclasses.replace(case, local_keys=case.keys)
  compare("sparse_layer_attention", case, without)


def on_device(offsets, tokens, keys, **options):
  defaults = dict(kv_heads=2, head_dim=128, dtype="bfloat16", selected=12, window=128)
  return Case(offsets, tokens, keys, **(defaults | options))


DEVICE_CASES = [
  on_device((1000, 300), 1000, 2000, documents=5),
  on_device((1000, 300), 1000, 2000, group=16, documents=5),
  on_device((1100,), 1, 2000, group=16, threshold=2, traced=False),
  on_device((77, 1900), 65, 1950, group=8, head_dim=64, documents=3),
  on_device((1090,), 7, 1100, group=2, traced=False, dtype="float16"),
  on_device((0, 700), 640, 1300, documents=4, implementation="triton"),
  on_device((1024,), 1024, 2048, group=16, selected=32, traced=False),
  on_device((1024,), 1024, 2048, selected=32, traced=False, documents=3),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", DEVICE_CASES, ids=str)
@pytest.mark.parametrize("op", ["block_sparse_attention", "sliding_window_attention"])
def test_ranges_on_device(op, case):
  compare(op, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case,without", [
  *((dataclasses.replace(case, local_keys=1200 if case.tokens > 500 else 500), ())
    for case in DEVICE_CASES[:6]),
  (dataclasses.replace(DEVICE_CASES[0], gates=("none", "none")), ()),
  (DEVICE_CASES[0], ("k_local", "v_local", "gate_local", "sinks_local")),
  (dataclasses.replace(DEVICE_CASES[0], local_keys=1500),
   ("k", "v", "block_indices", "gate_sparse", "sinks_sparse", "kv_segment_ids")),
], ids=str)
def test_sparse_layer_ranges_on_device(case, without):
  compare("sparse_layer_attention", case, without)
