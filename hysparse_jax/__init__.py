"""HySparse: hybrid sparse attention with oracle block selection and KV sharing, in JAX."""
