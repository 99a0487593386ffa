"""Experiments: one file each, a short diff over the defaults of lm.config."""
