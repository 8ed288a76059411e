"""Leaves the tutorials out of the doctests: each runs when it is imported."""

collect_ignore_glob = ["[a-z]*_*.py"]
