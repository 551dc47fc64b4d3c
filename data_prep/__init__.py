"""Preparation of site files: partitions into clients, corruption of annotations, derived files keyed by recipe."""
