"""Recipes: TOML files that describe experiments."""
