"""The layers of the project, and what its verbs leave alone until they need it."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_layers():
    command = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    environment = {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_heavy_libraries_are_imported_where_they_are_used():
    """Training and evaluation load neither TensorFlow nor PyTorch nor plots; the verbs' flags load no JAX."""
    code = (
        "import importlib, sys\n"
        "from absl import flags\n"
        "for verb in ('train', 'evaluate', 'compare', 'generate', 'benchmark'):\n"
        "    [delattr(flags.FLAGS, name) for name in list(flags.FLAGS)]\n"  # the verbs' flags share names
        "    importlib.import_module(f'launch.{verb}')\n"
        "early = {'jax', 'numpy', 'matplotlib', 'torch', 'tensorflow'} & set(sys.modules)\n"
        "import lm.training.train, lm.evaluation.evaluate, lm.evaluation.generate, lm.reporting.report\n"
        "late = {'matplotlib', 'torch', 'tensorflow', 'tokenizers', 'tensorboardX'} & set(sys.modules)\n"
        "print(sorted(early), sorted(late))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] []"
