"""Scoring whole texts under one protocol, and sampling from finished runs."""
