"""Loading a run, sampling, streaming text."""
