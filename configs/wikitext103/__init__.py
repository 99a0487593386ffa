"""WikiText-103 at word level: published recipes. Give the text by --config.data.path."""
