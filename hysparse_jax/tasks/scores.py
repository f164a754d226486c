"""How answers are scored: RULER's official match rules, and the exact-set F1 beside them.

RULER (Hsieh et al., arXiv 2404.06654) looks for each reference as a lower-case substring of what
was generated. Its rules reward recall alone: naming everything scores 100. F1 over the set of
answers does not.
"""

import re


def match_all(generated: str, references) -> float:
  """The share of the references found in the text: RULER's rule for all tasks but qa."""
  return sum(reference.lower() in generated.lower() for reference in references) / len(references)


def match_part(generated: str, references) -> float:
  """1 if any reference is found in the text, else 0: RULER's rule for qa."""
  return float(any(reference.lower() in generated.lower() for reference in references))


def named(generated: str) -> list[str]:
  """The answers in a generated list: its first line, split at commas and "and", without dots."""
  first_line = generated.strip().split("\n", 1)[0]
  parts = re.split(r",|;|\band\b", first_line)
  return [part for part in (part.strip(" .'\"").lower() for part in parts) if part]


def set_f1(predicted, references) -> float:
  """Harmonic mean of precision and recall between two collections, duplicates counting once."""
  predicted, references = set(predicted), set(references)
  right = len(predicted & references)
  return 2 * right / (len(predicted) + len(references)) if right else 0.0


def set_recall(predicted, references) -> float:
  """The share of the references that were predicted: `match_all` for tokens."""
  references = set(references)
  return len(set(predicted) & references) / len(references)
