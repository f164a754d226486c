"""Recall tasks: training mixes them into its rows, evaluation scores them."""
