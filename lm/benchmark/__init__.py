"""How fast training, evaluation and generation are, beside what the machine can do and a peer."""
