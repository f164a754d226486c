"""Which files of a folder are read, and what is left out, by name.

A folder may hold what nothing here can read: other formats, pipes, files and subfolders without
permission, dangling links. None of it stops a run, all of it is named once, in a warning. Where a
folder has files of records, documentation beside them (README, LICENSE, ...) is no data.
"""

import dataclasses
import os
import pathlib

from hysparse_jax.errors import UserError

EXTENSIONS = {
  ".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".parquet": "parquet",
  ".arrayrecord": "arrayrecord", ".array_record": "arrayrecord",
}
SKIPPED_FOLDERS = {"__pycache__"}
_OTHER_RECORDS = {".arrow", ".bz2", ".csv", ".gz", ".h5", ".hdf5", ".json", ".orc", ".tar",
                  ".tfrecord", ".tsv", ".xz", ".zip", ".zst"}
_DOCUMENTATION = {"authors", "changelog", "citation", "code_of_conduct", "contributing", "copying",
                  "dataset_card", "license", "licence", "notice", "readme", "security"}
_PROSE = {"", ".cff", ".md", ".rst", ".txt"}
_NAMED = 5   # files that a warning names


@dataclasses.dataclass
class LeftOut:
  """What was not read, by reason."""

  names: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  empty: int = 0      # documents without text
  null: int = 0       # records whose text is null

  def add(self, reason: str, name):
    """Notes one file or subfolder."""
    self.names.setdefault(reason, []).append(str(name))

  def warnings(self, source: str) -> tuple[str, ...]:
    """One line for each reason, with the first names."""
    lines = []
    for reason, names in self.names.items():
      more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
      lines.append(f"data.source={source!r}: left out {len(names)} {reason}: "
                   f"{', '.join(names[:_NAMED])}{more}")
    return tuple(lines)


def walk(folder, skipped, left_out: LeftOut) -> list[pathlib.Path]:
  """Every visible regular file under `folder`, in the order of relative paths.

  Links to files are followed, links to folders are not.

  Raises:
    OSError: `folder` itself cannot be read.
  """
  def unreadable(error):
    if pathlib.Path(error.filename) == pathlib.Path(folder):
      raise error
    left_out.add("unreadable", f"{_relative(error.filename, folder)} ({error.strerror})")

  found = []
  for parent, folders, names in os.walk(folder, onerror=unreadable):
    folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    for name in sorted(folders):
      if os.path.islink(os.path.join(parent, name)):
        left_out.add("linked folders, which are not followed",
                     _relative(os.path.join(parent, name), folder))
    for file in sorted(pathlib.Path(parent, name) for name in names if not name.startswith(".")):
      if file.is_file():
        found.append(file)
      else:
        why = "dangling link" if file.is_symlink() and not file.exists() else "no regular file"
        left_out.add("unreadable", f"{_relative(file, folder)} ({why})")
  return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def of_folder(folder: pathlib.Path, wanted: str, left_out: LeftOut
              ) -> list[tuple[pathlib.Path, str]]:
  """The files of a folder that are data, each with its format.

  Args:
    folder: an existing one.
    wanted: a format, of which alone files are kept, or "auto".
    left_out: takes what is not read.

  Raises:
    UserError: no file of the format that is wanted.
  """
  files = walk(folder, SKIPPED_FOLDERS, left_out)
  if wanted != "auto":
    files = [file for file in files if EXTENSIONS.get(file.suffix.lower()) == wanted]
    if not files:
      raise UserError(f"data.source={str(folder)!r} has no {wanted} file "
                      f"({' '.join(extensions(wanted))}); set data.format to what it holds")
  kinds = {file: EXTENSIONS.get(file.suffix.lower()) for file in files}
  records = any(kind not in (None, "text") or file.suffix.lower() in _OTHER_RECORDS
                for file, kind in kinds.items())
  found, unknown = [], []
  for file, kind in kinds.items():
    suffix = file.suffix.lower()
    if records and suffix in _PROSE and file.stem.lower() in _DOCUMENTATION:
      left_out.add("files of documentation beside data", _relative(file, folder))
    elif kind is None:
      unknown.append(file)
    elif not os.access(file, os.R_OK):
      left_out.add("unreadable", f"{_relative(file, folder)} (Permission denied)")
    else:
      found.append((file, kind))
  suffixes = " ".join(sorted({file.suffix.lower() or "without extension" for file in unknown}))
  for file in unknown:
    left_out.add(f"files of unknown format ({suffixes}; known: {' '.join(EXTENSIONS)})",
                 _relative(file, folder))
  return found


def kind_of(file: pathlib.Path) -> str:
  """The format of a file given alone; a UserError where the extension is unknown."""
  kind = EXTENSIONS.get(file.suffix.lower())
  if kind is None:
    raise UserError(f"{file}: data.format='auto' does not know the extension {file.suffix!r} "
                    f"(known: {' '.join(EXTENSIONS)}); set data.format, or give another file")
  return kind


def extensions(wanted: str) -> list[str]:
  """Those of a format."""
  return [extension for extension, kind in EXTENSIONS.items() if kind == wanted]


def _relative(path, folder) -> str:
  return pathlib.Path(path).relative_to(folder).as_posix()
