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
import contextlib
import gc
import json
import os
import pathlib
import shutil
import stat
import threading
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from hysparse_jax.errors import UserError
from hysparse_jax.training import quiet, upgrade
from hysparse_jax.training.manifest import (
  as_key,
  check_same_model,
  describe,
  differences,
  named_leaves,
  nest,
  plain,
  plain_target,
  seal,
)

TMP_MARK = ".orbax-checkpoint-tmp"   # in the name of what Orbax has not committed
REJECTED = "rejected_"               # prefix of a damaged checkpoint moved out of the way


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
    self._inode = os.stat(self.directory).st_ino
    quiet.silence()
    self._waiting = threading.Lock()
    self._saving: int | None = None      # step of a save that was not waited for yet
    self._manager = None if read_only else quiet.detached(
      lambda: ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=False))).result()

  def _claim_directory(self):
    """Makes the directory and removes what a killed save left in it."""
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for path in self.directory.iterdir():
        if TMP_MARK in path.name:
          _remove(path)
    except OSError as error:
      raise UserError(f"cannot write checkpoints to {self.directory}: {error.strerror}; "
                      "give a writable --workdir") from error
    if not os.access(self.directory, os.W_OK | os.X_OK):
      raise UserError(f"cannot write checkpoints to {self.directory}: permission denied; "
                      "give a writable --workdir")

  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, ascending; not yet those still being written."""
    try:
      return sorted(int(path.name) for path in self.directory.iterdir()
                    if path.name.isascii() and path.name.isdecimal()
                    and str(int(path.name)) == path.name and path.is_dir())
    except OSError as error:
      raise UserError(f"cannot read {self.directory}: {error.strerror}") from error

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
    names, leaves = named_leaves(state)
    manifest = seal({"format": 1, "step": int(step), "extra": json.loads(json.dumps(extra)),
                     "leaves": describe(names, leaves)})
    self.wait()
    newer = [other for other in self.steps() if other >= step]
    if newer == [step] and self._same(step, manifest):
      return
    if newer:
      raise UserError(f"cannot save step {step} to {self.directory}: it holds step {newer[-1]}; "
                      "move it away, or use another --workdir")
    if os.path.lexists(self.directory / str(step)):      # a file, a pipe, a link to nothing
      self._set_aside(step)
    arrays = nest(names, map(plain, leaves))
    self._await(lambda: self._manager.save(step, force=True, args=ocp.args.Composite(
      state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest))))
    self._saving = int(step)
    if block:
      self.wait()

  def wait(self):
    """Returns once no save is running; may be called from any thread.

    Raises:
      UserError: the running save failed.
    """
    if self._manager is not None:
      with self._waiting:
        self._await(self._manager.wait_until_finished)
        if self._saving is not None and not (self.directory / str(self._saving)).is_dir():
          raise UserError(f"cannot save to {self.directory}: the folder is gone, or its checkpoint "
                          f"of step {self._saving}")
        self._saving = None

  def _await(self, call):
    """Returns when `call` has; an error of it, or a directory that is gone, is a UserError."""
    running, gone = quiet.detached(call), False
    while not concurrent.futures.wait([running], timeout=1).done:
      if gone:                 # for a second time: what waits for it does so for minutes
        raise UserError(f"cannot save to {self.directory}: the folder is gone")
      gone = self._is_gone()
    error = running.exception()
    if error is not None:
      what = "the folder is gone" if self._is_gone() else quiet.reason(error)
      raise UserError(f"cannot save to {self.directory}: {what}") from error

  def _is_gone(self) -> bool:
    """Whether the directory was moved or removed; Orbax may have made another in its place."""
    try:
      return os.stat(self.directory).st_ino != self._inode
    except OSError:
      return True

  def close(self):
    """Waits, then frees the background threads."""
    if self._manager is not None:
      self.wait()
      quiet.detached(self._manager.close).result()

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
    for path in sorted(self.directory.iterdir()) if step is None else ():
      if path.name.isascii() and path.name.isdecimal() and not path.is_dir():
        report(f"checkpoint {path.name} rejected: it is no folder")
    damaged = []
    while True:
      steps = self.steps()
      left = [one for one in steps if one not in damaged and step in (None, one)]
      if not left:
        break
      candidate = left[-1]
      try:
        state, extra = self._load(candidate, target, partial)
      except _DamagedError as damage:
        # A run that is writing deletes a checkpoint once it has a newer one.
        now = self.steps()
        if candidate not in now or (step is None and now[-1] > steps[-1]):
          continue
        damaged.append(candidate)
        report(f"checkpoint {candidate} rejected: {damage}")
        continue
      if not self._read_only:
        for other in damaged:
          self._set_aside(other)
      return state, extra, candidate
    if damaged:
      raise UserError(f"no whole checkpoint in {self.directory}: tried "
                      f"{', '.join(map(str, damaged))}, all damaged; restore a copy or start over")
    wanted = "one" if step is None else f"step {step}"
    raise UserError(f"missing checkpoint: wanted {wanted} in {self.directory}, it holds "
                    f"{', '.join(map(str, steps)) or 'none'}; train first or change --workdir")

  def extra(self, step: int | None = None) -> dict:
    """What `save` was given beside the newest state, or that of a step, without reading the state.

    Empty where no manifest can be read.
    """
    for candidate in reversed(self.steps()) if step is None else (step,):
      with contextlib.suppress(_DamagedError):
        return self._read_manifest(candidate)["extra"]
    return {}

  def verify(self, step: int) -> list[str]:
    """What is wrong with one checkpoint, leaf by leaf; empty when it is whole. Needs no target."""
    self.wait()
    try:
      manifest = self._read_manifest(step)
      names = [tuple(name.split("/")) for name in manifest["leaves"]]
      placeholders = nest(names, [0] * len(names))
      restore_args = nest(names, [ocp.RestoreArgs(restore_type=np.ndarray)] * len(names))
      arrays = self._read_arrays(step, names, placeholders, restore_args)
      return differences(manifest["leaves"], arrays)
    except _DamagedError as damage:
      return [str(damage)]

  def _load(self, step, target, partial):
    manifest = self._read_manifest(step)
    names, leaves = named_leaves(target)
    names = upgrade.saved_names(names, manifest["leaves"])
    check_same_model(manifest["leaves"], names, leaves, step, partial)
    abstract = nest(names, [plain_target(leaf) for leaf in leaves])
    arrays = self._read_arrays(step, names, abstract,
                               ocp.checkpoint_utils.construct_restore_args(abstract))
    entries = {name: manifest["leaves"][name] for name in map("/".join, names)}
    problems = differences(entries, arrays)
    if problems:
      more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
      raise _DamagedError("; ".join(problems[:3]) + more)
    restored = map(as_key, arrays, entries.values())
    return jax.tree.unflatten(jax.tree.structure(target), restored), manifest["extra"]

  def _read_tree(self, step, item, restore_args):
    """The arrays of one checkpoint as nested dicts."""
    def read():
      with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(self.directory / str(step) / "state", args=ocp.args.PyTreeRestore(
          item, restore_args=restore_args, partial_restore=True))

    try:
      _check_files(self.directory / str(step))
      return quiet.detached(read).result()
    except _DamagedError:
      raise
    except Exception as error:    # whatever a reader of damaged bytes stumbles over
      message = f"unreadable state: {quiet.reason(error)}"
    gc.collect()                  # the reads that were abandoned, while nobody listens
    raise _DamagedError(message)

  def _read_arrays(self, step, names, item, restore_args) -> list:
    tree = self._read_tree(step, item, restore_args)
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
    path = self.directory / str(step) / "manifest" / "metadata"
    try:
      _check_files(path.parent)
      sealed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
      raise _DamagedError(f"unreadable manifest: {quiet.reason(error)}") from error
    if not isinstance(sealed, dict) or sealed.get("digest") != seal(sealed)["digest"]:
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
    try:
      _remove(path)
      (self.directory / str(step)).rename(path)
    except OSError as error:
      raise UserError(f"cannot move the damaged checkpoint {step} out of the way: "
                      f"{error.strerror}; remove {self.directory / str(step)}") from error
    self._manager.reload()


def abstract_state(shapes, shardings):
  """`jax.eval_shape`'s result with a sharding on every leaf: what `Checkpoints.restore` targets."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    shapes, shardings)


def _remove(path: pathlib.Path):
  """Removes a file, a link or a folder, where there is one."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _check_files(folder: pathlib.Path):
  """Raises where a folder holds anything but files and folders: a read of a pipe never ends."""
  for parent, folders, files in os.walk(folder):
    for name in folders + files:
      path = pathlib.Path(parent, name)
      mode = path.stat().st_mode
      if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _DamagedError(f"{path.relative_to(folder)} is not a file")
