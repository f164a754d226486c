"""Counts read from the TPU compiler's schedules."""
