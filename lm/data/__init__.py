"""Text to batches: sources, tokenizers, the token cache and batches as pure functions of a step."""
