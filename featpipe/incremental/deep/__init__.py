"""Class-incremental learning that trains the network too (experimental).

In benchmarks it was rarely better than the same methods on embeddings; `tests/benchmarks/README.md` has the numbers.
"""
