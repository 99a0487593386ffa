"""Tiny Shakespeare at character level: small models under one small budget. Give the text by --config.data.path."""
