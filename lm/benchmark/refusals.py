"""What no peer does: settings that every one of them refuses, and how they say so."""

from collections.abc import Mapping

from lm.config import Config
from lm.errors import UserError


def refuse_extras(peer: str, config: Config, mode: str, further: Mapping[str, object]) -> None:
    """Raises a UserError that names the first setting which the peer does not do.

    Args:
      peer: as in --against.
      config: resolved.
      mode: what is measured; what only training sees counts for "train" alone.
      further: settings by name, as `config.section.field`; those that are true are refused too.
    """
    model, training = config.model, config.training
    extras = {
        "config.model.skip_connections": model.skip_connections,
        "config.model.input_gate": model.input_gate not in (None, "free"),
        "config.model.project_output": model.project_output,
        "config.model.cutoffs": model.cutoffs,
        "config.model.num_softmaxes": model.num_softmaxes > 1,
        "config.model.mogrifier_rounds": model.mogrifier_rounds,
        "config.training.averaging": mode == "train" and training.averaging,
        "config.training.activation_penalty": mode == "train" and training.activation_penalty,
        "config.training.temporal_activation_penalty": mode == "train" and training.temporal_activation_penalty,
        **further,
    }
    for name, is_set in extras.items():
        if is_set:
            raise UserError(f"{name} is set, which --against={peer} does not do; leave it open")
