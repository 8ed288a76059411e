"""Leaves modules that need PyTorch out of the doctests where it is not installed."""

import importlib.util

_TORCH = ["torch_merges.py", "torch_tangent.py"]
collect_ignore = [] if importlib.util.find_spec("torch") else _TORCH
