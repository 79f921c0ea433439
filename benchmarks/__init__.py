"""Benchmarks: the commands that measure every figure in README and docs/ (docs/development.md#figures lists them)."""
