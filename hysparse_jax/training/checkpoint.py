"""Checkpoints that are loaded as they were saved, or not at all.

Orbax writes and reshards the arrays and commits each checkpoint atomically; it does not notice a
flipped bit. So every checkpoint carries a manifest: the SHA-256 of each leaf's bytes (row-major,
whatever the mesh), its shape and dtype, the caller's `extra`, and a digest of all of that. A
restore reads the manifest first, then the arrays, and compares; the newest checkpoint that agrees
wins, and every one passed over is reported.

On disk: `<directory>/<step>/state` holds plain nested dicts named by attribute and key, without
framework types, `<directory>/<step>/manifest` the JSON. One process only: more raise.
"""

import concurrent.futures
import gc
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from hysparse_jax.errors import UserError
from hysparse_jax.training import upgrade

TMP_MARK = ".orbax-checkpoint-tmp"   # in the name of what Orbax has not committed
REJECTED = "rejected_"               # prefix of a damaged checkpoint moved out of the way
CHUNK_BYTES = 8 << 20                # hashed by one thread


class _DamagedError(Exception):
  """A checkpoint that does not hold what was saved; says what is wrong."""


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: made if missing, with its parents.
    keep: how many of the newest to keep.
    read_only: only restore and verify: nothing is created, cleaned or moved, so a directory that
      another process is writing to is safe.

  Raises:
    UserError: the directory cannot be written.
    NotImplementedError: more than one JAX process.
  """

  def __init__(self, directory, *, keep: int = 3, read_only: bool = False):
    if jax.process_count() != 1:
      raise NotImplementedError(
        f"checkpoints of {jax.process_count()} processes: digests are computed by one process "
        "that holds every shard")
    self.directory = pathlib.Path(directory).absolute()
    self._read_only = read_only
    if read_only and not self.directory.is_dir():
      raise UserError(f"missing checkpoint: there is no directory {self.directory}; train first, "
                      "or give the --workdir of a run")
    if not read_only:
      self._claim_directory()
    self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=False))

  def _claim_directory(self):
    """Makes the directory and removes what a killed save left in it."""
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for path in self.directory.iterdir():
        if TMP_MARK in path.name:
          shutil.rmtree(path)
    except OSError as error:
      raise UserError(f"cannot write checkpoints to {self.directory}: {error.strerror}; "
                      "give a writable --workdir") from error
    if not os.access(self.directory, os.W_OK | os.X_OK):
      raise UserError(f"cannot write checkpoints to {self.directory}: permission denied; "
                      "give a writable --workdir")

  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, ascending; not yet those still being written."""
    return sorted(int(path.name) for path in self.directory.iterdir()
                  if path.name.isdecimal() and path.is_dir())

  def latest_step(self) -> int | None:
    """The newest committed step, or None."""
    return max(self.steps(), default=None)

  def save(self, step: int, state, extra: dict, *, block: bool = False):
    """Writes one checkpoint in the background; a save still running is waited for first.

    Saving a step again is nothing to do when it holds the same, and an error when it does not.

    Args:
      step: at least 0, above every existing one.
      state: any pytree of `jax.Array`, typed PRNG keys included; free to be donated once this
        returns.
      extra: JSON values with string keys; comes back from `restore` as JSON gives it back.
      block: return only once it is committed.

    Raises:
      UserError: the disk refuses, or the step is not a new one.
    """
    if self._read_only:
      raise ValueError(f"{self.directory} was opened read_only")
    names, leaves = _named_leaves(state)
    manifest = _seal({"format": 1, "step": int(step), "extra": json.loads(json.dumps(extra)),
                      "leaves": _describe(names, leaves)})
    self.wait()
    try:
      newer = [other for other in self.steps() if other >= step]
      if newer == [step] and self._same(step, manifest):
        return
      if newer:
        raise UserError(f"cannot save step {step} to {self.directory}: it holds step {newer[-1]}; "
                        "move it away, or use another --workdir")
      arrays = _nest(names, map(_plain, leaves))
      self._manager.save(step, force=True, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest)))
    except OSError as error:
      raise self._unwritable(error) from error
    if block:
      self.wait()

  def wait(self):
    """Returns once no save is running.

    Raises:
      UserError: the running save failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._unwritable(error) from error

  def close(self):
    """Waits, then frees the background threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  def restore(self, target, step: int | None = None, *, partial: bool = False,
              report: Callable[[str], None] = print):
    """The newest checkpoint that is whole, or the one asked for.

    A damaged checkpoint is reported and, unless read_only, renamed to `rejected_<step>` once an
    older one has been loaded, so that its step can be saved again.

    Args:
      target: the state as `jax.ShapeDtypeStruct` leaves with shardings (`abstract_state`); any
        mesh will do, whatever the checkpoint was saved on.
      step: only this one; None falls back from the newest.
      partial: `target` is a part of the state, such as `{"model": ...}`; the rest is not read, and
        damage there is not seen.
      report: called with one line for every damaged checkpoint.

    Returns:
      `(state, extra, step)`; the state equals the saved one byte for byte.

    Raises:
      UserError: no checkpoint, none that is whole, or one of another model.
    """
    self.wait()
    steps = self.steps()
    if not steps or step not in (None, *steps):
      wanted = "one" if step is None else f"step {step}"
      raise UserError(f"missing checkpoint: wanted {wanted} in {self.directory}, it holds "
                      f"{', '.join(map(str, steps)) or 'none'}; train first or change --workdir")
    rejected = []
    for candidate in reversed(steps) if step is None else (step,):
      try:
        state, extra = self._load(candidate, target, partial)
      except _DamagedError as damage:
        rejected.append(candidate)
        report(f"checkpoint {candidate} rejected: {damage}")
        continue
      if not self._read_only:
        for other in rejected:
          self._set_aside(other)
      return state, extra, candidate
    raise UserError(f"no whole checkpoint in {self.directory}: tried "
                    f"{', '.join(map(str, rejected))}, all damaged; restore a copy or start over")

  def verify(self, step: int) -> list[str]:
    """What is wrong with one checkpoint, leaf by leaf; empty when it is whole. Needs no target."""
    self.wait()
    try:
      manifest = self._read_manifest(step)
      names = [tuple(name.split("/")) for name in manifest["leaves"]]
      placeholders = _nest(names, [0] * len(names))
      restore_args = _nest(names, [ocp.RestoreArgs(restore_type=np.ndarray)] * len(names))
      arrays = self._read_arrays(step, names, placeholders, restore_args)
      return _differences(manifest["leaves"], arrays)
    except _DamagedError as damage:
      return [str(damage)]

  def _load(self, step, target, partial):
    manifest = self._read_manifest(step)
    names, leaves = _named_leaves(target)
    names = upgrade.saved_names(names, manifest["leaves"])
    _check_same_model(manifest["leaves"], names, leaves, step, partial)
    abstract = _nest(names, [_plain_target(leaf) for leaf in leaves])
    arrays = self._read_arrays(step, names, abstract,
                               ocp.checkpoint_utils.construct_restore_args(abstract))
    entries = {name: manifest["leaves"][name] for name in map("/".join, names)}
    problems = _differences(entries, arrays)
    if problems:
      more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
      raise _DamagedError("; ".join(problems[:3]) + more)
    restored = map(_as_key, arrays, entries.values())
    return jax.tree.unflatten(jax.tree.structure(target), restored), manifest["extra"]

  def _read(self, step, **items):
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:    # whatever a reader of damaged bytes stumbles over
      message = f"unreadable {', '.join(items)}: {_one_line(error)}"
    _drop_unfinished_reads()
    raise _DamagedError(message)

  def _read_arrays(self, step, names, item, restore_args) -> list:
    tree = self._read(step, state=ocp.args.PyTreeRestore(item, restore_args=restore_args,
                                                         partial_restore=True)).state
    arrays = []
    for name in names:
      node = tree
      for part in name:
        if not isinstance(node, dict) or part not in node:
          raise _DamagedError(f"leaf {'/'.join(name)} is absent")
        node = node[part]
      arrays.append(node)
    return arrays

  def _read_manifest(self, step) -> dict:
    sealed = self._read(step, manifest=ocp.args.JsonRestore()).manifest
    if not isinstance(sealed, dict) or sealed.get("digest") != _seal(sealed)["digest"]:
      raise _DamagedError("the manifest does not match its own digest")
    if sealed["step"] != step:
      raise _DamagedError(f"the manifest is that of step {sealed['step']}")
    return sealed

  def _same(self, step, manifest) -> bool:
    try:
      return self._read_manifest(step)["digest"] == manifest["digest"]
    except _DamagedError:
      return False

  def _set_aside(self, step):
    path = self.directory / f"{REJECTED}{step}"
    shutil.rmtree(path, ignore_errors=True)
    (self.directory / str(step)).rename(path)
    self._manager.reload()

  def _unwritable(self, error) -> UserError:
    return UserError(f"cannot save to {self.directory}: {_one_line(error)}")


def abstract_state(shapes, shardings):
  """`jax.eval_shape`'s result with a sharding on every leaf: what `Checkpoints.restore` targets."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    shapes, shardings)


def _named_leaves(tree):
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


def _nest(names, values) -> dict:
  tree = {}
  for name, value in zip(names, values, strict=True):
    node = tree
    for part in name[:-1]:
      node = node.setdefault(part, {})
    node[name[-1]] = value
  return tree


def _is_key(leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf):
  """An array of numbers: the leaf, or the words of a typed PRNG key."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_target(leaf):
  if not _is_key(leaf):
    return leaf
  words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def _as_key(words, entry):
  """Undoes `_plain` by what the manifest says the leaf was."""
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


def _describe(names, leaves) -> dict:
  """The manifest's entry of every leaf."""
  entries = {}
  for name, leaf, digest in zip(names, leaves, _digest_bytes(map(_plain, leaves))):
    entry = {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest}
    if _is_key(leaf):
      entry["impl"] = str(jax.random.key_impl(leaf))
    entries["/".join(name)] = entry
  return entries


def _differences(entries, arrays) -> list[str]:
  """One line per leaf whose bytes are not those of the manifest; both in the same order."""
  return [f"leaf {name} does not match its digest"
          for (name, entry), digest in zip(entries.items(), _digest_bytes(arrays), strict=True)
          if entry["sha256"] != digest]


def _check_same_model(entries, names, leaves, step, partial):
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


def _seal(manifest: dict) -> dict:
  """The manifest with a digest of the rest of it."""
  rest = {key: value for key, value in manifest.items() if key != "digest"}
  text = json.dumps(rest, sort_keys=True)
  return rest | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def _drop_unfinished_reads():
  """Collects the reads that Orbax abandons at the first failing one, which would otherwise each
  print a page at some later moment."""
  hook, log = sys.unraisablehook, logging.getLogger("asyncio")
  sys.unraisablehook, log.disabled = lambda _: None, True
  try:
    gc.collect()
  finally:
    sys.unraisablehook, log.disabled = hook, False


def _one_line(error) -> str:
  """The kind of error and the start of its message, without the reader's own description."""
  error = error.__cause__ or error
  text = " ".join(str(error).split("[tensorstore_spec=")[0].split())
  return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
