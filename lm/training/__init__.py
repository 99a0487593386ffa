"""From a config to a finished run: optimiser, step and loop."""
