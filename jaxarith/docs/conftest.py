"""Leaves the site's machinery out of the doctests: it runs inside MkDocs."""

collect_ignore_glob = ["site/*.py"]
