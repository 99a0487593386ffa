"""WikiText-2 at word level: published recipes and models beside them. Give the text by --config.data.path."""
