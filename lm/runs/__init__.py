"""The folder of a run: its files, lock and checkpoints, and the way back from a folder to a model."""
