"""Heads that are solved in closed form, from sums over rows."""
