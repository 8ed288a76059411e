"""Merges as data: from flags and YAML files to a function of models."""
