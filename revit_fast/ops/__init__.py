"""Public operators on packed sequences."""
