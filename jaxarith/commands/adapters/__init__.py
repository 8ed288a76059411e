"""Commands for adapters: merge them, extract them from models, verify merged models."""
