"""What a checkpoint's manifest says: the name, shape, dtype and digest of every leaf."""

import concurrent.futures
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hysparse_jax.errors import UserError

CHUNK_BYTES = 8 << 20                # hashed by one thread


def named_leaves(tree):
  """Path names (tuples of str) and leaves, in `jax.tree.leaves` order; an `nnx.Variable` goes by
  its own name."""
  is_variable = lambda node: isinstance(node, nnx.Variable)
  named = {}
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
    value = node.get_value() if is_variable(node) else node
    for inner, leaf in jax.tree_util.tree_leaves_with_path(value):
      name = tuple(jax.tree_util.keystr(path + inner, simple=True, separator="/").split("/"))
      if name in named:
        raise ValueError(f"two leaves are named {'/'.join(name)}")
      named[name] = leaf
  return list(named), list(named.values())


def nest(names, values) -> dict:
  """Nested dicts of `values` by the tuples `names`."""
  tree = {}
  for name, value in zip(names, values, strict=True):
    node = tree
    for part in name[:-1]:
      node = node.setdefault(part, {})
    node[name[-1]] = value
  return tree


def _is_key(leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf):
  """An array of numbers: the leaf, or the words of a typed PRNG key."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def plain_target(leaf):
  """`plain` of a `jax.ShapeDtypeStruct`, its sharding kept."""
  if not _is_key(leaf):
    return leaf
  words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def as_key(words, entry):
  """Undoes `plain` by what the manifest says the leaf was."""
  return jax.random.wrap_key_data(words, impl=entry["impl"]) if "impl" in entry else words


def _digest_bytes(arrays) -> list[str]:
  """Per array the SHA-256, in hex, of the SHA-256s of its row-major bytes' 8 MiB pieces.

  The pieces let every core hash: leaves of stacked layers are few and large. One core with SHA
  instructions does some 1.8 GB/s.
  """
  pieces, counts = [], []
  for array in arrays:
    flat = np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)
    chunks = [flat[start:start + CHUNK_BYTES] for start in range(0, flat.size, CHUNK_BYTES)]
    pieces += chunks
    counts.append(len(chunks))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    hashed = pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
    return [hashlib.sha256(b"".join(next(hashed) for _ in range(count))).hexdigest()
            for count in counts]


def describe(names, leaves) -> dict:
  """The manifest's entry of every leaf."""
  entries = {}
  for name, leaf, digest in zip(names, leaves, _digest_bytes(map(plain, leaves))):
    entry = {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest}
    if _is_key(leaf):
      entry["impl"] = str(jax.random.key_impl(leaf))
    entries["/".join(name)] = entry
  return entries


def differences(entries, arrays) -> list[str]:
  """One line per leaf whose bytes are not those of the manifest; both in the same order."""
  return [f"leaf {name} does not match its digest"
          for (name, entry), digest in zip(entries.items(), _digest_bytes(arrays), strict=True)
          if entry["sha256"] != digest]


def check_same_model(entries, names, leaves, step, partial):
  """Raises a UserError where the leaves of a checkpoint are not those that are wanted.

  Of a part of the state (`partial`) only the groups that the target names are compared, such as
  all of `model/`.
  """
  wanted = {"/".join(name): f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in zip(names, leaves)}
  groups = {name[0] for name in names}
  saved = {name: f"{entry['dtype']}{entry['shape']}" for name, entry in entries.items()
           if not partial or name.split("/")[0] in groups}
  for name in [*wanted, *saved]:
    if wanted.get(name) != saved.get(name):
      there, here = saved.get(name, "absent"), wanted.get(name, "absent")
      raise UserError(f"checkpoint {step} is of another configuration: {name} is {there} in it, "
                      f"{here} here; use the config it was trained with")


def seal(manifest: dict) -> dict:
  """The manifest with a digest of the rest of it."""
  rest = {key: value for key, value in manifest.items() if key != "digest"}
  text = json.dumps(rest, sort_keys=True)
  return rest | {"digest": hashlib.sha256(text.encode()).hexdigest()}
