"""Documents from files, and which of them training never sees.

| format      | extension                  | a document is                                         |
|-------------|----------------------------|-------------------------------------------------------|
| text        | .txt .md .py               | one file of a folder; a file given alone is cut at    |
|             |                            | line ends into pieces of 16 KiB and the line's rest   |
| jsonl       | .jsonl                     | `text_field` of the object on one line                |
| parquet     | .parquet                   | `text_field` of one row                               |
| arrayrecord | .arrayrecord .array_record | one record: UTF-8 text; or, where the file's first    |
|             |                            | record is a JSON object, `text_field` of the object   |

`"python_stdlib"` is the standard library of the running interpreter, one .py file a document;
`"python_packages"` are the packages installed beside it.
A folder is read in the order of its relative paths, hidden files and `__pycache__` aside; under
`format="auto"` it may mix formats, a named format keeps only the files of its extensions.
Text is UTF-8 and kept byte for byte. Empty documents are left out.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import site
import sysconfig
from collections.abc import Iterator

from hysparse_jax.config import DataConfig
from hysparse_jax.errors import UserError

PYTHON_STDLIB = "python_stdlib"
PYTHON_PACKAGES = "python_packages"
_EXTENSIONS = {
  ".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".parquet": "parquet",
  ".arrayrecord": "arrayrecord", ".array_record": "arrayrecord",
}
_SKIPPED_FOLDERS = {"__pycache__"}
_INSTALLED_FOLDERS = {"site-packages", "dist-packages"}
_LONE_FILE_PIECE = 16 * 1024   # bytes
_RECORDS_PER_READ = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of a source as UTF-8 bytes, split by a hash of their content alone.

  A document is held out iff the first 8 bytes of its SHA-256, as a fraction of 2**64, are below
  `heldout_fraction`: the same on every machine, whatever the path, the order and the seed, and
  equal documents fall on the same side. `digest` covers every document and their order.
  """

  train: tuple[bytes, ...]      # in source order
  heldout: tuple[bytes, ...]    # in the order of their hashes
  digest: str

  @classmethod
  def open(cls, cfg: DataConfig) -> "Corpus":
    """Reads `cfg.source` whole into memory; of installed Python sources the last one is kept.

    Raises:
      UserError: nothing there, a damaged or undecodable file (named, with its line or record),
        a record without `cfg.text_field`, or too few documents for both sides of the split.
    """
    if cfg.source in (PYTHON_STDLIB, PYTHON_PACKAGES):     # they do not change while Python runs
      return _read_installed(DataConfig(source=cfg.source, format=cfg.format,
                                        heldout_fraction=cfg.heldout_fraction))
    return cls._read(cfg)

  @classmethod
  def _read(cls, cfg: DataConfig) -> "Corpus":
    total, train, heldout = hashlib.sha256(), [], []
    threshold = int(cfg.heldout_fraction * 2**64)
    for document in _documents(cfg):
      if document:
        digest = hashlib.sha256(document).digest()
        total.update(digest)
        if int.from_bytes(digest[:8], "big") < threshold:
          heldout.append((digest, document))
        else:
          train.append(document)
    if not train and not heldout:
      raise UserError(f"data.source={cfg.source!r} holds no text; give a file or folder that does")
    if not train or not heldout:
      raise UserError(
        f"data.source={cfg.source!r} has too few documents for a held-out split: {len(train)} for "
        f"training, {len(heldout)} held out at data.heldout_fraction={cfg.heldout_fraction}; "
        "add documents or change the fraction")
    heldout.sort(key=lambda pair: pair[0])
    return cls(tuple(train), tuple(document for _, document in heldout), total.hexdigest())


@functools.lru_cache(maxsize=1)
def _read_installed(cfg) -> Corpus:
  return Corpus._read(cfg)


def _documents(cfg) -> Iterator[bytes]:
  if cfg.source in (PYTHON_STDLIB, PYTHON_PACKAGES):
    if cfg.format not in ("auto", "text"):
      raise UserError(f"data.format={cfg.format!r} does not fit data.source={cfg.source!r}; "
                      "leave it at 'auto'")
    if cfg.source == PYTHON_STDLIB:
      yield from _python_sources([sysconfig.get_path("stdlib")],
                                 _SKIPPED_FOLDERS | _INSTALLED_FOLDERS)
    else:
      yield from _python_sources([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"),
                                  *site.getsitepackages()], _SKIPPED_FOLDERS)
    return
  path = pathlib.Path(cfg.source).expanduser()
  try:
    if path.is_dir():
      for file, kind in _files(path, cfg.format):
        yield from _READERS[kind](file, cfg.text_field)
    elif path.exists():
      kind = _kind(path) if cfg.format == "auto" else cfg.format
      if kind == "text":
        yield from _pieces(_utf8(path.read_bytes(), path))
      else:
        yield from _READERS[kind](path, cfg.text_field)
    else:
      raise UserError(f"data.source={cfg.source!r} does not exist; give a file, a folder, "
                      f"{PYTHON_STDLIB!r} or {PYTHON_PACKAGES!r}")
  except OSError as error:
    raise UserError(f"data.source={cfg.source!r}: {error}; check that it can be read") from error


def _python_sources(folders, skipped) -> Iterator[bytes]:
  folders = list(dict.fromkeys(pathlib.Path(folder).resolve() for folder in folders))
  files = [file for folder in folders for file in _walk(folder, skipped) if file.suffix == ".py"]
  if not files:
    raise UserError(f"this Python keeps no .py files in {', '.join(map(str, folders))}; set "
                    "data.source to a file or folder of text")
  for file in files:
    data = file.read_bytes()
    if _is_utf8(data):   # tests of source encodings are among them
      yield data


def _walk(folder, skipped) -> list[pathlib.Path]:
  """Every visible file under `folder`, in the order of relative paths; links are not followed."""
  found = []
  for parent, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    found += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
  return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _files(folder, wanted) -> list[tuple[pathlib.Path, str]]:
  files = _walk(folder, _SKIPPED_FOLDERS)
  if wanted == "auto":
    return [(file, _kind(file)) for file in files]
  files = [file for file in files if _EXTENSIONS.get(file.suffix.lower()) == wanted]
  if not files:
    raise UserError(f"data.source={str(folder)!r} has no {wanted} file "
                    f"({' '.join(_extensions(wanted))}); set data.format to what it holds")
  return [(file, wanted) for file in files]


def _kind(file) -> str:
  kind = _EXTENSIONS.get(file.suffix.lower())
  if kind is None:
    raise UserError(f"{file}: data.format='auto' does not know the extension {file.suffix!r} "
                    f"(known: {' '.join(_EXTENSIONS)}); set data.format, or move the file away")
  return kind


def _extensions(wanted) -> list[str]:
  return [extension for extension, kind in _EXTENSIONS.items() if kind == wanted]


def _read_text(file, text_field) -> Iterator[bytes]:
  del text_field   # of records only
  yield _utf8(file.read_bytes(), file)


def _pieces(data: bytes) -> Iterator[bytes]:
  start = 0
  while start < len(data):
    end = data.find(b"\n", start + _LONE_FILE_PIECE - 1) + 1 or len(data)
    yield data[start:end]
    start = end


def _read_jsonl(file, text_field) -> Iterator[bytes]:
  with file.open("rb") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        where = f"{file}: line {number}"
        yield _field(_json_object(line, where), text_field, where)


def _read_parquet(file, text_field) -> Iterator[bytes]:
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"{file}: reading parquet needs pyarrow; pip install pyarrow") from error
  import grain
  number = 0
  try:
    with parquet.ParquetFile(file) as opened:
      columns, num_rows = opened.schema_arrow.names, opened.metadata.num_rows
    if text_field not in columns:
      raise UserError(f"{file}: no column {text_field!r} (columns: {', '.join(columns)}); "
                      "set data.text_field")
    if num_rows:
      rows = grain.experimental.ParquetIterDataset(str(file), page_checksum_verification=True)
      for row in rows:
        number += 1
        yield _field(row, text_field, f"{file}: row {number}")
  except (pa.ArrowException, OSError) as error:
    raise _damaged(file, "parquet", error) from error
  if number != num_rows:
    raise _damaged(file, "parquet", f"{number} of {num_rows} rows read")


def _read_arrayrecord(file, text_field) -> Iterator[bytes]:
  import grain
  try:
    source = grain.sources.ArrayRecordDataSource(str(file))
    with source:
      as_json = None
      for first in range(0, len(source), _RECORDS_PER_READ):
        numbers = range(first, min(first + _RECORDS_PER_READ, len(source)))
        for number, record in zip(numbers, source.__getitems__(numbers)):
          where = f"{file}: record {number}"
          if as_json is None:
            as_json = _is_json_object(record)
          if as_json:
            yield _field(_json_object(record, where), text_field, where)
          else:
            yield _utf8(record, where)
  except (RuntimeError, IndexError) as error:
    raise _damaged(file, "ArrayRecord", error) from error


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet,
            "arrayrecord": _read_arrayrecord}


def _is_utf8(data: bytes) -> bool:
  try:
    data.decode()
  except UnicodeDecodeError:
    return False
  return True


def _utf8(data: bytes, where) -> bytes:
  try:
    data.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{where}: not UTF-8 text at byte {error.start} ({error.reason}); convert it "
                    "or move it away") from error
  return data


def _is_json_object(data: bytes) -> bool:
  try:
    return isinstance(json.loads(data.decode()), dict)
  except (ValueError, RecursionError):
    return False


def _json_object(data: bytes, where) -> dict:
  try:
    value = json.loads(data.decode())
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where}: not valid JSON ({error}); fix or remove it") from error
  if not isinstance(value, dict):
    raise UserError(f"{where}: a JSON {type(value).__name__}, not an object with a text field; "
                    "fix or remove it")
  return value


def _field(record: dict, name: str, where) -> bytes:
  if name not in record:
    raise UserError(f"{where}: no field {name!r} (fields: {', '.join(map(str, record))}); "
                    "set data.text_field")
  text = record[name]
  if isinstance(text, bytes):
    return _utf8(text, where)
  if not isinstance(text, str):
    raise UserError(f"{where}: field {name!r} is {type(text).__name__}, not a string; set "
                    "data.text_field, or fix the record")
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"{where}: field {name!r} holds a lone surrogate, which is no text; fix or "
                    "remove it") from error


def _damaged(file, kind, error) -> UserError:
  detail = " ".join(str(error).split()) or "unreadable"
  return UserError(f"{file}: damaged or not {kind} ({detail}); write it again")
