"""Adapters as results: merged, extracted from models, and verified in models."""
