"""Trace-time checks of the ops' arguments: one line saying what was got, wanted and what to do."""

import jax.numpy as jnp
import numpy as np

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


class NotCoveredError(NotImplementedError):
  """An implementation does not take these sizes or dtypes: named, it raises; unnamed, the next
  one of the platform runs (`implementations.pick`)."""


def require(ok, message):
  """Raises ValueError(message) unless `ok`."""
  if not ok:
    raise ValueError(message)


def check_at_least(op, minimum, **values):
  """Checks Python integers: `check_at_least("op", 1, window=window)`."""
  for name, value in values.items():
    require(isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
            f"{op}: {name}={value!r}; wanted an integer of at least {minimum}")


def check_shape(op, name, array, axes, sizes, dtypes=FLOAT_DTYPES):
  """Checks rank, sizes and dtype of one array.

  Args:
    op: the op's name.
    name: the argument's name.
    array: the argument.
    axes: its axis letters, such as "BSKH".
    sizes: {letter: size} so far; letters met first are added.
    dtypes: allowed dtype names.

  Raises:
    ValueError: it does not fit.
  """
  require(hasattr(array, "shape") and hasattr(array, "dtype"),
          f"{op}: {name} is a {type(array).__name__}; wanted an array [{','.join(axes)}]")
  wanted = ",".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
  require(len(array.shape) == len(axes)
          and all(sizes.get(a, n) == n for a, n in zip(axes, array.shape)),
          f"{op}: {name} has shape {list(array.shape)}; wanted [{wanted}]; "
          "reshape it, or fix the argument it has to agree with")
  require(jnp.dtype(array.dtype).name in dtypes,
          f"{op}: {name} is {jnp.dtype(array.dtype).name}; wanted {' or '.join(dtypes)}; cast it")
  for a, n in zip(axes, array.shape):
    require(n > 0 or a == "P",
            f"{op}: {name} has shape {list(array.shape)}; wanted no empty axis; skip the call")
    sizes[a] = n


def check_heads(op, sizes):
  """Checks that every KV head serves the same number of query heads."""
  require(sizes["N"] % sizes["K"] == 0,
          f"{op}: q has N={sizes['N']} heads and k has K={sizes['K']}; wanted N a multiple of K; "
          "repeat or drop heads")


def check_scale(op, scale, sizes):
  """`scale`, a positive Python number, or 1/sqrt(H) for None."""
  require(scale is None or (isinstance(scale, (int, float)) and scale > 0),
          f"{op}: scale={scale!r}; wanted a positive number, or None for 1/sqrt(H)")
  return sizes["H"] ** -0.5 if scale is None else scale


def check_sinks(op, name, sinks, sizes):
  """Checks that `sinks` is None or f32 [N]."""
  if sinks is not None:
    check_shape(op, name, sinks, "N", sizes, ("float32",))


def check_offset(op, name, offset, sizes):
  """The key index of query 0 as the implementations take it: an int of at least 0, or i32 [B].

  Args:
    op: the op's name.
    name: the argument's name.
    offset: int, i32 [] or i32 [B].
    sizes: {letter: size}, with B.

  Raises:
    ValueError: anything else.
  """
  if isinstance(offset, (int, np.integer)) and not isinstance(offset, bool):
    require(offset >= 0, f"{op}: {name}={offset}; wanted at least 0; drop the queries before key 0")
    return int(offset)
  require(hasattr(offset, "shape") and hasattr(offset, "dtype") and len(offset.shape) <= 1,
          f"{op}: {name}={offset!r}; wanted an int, or an i32 array [] or [B={sizes['B']}]")
  check_shape(op, name, offset, "B" if len(offset.shape) else "", sizes, ("int32",))
  require(not isinstance(offset, np.ndarray) or offset.min() >= 0,
          f"{op}: {name}={offset}; wanted at least 0; drop the queries before key 0")
  return jnp.broadcast_to(offset, (sizes["B"],))


def check_segments(op, segment_ids, kv_segment_ids, query_offset, sizes, keys="S",
                   kv_name="kv_segment_ids"):
  """Segment ids of queries i32 [B,T] and of keys i32 [B,S]; None, None where there are none.

  Args:
    op: the op's name.
    segment_ids: i32 [B,T] or None.
    kv_segment_ids: i32 [B,S] or None: the queries' own, where the queries are all keys.
    query_offset: of `check_offset`.
    sizes: {letter: size}, with B, T and the letter of the keys.
    keys: that letter.
    kv_name: the name of the keys' argument.

  Raises:
    ValueError: they do not fit, or one of the two is missing.
  """
  if segment_ids is None:
    require(kv_segment_ids is None, f"{op}: got {kv_name} without segment_ids; give both")
    return None, None
  check_shape(op, "segment_ids", segment_ids, "BT", sizes, ("int32",))
  if kv_segment_ids is None:
    require(sizes["T"] == sizes[keys] and isinstance(query_offset, int) and query_offset == 0,
            f"{op}: got segment_ids without {kv_name} for T={sizes['T']} queries and "
            f"{keys}={sizes[keys]} keys at query offset "
            f"{query_offset if isinstance(query_offset, int) else 'i32 [B]'}; wanted {kv_name} i32 "
            f"[B,{keys}] unless T={keys} at offset 0; give the keys' own segment ids too")
    return segment_ids, segment_ids
  check_shape(op, kv_name, kv_segment_ids, "B" + keys, sizes, ("int32",))
  return segment_ids, kv_segment_ids


def check_attention(op, q, k, v, query_offset, segment_ids, kv_segment_ids, scale):
  """Checks the arguments that the attention ops of whole sequences share.

  Returns:
    {letter: size} of BTNHSKE, and {"query_offset", "segment_ids", "kv_segment_ids", "scale"} as the
    implementations take them.

  Raises:
    ValueError: one does not fit.
  """
  sizes = {}
  check_shape(op, "q", q, "BTNH", sizes)
  check_shape(op, "k", k, "BSKH", sizes)
  check_shape(op, "v", v, "BSKE", sizes)
  check_heads(op, sizes)
  query_offset = check_offset(op, "query_offset", query_offset, sizes)
  segment_ids, kv_segment_ids = check_segments(op, segment_ids, kv_segment_ids, query_offset, sizes)
  return sizes, {"query_offset": query_offset, "segment_ids": segment_ids,
                 "kv_segment_ids": kv_segment_ids, "scale": check_scale(op, scale, sizes)}


def check_broadcast(op, name, array, axes, sizes):
  """Checks that a float array broadcasts to `axes` without growing them."""
  require(hasattr(array, "shape") and hasattr(array, "dtype"),
          f"{op}: {name} is a {type(array).__name__}; wanted an array [{','.join(axes)}]")
  wanted = [sizes[a] for a in axes]
  require(len(array.shape) == len(axes) and all(n in (1, w) for n, w in zip(array.shape, wanted)),
          f"{op}: {name} has shape {list(array.shape)}; wanted {wanted}, any axis 1; "
          "reshape it")
  require(jnp.dtype(array.dtype).name in FLOAT_DTYPES,
          f"{op}: {name} is {jnp.dtype(array.dtype).name}; wanted {' or '.join(FLOAT_DTYPES)}; "
          "cast it")
