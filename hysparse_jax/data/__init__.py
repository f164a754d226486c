"""Documents to tokens to packed batches."""
