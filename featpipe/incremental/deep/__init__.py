"""Class-incremental learning that re-enters the network (experimental)."""
