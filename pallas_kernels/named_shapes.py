"""Named problem sizes: the paper models' attention, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
  """The sizes of one attention call."""

  batch: int = 1                      # B
  tokens: int = 512                   # T
  num_heads: int = 4                  # N
  num_kv_heads: int = 2               # K
  head_dim: int = 32                  # H
  value_head_dim: int | None = None   # E; None: head_dim
  block_size: int = 64
  num_blocks: int = 16                # P
  window: int = 128

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads={self.num_heads} is not a multiple of "
                       f"num_kv_heads={self.num_kv_heads}; change one")

  @property
  def v_dim(self) -> int:
    """Head dim of the values."""
    return self.head_dim if self.value_head_dim is None else self.value_head_dim


def _model_7b(tokens):
  return AttentionShape(tokens=tokens, num_heads=32, num_kv_heads=8, head_dim=128)


def _model_80b(tokens):
  return AttentionShape(tokens=tokens, num_heads=64, num_kv_heads=4, head_dim=128)


PAPER = {      # the HySparse paper's two models
  "7b_8k": _model_7b(8_192),
  "7b_32k": _model_7b(32_768),
  "7b_128k": _model_7b(131_072),
  "80b_32k": _model_80b(32_768),
  "80b_128k": _model_80b(131_072),
}

LARGE = {      # what is timed on accelerators: a million tokens fit one with few heads
  **PAPER,
  "1m": AttentionShape(tokens=1_048_576, num_heads=8, num_kv_heads=1, head_dim=128),
}

TRAINING = {   # what the tiny config trains with on a laptop, and the longest a reference must bear
  "tiny": AttentionShape(batch=8, tokens=512),
  "tiny_8k": AttentionShape(tokens=8_192),
}
