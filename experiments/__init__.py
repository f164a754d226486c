"""Programs: train, evaluate, generate, account. Each is `python -m experiments.NAME`."""
