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
`format="auto"` it may mix formats, a named format keeps only the files of its extensions. What
cannot be read there is left out and named (`files.py`). Text is UTF-8 and kept byte for byte. Empty
documents and records whose text is null are left out and counted.

Too few documents for a split by hashes: a text file given alone is cut within long lines too, at
spaces; where that does not help, the end of every document is held out.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import site
import sysconfig
from collections.abc import Iterator

from hysparse_jax.config import DataConfig
from hysparse_jax.data import files
from hysparse_jax.errors import UserError

PYTHON_STDLIB = "python_stdlib"
PYTHON_PACKAGES = "python_packages"
_INSTALLED_FOLDERS = {"site-packages", "dist-packages"}
_LONE_FILE_PIECE = 16 * 1024   # bytes
_SHORTEST_END = 32             # bytes of a document's held-out end, at least
_RECORDS_PER_READ = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of a source as UTF-8 bytes, split by their content alone.

  A document is held out iff the first 8 bytes of its SHA-256, as a fraction of 2**64, are below
  `heldout_fraction`: the same on every machine, whatever the path, the order and the seed, and
  equal documents fall on the same side. Where that leaves one side empty, the last
  `heldout_fraction` of every document is held out instead. `digest` covers every document (of
  those cut, both parts) and their order.
  """

  train: tuple[bytes, ...]      # in source order
  heldout: tuple[bytes, ...]    # in the order of their hashes; ends of documents in source order
  digest: str
  ends: bool = False            # held out are the ends of documents
  warnings: tuple[str, ...] = dataclasses.field(default=(), compare=False)   # what was left out
  num_empty: int = dataclasses.field(default=0, compare=False)   # documents without text, left out
  num_null: int = dataclasses.field(default=0, compare=False)    # records whose text is null

  @classmethod
  def open(cls, cfg: DataConfig) -> "Corpus":
    """Reads `cfg.source` whole into memory; of installed Python sources the last one is kept.

    Raises:
      UserError: nothing there, a damaged or undecodable file (named, with its line or record),
        a record without `cfg.text_field`, or too little text for both sides of the split.
    """
    if cfg.source in (PYTHON_STDLIB, PYTHON_PACKAGES):     # they do not change while Python runs
      return _read_installed(DataConfig(source=cfg.source, format=cfg.format,
                                        heldout_fraction=cfg.heldout_fraction))
    return cls._read(cfg)

  @classmethod
  def _read(cls, cfg: DataConfig) -> "Corpus":
    left_out = files.LeftOut()
    documents = []
    for document in _documents(cfg, left_out):
      if document:
        documents.append(document)
      elif document is None:
        left_out.null += 1
      else:
        left_out.empty += 1
    warnings = left_out.warnings(cfg.source)
    if not documents:
      nulls = (f"{left_out.null} records whose {cfg.text_field!r} is null",) * bool(left_out.null)
      raise UserError("; ".join([f"data.source={cfg.source!r} holds no text", *warnings, *nulls,
                                 "give a file or folder that does"]))
    split = _by_hash(documents, cfg.heldout_fraction)
    if not all(split[:2]) and _is_lone_text(cfg):
      documents = [piece for document in documents for piece in _pieces(document, long_lines=True)]
      split = _by_hash(documents, cfg.heldout_fraction)
    ends = not all(split[:2])
    if ends:
      split = _by_ends(documents, cfg.heldout_fraction)
    if not all(split[:2]):
      raise UserError(
        f"data.source={cfg.source!r} has too little text for a held-out split: {len(documents)} "
        f"documents, {sum(map(len, documents))} bytes; add text")
    train, heldout, digest = split
    return cls(train, heldout, digest, ends, warnings, left_out.empty, left_out.null)

  def describe(self) -> str:
    """Documents and held-out share in one line, for the start of a run."""
    held, trained = (sum(map(len, side)) for side in (self.heldout, self.train))
    left = [f"{count:,} {kind}" for count, kind in ((self.num_empty, "empty"),
                                                    (self.num_null, "null")) if count]
    out = f" ({' and '.join(left)} left out)" if left else ""
    share = f"{held / (held + trained):.2%} of the text"
    if self.ends:
      return f"{len(self.train):,} documents{out}, held out the ends of them, {share}"
    return (f"{len(self.train) + len(self.heldout):,} documents{out}, {len(self.heldout):,} of "
            f"them held out, {share}")


def absolute(cfg: DataConfig) -> DataConfig:
  """The same with absolute paths of source and tokenizer, which then mean the same anywhere."""
  def of(path, *words):
    return path if path in words else str(pathlib.Path(path).expanduser().absolute())

  return dataclasses.replace(cfg, source=of(cfg.source, PYTHON_STDLIB, PYTHON_PACKAGES),
                             tokenizer=of(cfg.tokenizer, "byte"))


def _by_hash(documents, fraction):
  """Training documents, held-out documents and the digest of all."""
  total, train, heldout = hashlib.sha256(), [], []
  threshold = int(fraction * 2**64)
  for document in documents:
    digest = hashlib.sha256(document).digest()
    total.update(digest)
    if int.from_bytes(digest[:8], "big") < threshold:
      heldout.append((digest, document))
    else:
      train.append(document)
  heldout.sort(key=lambda pair: pair[0])
  return tuple(train), tuple(document for _, document in heldout), total.hexdigest()


def _by_ends(documents, fraction):
  """The same, of documents too few to be told apart by hashes: the last part of each is held out.

  The cut is at the first line end in the part's first half, else after a space, else between two
  characters. Of documents shorter than two such parts of `_SHORTEST_END` nothing is held out.
  """
  total, train, heldout = hashlib.sha256(), [], []
  for document in documents:
    size, cut = max(round(fraction * len(document)), _SHORTEST_END), len(document)
    if 2 * size <= len(document):
      cut = _cut(document, len(document) - size, len(document) - size // 2)
      heldout.append(document[cut:])
    train.append(document[:cut])
    for part in (document[:cut], document[cut:]):
      total.update(hashlib.sha256(part).digest())
  return tuple(train), tuple(heldout), total.hexdigest()


def _cut(data: bytes, first: int, last: int) -> int:
  """A place in [first, last], after a line end, else a space, else before a character."""
  for mark in (b"\n", b" "):
    place = data.find(mark, first - 1, last)
    if place >= 0:
      return place + 1
  while data[first] & 0xC0 == 0x80:   # inside a character
    first += 1
  return first


@functools.lru_cache(maxsize=1)
def _read_installed(cfg) -> Corpus:
  return Corpus._read(cfg)


def _is_lone_text(cfg) -> bool:
  path = pathlib.Path(cfg.source).expanduser()
  return path.is_file() and "text" in (cfg.format, files.EXTENSIONS.get(path.suffix.lower()))


def _documents(cfg, left_out) -> Iterator[bytes | None]:
  """Every document, empty ones too; None for a record whose text is null."""
  if cfg.source in (PYTHON_STDLIB, PYTHON_PACKAGES):
    if cfg.format not in ("auto", "text"):
      raise UserError(f"data.format={cfg.format!r} does not fit data.source={cfg.source!r}; "
                      "leave it at 'auto'")
    if cfg.source == PYTHON_STDLIB:
      yield from _python_sources([sysconfig.get_path("stdlib")],
                                 files.SKIPPED_FOLDERS | _INSTALLED_FOLDERS)
    else:
      yield from _python_sources([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"),
                                  *site.getsitepackages()], files.SKIPPED_FOLDERS)
    return
  path = pathlib.Path(cfg.source).expanduser()
  try:
    if path.is_dir():
      for file, kind in files.of_folder(path, cfg.format, left_out):
        if kind != "text":
          yield from _READERS[kind](file, cfg.text_field)
        elif _is_utf8(data := file.read_bytes()):
          yield data
        else:
          left_out.add("files that are not UTF-8 text", file.relative_to(path).as_posix())
    elif path.is_file():
      kind = files.kind_of(path) if cfg.format == "auto" else cfg.format
      if kind == "text":
        yield from _pieces(_utf8(path.read_bytes(), path))
      else:
        yield from _READERS[kind](path, cfg.text_field)
    elif path.exists():
      raise UserError(f"data.source={cfg.source!r} is a pipe or a device; give a file or a folder")
    else:
      where = "" if path.is_absolute() else f" in {pathlib.Path.cwd()}"
      raise UserError(f"data.source={cfg.source!r} does not exist{where}; give a file, a folder, "
                      f"{PYTHON_STDLIB!r} or {PYTHON_PACKAGES!r}")
  except OSError as error:
    raise UserError(f"data.source={cfg.source!r}: {error}; check that it can be read") from error


def _python_sources(folders, skipped) -> Iterator[bytes]:
  folders = list(dict.fromkeys(pathlib.Path(folder).resolve() for folder in folders))
  sources = [file for folder in folders if folder.is_dir()
             for file in files.walk(folder, skipped, files.LeftOut()) if file.suffix == ".py"]
  if not sources:
    raise UserError(f"this Python keeps no .py files in {', '.join(map(str, folders))}; set "
                    "data.source to a file or folder of text")
  for file in sources:
    data = file.read_bytes()
    if _is_utf8(data):   # tests of source encodings are among them
      yield data


def _pieces(data: bytes, long_lines: bool = False) -> Iterator[bytes]:
  """Cuts after 16 KiB and the line's rest; with `long_lines` a rest beyond 16 KiB is cut too."""
  start = 0
  while start < len(data):
    at = start + _LONE_FILE_PIECE
    end = data.find(b"\n", at - 1) + 1 or len(data)
    if long_lines and end - at > _LONE_FILE_PIECE:
      end = _cut(data, at, at + _LONE_FILE_PIECE)
    yield data[start:end]
    start = end


def _read_jsonl(file, text_field) -> Iterator[bytes | None]:
  with file.open("rb") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        where = f"{file}: line {number}"
        yield _field(_json_object(line, where), text_field, where)


def _read_parquet(file, text_field) -> Iterator[bytes | None]:
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


def _read_arrayrecord(file, text_field) -> Iterator[bytes | None]:
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


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet,
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


def _field(record: dict, name: str, where) -> bytes | None:
  if name not in record:
    raise UserError(f"{where}: no field {name!r} (fields: {', '.join(map(str, record))}); "
                    "set data.text_field")
  text = record[name]
  if text is None:
    return None
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
