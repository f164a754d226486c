"""Times whole training steps of a config and of its baselines on one machine.

    python -m experiments.bench_step --config=configs/hysparse_7b.py:long --set model.num_layers=8 \
        --set data.batch_size=1 [--baselines=full,swa] [--documents=0] [--profile=20] [--json]
    python -m experiments.bench_step --config=configs/hysparse_80b_a3b.py --mesh=expert=1 \
        --set model.moe=None --set model.d_ff=4096 --set model.num_layers=13 --set data.batch_size=1

Prints one row per model, all from one process: tokens/s, model FLOPs utilisation (useful FLOPs of
`accounting`, nothing recomputed, over the matrix-unit rate of --peak_tflops) and peak memory. The
batch is packed as in training: random tokens in documents of log-normal lengths, each starting at a
multiple of the block size, with segment ids. --documents=8 packs 8 equal documents into each row;
--documents=0 passes one document and no segment ids, for comparison.
"""

import dataclasses
import gc
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import flags

from hysparse_jax import accounting, sharding
from hysparse_jax.data.batches import Batch
from hysparse_jax.errors import UserError
from hysparse_jax.training import step as train_step

from .. import cli, rows
from .profile import print_kernels

# Of the files of Python 3.11's standard library without tests: the median is 6.9 kB, or 2,000
# tokens of 3.5 bytes, and the logarithm's standard deviation 1.6.
MEDIAN_DOCUMENT, LOG_DEVIATION = 2000, 1.6

for _flag in (cli.CONFIG, cli.SET, cli.MESH, cli.JSON):
  flags.declare_key_flag(_flag)
flags.adopt_module_key_flags(rows)
_BASELINES = flags.DEFINE_list("baselines", ["full"], "Which baselines beside it: full, swa.")
flags.DEFINE_alias("twins", "baselines")      # its former name
_STEPS = flags.DEFINE_integer("steps", 8, "Timed steps; the median counts.")
_DOCUMENTS = flags.DEFINE_integer(
  "documents", None, "Equal documents in each row; 0: one, without segment ids. Default: documents "
  "of log-normal lengths, as code files have.", lower_bound=0)
_PEAK = flags.DEFINE_float("peak_tflops", 989.0, "bf16 peak of a device (989: H100 and H200).")
_PROFILE = flags.DEFINE_integer("profile", 0, "Kernels of one step to list, longest first.")
_NAME = flags.DEFINE_string("name", None, "Name of the rows; default the config's.")


def document_lengths(cfg, documents: int | None) -> list[list[int]]:
  """The lengths in tokens of each row's documents; the last one is cut at the row's end."""
  length, align = cfg.data.seq_len, cfg.document_alignment
  rng = np.random.default_rng(0)
  rows_ = []
  for _ in range(cfg.data.batch_size):
    lengths, start = [], 0
    while start < length:
      drawn = (-(-length // max(documents, 1)) if documents is not None else
               max(1, round(rng.lognormal(np.log(MEDIAN_DOCUMENT), LOG_DEVIATION))))
      lengths.append(min(drawn, length - start))
      start += -(-lengths[-1] // align) * align
    rows_.append(lengths)
  return rows_


def packed_batch(cfg, lengths, segmented: bool) -> Batch:
  """Rows of random tokens; padding follows a document up to the next multiple of the alignment."""
  shape = cfg.data.batch_size, cfg.data.seq_len
  tokens = np.random.default_rng(0).integers(
    0, cfg.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
  segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for row, row_lengths in enumerate(lengths):
    start = 0
    for number, length in enumerate(row_lengths, 1):
      segment_ids[row, start:start + length] = number
      positions[row, start:start + length] = np.arange(length)
      start += -(-length // cfg.document_alignment) * cfg.document_alignment
  return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:],
               segment_ids=segment_ids if segmented else None, positions=positions,
               weights=(segment_ids > 0).astype(np.float32))


def bench(cfg, documents: int | None, steps: int, peak_tflops: float, profile: int) -> dict:
  """Compiles and runs the training step of `cfg`; the fields of a row that it measures.

  `profile` > 0 also prints that many kernels of one more step.

  Returns:
    documents (in the whole batch), padding (the share of tokens that are), segmented (whether the
    step took segment ids), ms (median of `steps` steps), tokens_per_second and mfu (padding does
    not count), loss after them, and peak_bytes: what the compiled step needs at once (arguments,
    results that alias none, temporaries), per device.
  """
  mesh = sharding.make_mesh(cfg.mesh)
  program = train_step.build(cfg, mesh)
  lengths = document_lengths(cfg, documents)
  with jax.set_mesh(mesh):
    state = program.init(jax.random.key(0))
    batch = jax.device_put(packed_batch(cfg, lengths, documents != 0), program.batch_sharding)
    memory = program.step.lower(state, batch).compile().memory_analysis()
    times = []
    for _ in range(steps + 1):                     # the first one compiles
      start = time.perf_counter()
      state, result = jax.block_until_ready(program.step(state, batch))
      times.append(time.perf_counter() - start)
    if profile:
      with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
          state, result = jax.block_until_ready(program.step(state, batch))
        print_kernels(folder, profile)
  seconds = statistics.median(times[1:])
  lengths = [length for row in lengths for length in row]
  tokens = sum(lengths)
  flops = sum(accounting.train_flops_per_token(cfg.model, n) * n for n in lengths)
  return {
    "documents": len(lengths), "padding": 1 - tokens / (cfg.data.batch_size * cfg.data.seq_len),
    "segmented": documents != 0,
    "ms": seconds * 1e3, "tokens_per_second": tokens / seconds,
    "mfu": flops / seconds / (peak_tflops * 1e12 * mesh.size), "loss": float(result.loss),
    "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes
                  + memory.output_size_in_bytes - memory.alias_size_in_bytes}


def main(argv):
  """Times what the flags name."""
  del argv
  cfg = cli.load_config()
  if _DOCUMENTS.value is not None and _DOCUMENTS.value > cfg.data.seq_len:
    raise UserError(f"--documents={_DOCUMENTS.value}: want 0 to data.seq_len={cfg.data.seq_len}")
  known = accounting.baselines(cfg.model)
  unknown = sorted(set(_BASELINES.value) - set(known))
  if unknown:
    raise UserError(f"--baselines: got {','.join(unknown)}, want some of {', '.join(known)}")
  models = {cfg.model.attention: cfg.model} | {name: known[name] for name in _BASELINES.value}
  first = None
  for attention, model in models.items():
    row = bench(dataclasses.replace(cfg, model=model), _DOCUMENTS.value, _STEPS.value,
                _PEAK.value, _PROFILE.value)
    gc.collect()                                   # the state of this model, before the next one's
    jax.clear_caches()
    first = first or row
    row = {"op": "train_step", "shape": _NAME.value or cli.CONFIG.value, "attention": attention,
           "layers": model.num_layers, "tokens": cfg.data.seq_len, "batch": cfg.data.batch_size,
           "packing": "log-normal" if _DOCUMENTS.value is None else "equal"} | row
    rows.emit(row, f"{attention:9}{row['ms']:10.1f} ms{row['tokens_per_second']:12,.0f} tokens/s"
                   f"{100 * row['mfu']:7.1f} % MFU{row['peak_bytes'] / 2**30:8.1f} GiB"
                   f"{first['ms'] / row['ms']:7.2f}x")


if __name__ == "__main__":
  cli.run(main)
