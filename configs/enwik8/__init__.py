"""The bytes of enwik8: published recipes. Give the text by --config.data.path."""
