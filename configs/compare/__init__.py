"""The main job: four architectures of equal size on equal tokens of the built-in corpus, and two n-grams."""
