"""Importers of public data sets, each for the folders it is published in."""
