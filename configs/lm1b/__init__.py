"""The One Billion Word Benchmark: published recipes, by words and by subwords. Give the text by --config.data.path."""
