"""The ops over a cache of past keys and values: prefill (T > 1) and decode (T = 1)."""
