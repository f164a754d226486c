"""How a run fares under kills, damage and load."""
