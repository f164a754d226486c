"""Parameters, FLOPs and KV bytes from the config alone: the numbers before the run.

Axis letters: D model, N query heads, K KV heads, H head dim, F ffn, E experts, V vocab, T tokens,
L layers.
"""

import dataclasses

from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError

KV_DTYPE_BYTES = {"bf16": 2, "fp8": 1, "f32": 4}


@dataclasses.dataclass(frozen=True)
class Account:
  """What a model costs with sequences of a given length; the fields of an account row."""

  params: int                            # all of them
  active_params: int                     # without the experts a token does not visit
  train_flops_per_token: float           # forward and backward, nothing recomputed
  prefill_flops: int                     # of one prompt, logits of its last token only
  kv_bytes_per_token: int                # what the cache grows by
  kv_bytes_constant: int                 # window rings
  kv_bytes_total: int                    # of one sequence, in whole pages
  kv_read_bytes_per_decoded_token: int   # at that length


def account(cfg: ModelConfig, tokens: int, kv_dtype: str = "bf16") -> Account:
  """The account of one sequence of `tokens` tokens with a cache of `kv_dtype` elements.

  Raises:
    UserError: no tokens, or an unknown `kv_dtype`.
  """
  if tokens < 1:
    raise UserError(f"tokens is {tokens}; an account needs a length of at least 1")
  if kv_dtype not in KV_DTYPE_BYTES:
    raise UserError(f"kv_dtype is {kv_dtype!r}; allowed: {', '.join(KV_DTYPE_BYTES)}")
  groups = param_groups(cfg)
  per_token, constant = (n * KV_DTYPE_BYTES[kv_dtype] for n in _kv_elements(cfg))
  return Account(
    params=sum(groups.values()),
    active_params=sum(_active(cfg, groups).values()),
    train_flops_per_token=train_flops_per_token(cfg, tokens),
    prefill_flops=prefill_flops(cfg, tokens),
    kv_bytes_per_token=per_token,
    kv_bytes_constant=constant,
    kv_bytes_total=per_token * -(-tokens // cfg.block_size) * cfg.block_size + constant,
    kv_read_bytes_per_decoded_token=_kv_reads(cfg, tokens) * KV_DTYPE_BYTES[kv_dtype])


def baselines(cfg: ModelConfig) -> dict[str, ModelConfig]:
  """The baselines: full attention in every layer, and windows in place of the sparse layers."""
  return {attention: dataclasses.replace(cfg, attention=attention, local_branch=True,
                                         local_shares_kv=False, block_choice="oracle")
          for attention in ("full", "swa")}


def account_row(cfg: ModelConfig, tokens: int, kv_dtype: str = "bf16") -> dict:
  """`account` as plain numbers, with those of its baselines under `full` and `swa`."""
  row = dataclasses.asdict(account(cfg, tokens, kv_dtype))
  for name, baseline in baselines(cfg).items():
    row[name] = dataclasses.asdict(account(baseline, tokens, kv_dtype))
  row["kv_ratio_to_full"] = row["full"]["kv_bytes_total"] / row["kv_bytes_total"]
  return row


def summary(cfg: ModelConfig, tokens: int, kv_dtype: str = "bf16") -> str:
  """`account_row` as a table for people: this config beside its baselines."""
  row = account_row(cfg, tokens, kv_dtype)
  columns = [row, row["full"], row["swa"]]
  lines = [
    ("parameters", [_scaled(c["params"]) for c in columns]),
    ("  active per token", [_scaled(c["active_params"]) for c in columns]),
    ("train FLOPs per token", [_scaled(c["train_flops_per_token"]) for c in columns]),
    ("prefill FLOPs", [_scaled(c["prefill_flops"]) for c in columns]),
    ("KV bytes per token", [f"{c['kv_bytes_per_token']:,}" for c in columns]),
    ("  constant", [f"{c['kv_bytes_constant']:,}" for c in columns]),
    ("  of the sequence", [_scaled(c["kv_bytes_total"]) + "B" for c in columns]),
    ("  read per decoded token",
     [_scaled(c["kv_read_bytes_per_decoded_token"]) + "B" for c in columns]),
    ("KV cache, full / this",
     [f"{row['full']['kv_bytes_total'] / c['kv_bytes_total']:.2f}x" for c in columns]),
  ]
  head = f"{tokens:,} tokens, {kv_dtype} cache"
  table = [(head, [f"{cfg.attention} (this)", "full", "swa"]), *lines]
  return "\n".join(f"{label:<28}" + "".join(f"{value:>18}" for value in values)
                   for label, values in table)


def param_groups(cfg: ModelConfig) -> dict[str, int]:
  """Parameters by what they are; the values sum to the size of `Transformer(cfg)`.

  `experts` are all experts' weights; `vectors` are norms, sinks and router biases, which no matmul
  uses.
  """
  D, N, K, H, Hv, V = (cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.v_dim,
                       cfg.vocab_size)
  L, kinds = cfg.num_layers, cfg.layer_kinds
  with_kv = sum(map(cfg.owns_kv, kinds))
  branches = sum((kind == "sparse") + cfg.has_local_branch(kind) for kind in kinds)
  gate = {"elementwise": D * N * Hv, "per_head": D * N, "none": 0}[cfg.gate]
  vectors = D + L * 2 * D + (L + with_kv) * H * cfg.qk_norm + branches * N * cfg.sinks
  groups = {
    "embedding": V * D,
    "head": 0 if cfg.tied_embeddings else D * V,
    "queries_and_output": L * (D * N * H + N * Hv * D),
    "keys_and_values": with_kv * (D * K * H + D * K * Hv),
    "gates": branches * gate,
  }
  if cfg.moe is None:
    groups["mlp"] = L * 3 * D * cfg.d_ff
  else:
    groups["experts"] = L * cfg.moe.num_experts * 3 * D * cfg.moe.d_ff
    groups["router"] = L * D * cfg.moe.num_experts
    vectors += L * cfg.moe.num_experts * (cfg.moe.bias_update_rate > 0)
  return groups | {"vectors": vectors}


def train_flops_per_token(cfg: ModelConfig, tokens: int) -> float:
  """Of one row of `tokens` tokens, mean over its tokens: 6 per matmul weight, 3x the attention.

  Recomputation (`remat`) and the choice of blocks are not counted, so utilisation figures made
  from it are of useful work.
  """
  return 6 * (_matmul_params(cfg) + _head(cfg)) + 3 * _attention_flops(cfg, tokens) / tokens


def prefill_flops(cfg: ModelConfig, tokens: int) -> int:
  """Of one prompt: 2 per matmul weight and token, the attention, the last token's logits."""
  return 2 * _matmul_params(cfg) * tokens + 2 * _head(cfg) + _attention_flops(cfg, tokens)


def _active(cfg, groups) -> dict[str, int]:
  if cfg.moe is None:
    return groups
  used = groups["experts"] // cfg.moe.num_experts * cfg.moe.experts_per_token
  return groups | {"experts": used}


def _head(cfg) -> int:
  return cfg.d_model * cfg.vocab_size


def _matmul_params(cfg) -> int:
  """Weights that multiply a token on its way to the head."""
  active = _active(cfg, param_groups(cfg))
  return sum(active.values()) - active["embedding"] - active["head"] - active["vectors"]


def _attention_flops(cfg, tokens) -> int:
  """Forward, one row: q k^T and p v, two FLOPs each per head, key and channel."""
  per_key = 2 * cfg.num_heads * (cfg.head_dim + cfg.v_dim)
  return per_key * sum(_keys_seen(tokens, limit) for limit in _key_limits(cfg, tokens))


def _key_limits(cfg, tokens) -> list[int]:
  """How many keys a query may see at most, of each layer's each branch."""
  limits = {"full": [tokens], "window": [cfg.window],
            "sparse": [cfg.selected_tokens] + [cfg.window] * cfg.has_local_branch("sparse")}
  return [limit for kind in cfg.layer_kinds for limit in limits[kind]]


def _keys_seen(tokens, limit) -> int:
  """Sum over t in 1..tokens of min(t, limit): causal pairs when a token sees at most `limit`."""
  short = min(tokens, limit)
  return short * (short + 1) // 2 + (tokens - short) * limit


def _kv_elements(cfg) -> tuple[int, int]:
  """Cache elements per token (full layers) and constant (rings of layers owning a local KV)."""
  per_layer = cfg.num_kv_heads * (cfg.head_dim + cfg.v_dim)
  full = cfg.layer_kinds.count("full")
  rings = sum(map(cfg.owns_kv, cfg.layer_kinds)) - full
  return full * per_layer, rings * cfg.window * per_layer


def _kv_reads(cfg, tokens) -> int:
  """Cache elements one decoded token reads: all in full layers, else selection and window."""
  per_layer = cfg.num_kv_heads * (cfg.head_dim + cfg.v_dim)
  return per_layer * sum(min(limit, tokens) for limit in _key_limits(cfg, tokens))


def _scaled(value) -> str:
  """1.23 k, M, G, T, P or E: decimal."""
  for unit in ("", "k", "M", "G", "T", "P"):
    if abs(value) < 1000:
      return f"{value:.3g} {unit}" if unit else f"{value:.3g}"
    value /= 1000
  return f"{value:.3g} E"
