"""What the loop decides after a look at valid, as scalars of the state, so that a change never retraces a step."""

from collections.abc import Mapping

import numpy as np

from lm.config import Config
from lm.training.progress import Progress

Controls = Mapping[str, np.ndarray]


def initial_controls(averaging: str | None) -> Controls:
    """`learning_rate_scale`, a factor on every update; where parameters are averaged `averaging`, 1 from when that begins."""
    controls = {"learning_rate_scale": np.ones((), np.float32)}
    if averaging is not None:
        controls["averaging"] = np.array(averaging == "start", np.int32)
    return controls


def decide(config: Config, controls: Controls, progress: Progress) -> Controls:
    """The controls after a look at valid that `progress` has noted.

    plateau: the learning rate decays when looks stall. averaging="stall": the mean begins when a look is worse than the best
    of those which at least `averaging_patience` others lie behind (NT-ASGD: Merity et al. 2017, arXiv:1708.02182, algorithm 1).
    """
    optimizer, training, decided = config.optimizer, config.training, dict(controls)
    if optimizer.schedule == "plateau" and progress.stalled_since_decay > optimizer.plateau_patience:
        progress.stalled_since_decay = 0
        scale = controls["learning_rate_scale"] * optimizer.decay_factor
        decided["learning_rate_scale"] = np.asarray(scale, np.float32)
    if training.averaging == "stall" and progress.is_worse_than_before(training.averaging_patience):
        decided["averaging"] = np.ones((), np.int32)
    return decided


def shown(controls: Controls) -> dict[str, int]:
    """For the line of a look at valid: whether it saw averaged parameters, where the config may ask for them."""
    return {"averaging": int(controls["averaging"])} if "averaging" in controls else {}
