"""Comparisons: several methods on several settings and seeds, from a file of `experiments/compare/` to tables."""
