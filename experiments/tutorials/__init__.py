"""Tutorials: scripts with cells, which are notebooks too; see README.md."""
