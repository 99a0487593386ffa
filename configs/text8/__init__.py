"""The characters of text8: published recipes. Give the text by --config.data.path."""
