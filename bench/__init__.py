"""Benchmarks of fused_mlp: ``python -m bench``. docs/benchmarks.md says how to read them."""
