"""Heads with a closed-form solution from sums over rows."""
