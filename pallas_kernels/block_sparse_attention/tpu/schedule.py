"""How the TPU kernels walk the lists of many tiles in one loop, and the layouts they share.

A program owns `tiles_per_program` tiles of one KV head. Its loop runs over *steps*: up to
`blocks_per_step` listed blocks of one tile. `steps_per_body` steps make a loop body, whatever tiles
they belong to: the schedule never drains at the end of a tile, and a list is padded to a step only.
The matrix units drain once a body (some 150 bundles), which is why bodies are long.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.softmax import EMPTY_LSE, LOG2E, MASKED

_SMEM_BYTES = 1 << 19   # of lists that a program may hold, both pipeline buffers


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Static sizes of a kernel's loop.

  blocks_per_step: blocks multiplied together: a list is padded to a multiple of it.
  steps_per_body: steps in flight together.
  tiles_per_program: tiles whose queries and accumulators are in VMEM together.
  steps_ahead: how far the first products run ahead of the rest; None: a whole body.
  """

  blocks_per_step: int
  steps_per_body: int
  tiles_per_program: int
  steps_ahead: int | None = None

  def __post_init__(self):
    for name in ("blocks_per_step", "steps_per_body", "tiles_per_program"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
    if self.steps_ahead is not None and not 0 < self.steps_ahead < self.steps_per_body:
      raise ValueError(f"steps_ahead: got {self.steps_ahead}, want None or 1 to "
                       f"{self.steps_per_body - 1}, less than steps_per_body")

  def fit(self, plan):
    """This config with no more tiles than the plan has, or than SMEM holds the lists of."""
    words, width = plan.words.shape[-2:]
    per_tile = 2 * 4 * (1 + words) * (-(-width // 128) * 128)
    tiles = min(self.tiles_per_program, plan.counts.shape[-1], max(_SMEM_BYTES // per_tile, 1))
    return dataclasses.replace(self, tiles_per_program=tiles)


def walk_tables(plan, config, segment, segment_blocks):
  """The plan's lists inside one segment of the keys, laid out for the kernels' scalar memory.

  Returns:
    head i32 [BK,C,1,3]: bodies to run, first tile, key index of the first token; spans i32
    [BK,C,4,tiles+1]: each tile's first and last + 1 list entry, its steps, the next tile that has
    any; blocks i32 [BK,C,1,tiles*U+n] and words i32 [BK,C,W,tiles*U+n]: the lists, one tile after
    the other. C programs a head.
  """
  tiles, n = config.tiles_per_program, config.blocks_per_step
  width = plan.blocks.shape[-1]
  live = jnp.arange(width, dtype=jnp.int32) < plan.counts[..., None]
  above = live & (plan.blocks >= (segment + 1) * segment_blocks)
  lo = above.sum(-1, dtype=jnp.int32)
  hi = (live & (plan.blocks >= segment * segment_blocks)).sum(-1, dtype=jnp.int32)

  def programs(x):
    x = x.reshape(-1, *x.shape[2:])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tiles)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, tiles, *x.shape[2:])

  lo, hi = programs(lo), programs(hi)
  steps = -(-(hi - lo) // n)
  numbered = jnp.where(steps > 0, jnp.arange(tiles, dtype=jnp.int32), tiles)
  following = lax.cummin(numbered, axis=2, reverse=True)
  after = jnp.pad(following[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=tiles)
  end = ((0, 0), (0, 0), (0, 1))
  base = jnp.arange(tiles, dtype=jnp.int32) * width
  lo, hi = lo + base, hi + base
  spans = jnp.stack([jnp.pad(lo, end), jnp.pad(hi, end),
                     jnp.pad(steps, end),
                     jnp.pad(after, end, constant_values=tiles)], axis=2)
  bodies = -(-steps.sum(-1, dtype=jnp.int32) // config.steps_per_body)
  begin = programs(plan.positions)[..., 0]
  head = jnp.stack([bodies, following[..., 0], begin], axis=-1)[:, :, None]

  def lists(x):                # i32 [B,K,L,...,U] -> [BK,C,...,tiles*U + n]: reads may run over
    x = programs(x)
    x = jnp.moveaxis(x, 2, -2)
    x = x.reshape(*x.shape[:2], -1, tiles * width)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, n),))

  return head, spans, lists(plan.blocks), lists(plan.words)


class ListWalk:
  """Reads `walk_tables` inside a kernel. A state is (tile, step); tile `tiles` is past the end."""

  def __init__(self, refs, config, sizes):
    self.refs, self.config, self.sizes = refs, config, sizes

  def first(self):
    """The first `steps_per_body` states."""
    return self.following((self.refs.head[0, 0, 0, 1], jnp.int32(0)))

  def following(self, state):
    """`state` and the ones after it, a body's worth."""
    states = [state]
    for _ in range(self.config.steps_per_body - 1):
      states.append(self.advance(states[-1]))
    return states

  def loop(self, slots, products, consume):
    """Runs every step: products(state), a tuple, wait in `slots` for consume(state, *products).

    slots: refs [steps_per_body, ...]. A whole body ahead, all of it is read before any is written,
    and the products of the next body are issued first. Fewer steps ahead, a product goes into a
    slot that was read some steps before and need not wait for its reader, so that fewer
    registers spill: longer bodies then gain where the matrix units are not what binds (v6e).
    """
    steps, ahead = self.config.steps_per_body, self.config.steps_ahead

    def put(slot, state):
      for ref, x in zip(slots, products(state), strict=True):
        ref[slot] = x

    states = self.first()
    for i, state in enumerate(states[:ahead]):
      put(i, state)

    def body(_, flat):
      states = list(zip(flat[::2], flat[1::2]))
      coming = self.following(self.advance(states[-1]))
      if ahead is None:
        ready = [[ref[i] for ref in slots] for i in range(steps)]
        made = [products(state) for state in coming]
        for state, found in zip(states, ready):
          consume(state, *found)
        for i, found in enumerate(made):
          for ref, x in zip(slots, found, strict=True):
            ref[i] = x
      else:
        for i, state in enumerate(states):
          put((i + ahead) % steps, (states + coming)[i + ahead])
          consume(state, *(ref[i] for ref in slots))
      return tuple(x for state in coming for x in state)

    lax.fori_loop(0, self.refs.head[0, 0, 0, 0], body, tuple(x for state in states for x in state))

  def advance(self, state):
    """The next state."""
    tile, step = state
    more = step + 1 < self.refs.spans[0, 0, 2, tile]
    return (jnp.where(more, tile, self.refs.spans[0, 0, 3, tile]),
            jnp.where(more, step + 1, 0))

  def entries(self, state):
    """[(block of the sequence, its row in the key segment, membership words)] of one step."""
    tile, step = state
    start = self.refs.spans[0, 0, 0, tile] + step * self.config.blocks_per_step
    end = self.refs.spans[0, 0, 1, tile]
    found = []
    for e in range(self.config.blocks_per_step):
      live = start + e < end
      block = self.refs.blocks[0, 0, 0, start + e]
      if self.sizes.partial:                 # past the end of the list: a block of the segment
        block = jnp.where(live, block, self.sizes.first_block)
      words = [jnp.where(live, self.refs.words[0, 0, w, start + e], 0)
               for w in range(self.sizes.words)]
      row = pl.multiple_of((block - self.sizes.first_block) * self.sizes.block_size,
                           self.sizes.block_size)
      found.append((block, row, words))
    return found

  def keys(self, ref, entries):
    """[blocks_per_step * block_size, D] rows of the resident keys or values."""
    parts = [ref[0, pl.ds(row, self.sizes.block_size), :] for _, row, _ in entries]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

  def rows(self, ref, tile):
    """[R, D] rows of a tile."""
    r = self.sizes.rows
    tile = jnp.minimum(tile, self.config.tiles_per_program - 1)
    return ref[0, pl.ds(pl.multiple_of(tile * r, r), r), :]

  def lanes(self, ref, tile):
    """[1, R]: one number for each row of a tile."""
    tile = jnp.minimum(tile, self.config.tiles_per_program - 1)
    return ref[0, 0, pl.ds(tile, 1), :]

  def biases(self, entries):
    """[8, R] for each block: 0 in the lanes of tokens that selected it, `MASKED` in the others."""
    token = lax.broadcasted_iota(jnp.int32, (8, self.sizes.rows), 1) // self.sizes.group
    found = []
    for _, _, words in entries:
      word = jnp.full(token.shape, words[0], jnp.int32)
      for w in range(1, len(words)):
        word = jnp.where(token // 32 == w, words[w], word)
      hit = lax.shift_right_logical(word, token % 32) & 1
      found.append(jnp.where(hit != 0, 0.0, MASKED))
    return found

  def masked(self, scores, tile, entries):
    """Logits of a step, [block_size / 8, 8, R] a block, hidden keys at `MASKED` or below.

    Membership is left to `biases`. The causal mask, and the end of the keys, matter to the first
    entries of a list only; documents can end anywhere.
    """
    size, sizes = self.sizes.block_size, self.sizes
    key = lax.broadcasted_iota(jnp.int32, (size, sizes.rows), 0)
    ahead = key - lax.broadcasted_iota(jnp.int32, (size, sizes.rows), 1) // sizes.group
    position = self.refs.head[0, 0, 0, 2] + tile * sizes.tile_tokens
    found = []
    for e, (block, row, _) in enumerate(entries):
      s = scores[e * size:(e + 1) * size]
      visible = None
      if e < sizes.causal_entries:
        visible = ahead <= position - block * size
        if sizes.num_keys is not None and e == 0:
          visible &= key < sizes.num_keys - block * size
      if sizes.segmented:
        keys = self.refs.k_segments[0, pl.ds(row, size), :]
        keys = jnp.concatenate([keys] * (sizes.rows // 128), axis=1)
        same = keys == self.lanes(self.refs.q_segments, tile)
        visible = same if visible is None else visible & same
      if visible is not None:
        s = jnp.where(visible, s, MASKED)
      found.append(s.reshape(size // 8, 8, sizes.rows))
    return found


def padded_width(width):
  """The head dim that the kernels run with: 64, or whole lanes."""
  return 64 if width <= 64 else -(-width // 128) * 128


def to_rows(x, group, tokens):
  """[B,T,N,D] -> [B*K, tokens * G', D']: tokens-major rows of each KV head, zeros in the padding.

  group: (G, G'), query heads to a KV head and what they are padded to.
  """
  b, t, n, d = x.shape
  x = x.reshape(b, t, n // group[0], group[0], d)
  width = padded_width(d) if d > 1 else d
  x = jnp.pad(x, ((0, 0), (0, tokens - t), (0, 0), (0, group[1] - group[0]), (0, width - d)))
  return x.transpose(0, 2, 1, 3, 4).reshape(-1, tokens * group[1], width)


def from_rows(x, batch, group, tokens, width):
  """The inverse of `to_rows`: [B*K, T' * G', D'] -> [B,tokens,N,width]."""
  kv_heads = x.shape[0] // batch
  x = x.reshape(batch, kv_heads, -1, group[1], x.shape[-1])[:, :, :tokens, :group[0], :width]
  return x.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, kv_heads * group[0], width)


def to_lanes(x, group, tokens, config, sizes):
  """f32 or i32 [B,T,N] -> [B*K, C, tiles, R]: one number for each row of each tile."""
  rows = to_rows(x[..., None], group, tokens)      # a width of 1 stays 1
  return rows.reshape(rows.shape[0], -1, config.tiles_per_program, sizes.rows)


def from_lanes(x, batch, group, tokens):
  """The inverse of `to_lanes`: -> [B,tokens,N]."""
  return from_rows(x.reshape(x.shape[0], -1, 1), batch, group, tokens, 1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Static sizes of one launch: a program's tiles against one segment of one KV head's keys.

  Attributes:
    rows: R, rows of a tile: tile_tokens * group.
    words: membership words of a (tile, block).
    causal_entries: a list's first entries, which the causal mask may hide in part.
    num_keys: S, where queries may come after the last key and its block is padded; or None.
    first_block: of the key segment; segment_blocks: how many it has.
    segment: its number.
    partial: whether there are others.
    segmented: whether documents are masked.
  """

  rows: int
  group: int
  tile_tokens: int
  block_size: int
  words: int
  causal_entries: int
  num_keys: int | None
  segment: int
  segment_blocks: int
  partial: bool
  segmented: bool

  @classmethod
  def of(cls, plan, segment, segment_blocks, launches, segmented):
    """The sizes that `plan` implies, for one of `launches` key segments."""
    padded = plan.may_pass_end and plan.num_keys % plan.block_size
    return cls(plan.tile_tokens * plan.group, plan.group, plan.tile_tokens, plan.block_size,
               plan.words.shape[3], plan.causal_entries(), plan.num_keys if padded else None,
               segment, segment_blocks, launches > 1, segmented)

  @property
  def first_block(self):
    """First block of the key segment."""
    return self.segment * self.segment_blocks

  @property
  def key_rows(self):
    """Keys of the segment."""
    return self.segment_blocks * self.block_size


def launches(q, k, v, plan, config, segment_blocks, segment_ids, kv_segment_ids, more=None):
  """Yields (whether it is the last, `Sizes`, operands {name: (array, spec)}) for each key segment.

  Args:
    q, k, v, plan, config, segment_blocks, segment_ids, kv_segment_ids: as in `forward.forward`.
    more: sizes -> further operands, or None.
  """
  count = k.shape[1] // (segment_blocks * plan.block_size)
  for segment in range(count):
    sizes = Sizes.of(plan, segment, segment_blocks, count, segment_ids is not None)
    tables = walk_tables(plan, config, segment, segment_blocks)
    operands = {name: (table, smem(table))
                for name, table in zip(("head", "spans", "blocks", "words"), tables)}
    operands["q"] = q, program_rows(config, sizes, q.shape[-1])
    operands |= {} if more is None else more(sizes)
    operands |= {name: (x, resident(sizes.key_rows, x.shape[-1], segment))
                 for name, x in (("k", k), ("v", v))}
    yield segment == count - 1, sizes, operands | segment_operands(
      segment_ids, kv_segment_ids, config, sizes, plan.counts.shape[1], q.shape[1] // sizes.group,
      k.shape[1])


def program_rows(config, sizes, width):
  """Block spec of the rows of a program's tiles: [1, tiles * R, width]."""
  return pl.BlockSpec((1, config.tiles_per_program * sizes.rows, width), lambda h, c: (h, c, 0))


def program_lanes(config, sizes):
  """Block spec of one number for each row of a program's tiles: [1,1,tiles,R]."""
  return pl.BlockSpec((1, 1, config.tiles_per_program, sizes.rows), lambda h, c: (h, c, 0, 0))


def smem(array):
  """Block spec of a table that a program (head, program of the head) reads its part of."""
  return pl.BlockSpec((1, 1, *array.shape[2:]), lambda h, c: (h, c, 0, 0),
                      memory_space=pltpu.SMEM)


def resident(rows, width, segment):
  """Block spec of one KV head's rows in VMEM for as long as its programs run, in one buffer."""
  return pl.BlockSpec((1, rows, width), lambda h, c: (h, segment, 0),
                      pipeline_mode=pl.Buffered(buffer_count=1))


def segment_operands(segment_ids, kv_segment_ids, config, sizes, heads, tokens, key_tokens):
  """{name: (array, spec)} of document ids, equal where a query may look; {} without documents.

  q_segments i32 [B,C,tiles,R] of segment_ids i32 [B,T]; k_segments i32 [B,S,128] of kv_segment_ids
  i32 [B,S], the same in every lane. heads: K.
  """
  if segment_ids is None:
    return {}
  ids = jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).min,  # no key has it
                  segment_ids)
  q_ids = jnp.broadcast_to(ids[:, :, None], (*ids.shape, sizes.group))
  q_ids = to_lanes(q_ids, (sizes.group, sizes.group), tokens, config, sizes)
  k_ids = jnp.pad(kv_segment_ids, ((0, 0), (0, key_tokens - kv_segment_ids.shape[1])))
  k_ids = jnp.broadcast_to(k_ids[:, :, None], (*k_ids.shape, 128))
  k_spec = pl.BlockSpec((1, sizes.key_rows, 128), lambda h, c: (h // heads, sizes.segment, 0),
                        pipeline_mode=pl.Buffered(buffer_count=1))
  q_spec = pl.BlockSpec((1, 1, config.tiles_per_program, sizes.rows),
                        lambda h, c: (h // heads, c, 0, 0))
  return {"q_segments": (q_ids, q_spec), "k_segments": (k_ids, k_spec)}


def log2_lse(lse):
  """A natural log-sum-exp as the kernels' exponentials want it; finite where a row sees nothing."""
  return jnp.where(lse == EMPTY_LSE, 0.0, lse * LOG2E)


def call(kernel, name, operands, outputs, scratch, grid, *, interpret, vmem_limit, aliases=None):
  """`pl.pallas_call` with named refs: operands and outputs {name: (array or shape, spec)}.

  The programs of a head run in order, since they may share an accumulator.
  """
  names = [*operands, *outputs, *scratch]

  def body(*refs):
    kernel(types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

  results = pl.pallas_call(
    body, grid=grid, name=name, interpret=interpret,
    in_specs=[spec for _, spec in operands.values()],
    out_specs=[spec for _, spec in outputs.values()],
    out_shape=[shape for shape, _ in outputs.values()],
    scratch_shapes=list(scratch.values()),
    input_output_aliases={
      list(operands).index(a): list(outputs).index(b) for a, b in (aliases or {}).items()},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit),
  )(*(array for array, _ in operands.values()))
  return dict(zip(outputs, results, strict=True))


def f32(*shape):
  """An abstract float32 array."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)
