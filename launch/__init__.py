"""The command-line verbs: flags -> one call into lm."""
