"""Decoding over a paged cache: one token per sequence, pages of 64 tokens = selectable blocks."""
