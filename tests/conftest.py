"""What every test stands on: a clear environment, set before JAX starts, caches of its own, and tiny experiments.

Run `pytest` for one process or `pytest -n 2` for two; each worker then computes on its share of the cores.
"""

import importlib.metadata
import os
import shutil
import signal
import tempfile

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")

# A shell that starts this in the background has it ignore Ctrl-C, and with it the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

if _WORKER is None:
    # What somebody exported for other work must not decide how a test ends. Workers of pytest-xdist inherit the result.
    for _name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "PJRT_"))]:
        del os.environ[_name]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # Nearly all time here goes into compiling small programs that run once. XLA's own passes stay as they are; LLVM hurries,
    # and loops are written without MLIR where there is a choice, which halves the time of a compilation.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no other emitters, and abort at the flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    # Token caches, font caches: one folder for all workers and the processes they start, gone at the end.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lm-tests-cache-")
else:
    _share = str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    for _name in ("PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[_name] = _share

# Numpy reads its number of threads when it is imported, and JAX its settings, hence only now.
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from lm.config import Config, resolve  # noqa: E402
from lm.models.build import initialise  # noqa: E402


def pytest_unconfigure(config):
    if _WORKER is None:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture
def rng():
    """Random numbers in NumPy, the same in every run of a test."""
    return np.random.default_rng(20)


@pytest.fixture(scope="module")
def compilations_shared(tmp_path_factory):
    """Keeps what XLA compiles in a folder, so that a run taken up again is not compiled again; also by processes started."""
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()  # whether there is a cache is looked up once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tiny():
    """A function (architecture, fields) -> resolved config of a model of two layers of width 8.

    The fields are values that differ, as section__field; `seed` and others at the top by their own name.
    """
    return _tiny_config


def _tiny_config(architecture, **fields):
    config = Config()
    values = {"model__architecture": architecture, "model__num_layers": 2, "data__batch_size": 4, "data__seq_len": 5}
    if not {"model__num_params", "model__layer_dims"} & set(fields):
        values["model__hidden_dim"] = 8
    if architecture == "transformer":
        values |= {"model__num_heads": 2, "data__order": "windows"}
    for name, value in (values | fields).items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return resolve(config)


@pytest.fixture(scope="session")
def random_params():
    """A function (model) -> random parameters in its shapes, biases too, scales of norms about one. Compiles nothing."""
    return _random_params


def _random_params(model):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: initialise(model, 0)))
