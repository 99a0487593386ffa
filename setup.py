"""Package and dependencies; the only place where dependencies are declared."""

from setuptools import find_packages, setup

_TFDS = ["tensorflow-datasets>=4.9.9", "array_record>=0.8", "importlib_resources>=6.0"]

setup(
    name="lm",
    version="0.1.0",
    description="Recurrent and Transformer language models in JAX, trained and compared by perplexity under one protocol",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lm", "lm.*", "launch", "configs", "configs.*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "numpy>=2.0",
        "absl-py>=2.3",
        "ml_collections>=1.1",
        "tokenizers>=0.22",
        "tensorboardX>=2.6.4",
        "matplotlib>=3.10",
        "tqdm>=4.67",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "peers": ["torch>=2.13"],
        "tfds": _TFDS,
        "dev": [
            "pytest>=8.4",
            "pytest-xdist>=3.8",
            "pytest-timeout>=2.4",
            "hypothesis>=6.150",
            "scipy>=1.15",
            "ruff>=0.14",
            "import-linter>=2.5",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            *_TFDS,
        ],
    },
)
