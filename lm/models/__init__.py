"""Architectures as flax.linen modules, and the n-gram."""
