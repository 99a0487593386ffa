"""The same model, optimiser and batches in PyTorch, as its users write them: what launch.benchmark measures ours against.

torch is an extra, imported inside functions only, and its process loads no JAX. Mathematics and starting point are ours to the
last bias, so that first losses and updates can be held against each other; all else (layouts, kernels, threads) is torch's.
"""

import collections
import contextlib
import importlib.util
import sys
import time
from typing import Any

import numpy as np

from lm.benchmark import torch_models
from lm.benchmark.peer_side import Start
from lm.benchmark.refusals import refuse_extras
from lm.benchmark.units import Generation, run_on
from lm.config import RECURRENT, Config, dropout_rates
from lm.data.prefetch import prefetch
from lm.errors import UserError

_TRIAL_SECONDS = 0.5  # of a turn in which eager and compiled are told apart
_OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")  # whose updates in torch are those of lm.training.optimizer


def check(draft: Config, config: Config, mode: str) -> None:
    """Raises a UserError, with what to set, where the peer cannot do what the config asks for.

    Args:
      draft: as given; only what was set there is named.
      config: the draft, resolved.
      mode: what is measured, "train", "evaluate" or "generate".
    """
    rates = dropout_rates(draft.model)
    if config.model.architecture in RECURRENT:
        rates = [name for name in rates if name == "state_dropout_rate"]
    if rates and mode == "train":
        raise UserError(
            f"--against=torch has no such dropout ({config.model.architecture}); set "
            + ", ".join(f"--config.model.{name}=0" for name in rates)
        )
    settings = config.optimizer
    if settings.name not in _OPTIMIZERS and mode == "train":
        raise UserError(
            f"config.optimizer.name is {settings.name!r}, but --against=torch knows no update in torch that is the same; "
            f"use one of {', '.join(_OPTIMIZERS)}"
        )
    if settings.name == "momentum" and settings.weight_decay and mode == "train":
        raise UserError(
            f"config.optimizer.weight_decay is {settings.weight_decay}, but torch's momentum would gather the decay in its "
            "velocity; for --against=torch set it to 0 or use adamw"
        )
    if config.data.order in ("packed", "padded"):
        raise UserError(
            f"--against=torch knows no documents within a row, but config.data.order is {config.data.order!r}; set it to windows"
        )
    if config.model.architecture == "transformer" and config.data.order == "stream":
        raise UserError("--against=torch has no key/value cache for a Transformer's stream; set --config.data.order=windows")
    if config.training.num_micro_batches != 1:
        raise UserError(
            f"config.training.num_micro_batches is {config.training.num_micro_batches}, which --against=torch does not do; set "
            "--config.training.num_micro_batches=1"
        )
    model = config.model
    further = {
        f"config.model.architecture={model.architecture}": model.architecture not in ("rnn", "gru", "lstm", "transformer"),
        "config.model.positions": model.positions == "relative",
        "config.model.qk_norm": model.qk_norm,
        "config.optimizer.decayed": mode == "train" and settings.decayed == "all" and settings.weight_decay,
    }
    refuse_extras("torch", config, mode, further)
    if importlib.util.find_spec("torch") is None:
        raise UserError("--against=torch needs PyTorch, which is not installed; install the extra: pip install -e '.[peers]'")


class Peer:
    """A model in PyTorch that starts from given parameters.

    Attributes:
      model: a torch.nn.Module: inputs_BT, state -> logits_BTV, state.
      versions: the library with its version, and the number of its threads.
    """

    _MATMULS_ON_GPU = "high"  # of float32: TF32, as in JAX there

    def __init__(self, config: Config, vocab_size: int, params: Any, source: Any, device: str = "cpu", length: int = 0):
        """Builds the model with a copy of the parameters.

        Args:
          config: as `check` passes it, its widths solved.
          params: ours, NumPy or JAX.
          source: of the batches that ours reads: a BatchSource, or `lm.benchmark.peer_side.Batches`.
          device: of torch, "cpu" or "cuda"; bfloat16 is by autocast, as `config.compute_dtype` says.
          length: of the longest text, if longer than `config.data.seq_len`.

        Raises:
          UserError: a GPU that this PyTorch cannot use.
        """
        import torch

        if device == "cuda":
            if not torch.cuda.is_available():
                raise UserError(
                    f"--against=torch compares on the GPU that JAX uses, but torch {torch.__version__} finds none; install one "
                    "that is built for it, or set JAX_PLATFORMS=cpu"
                )
            torch.set_float32_matmul_precision(self._MATMULS_ON_GPU)
        self._config, self._source, self._device = config, source, torch.device(device)
        self.model = torch_models.build(config, vocab_size, max(config.data.seq_len, length))
        copied = {
            name: torch.from_numpy(np.array(value)) for name, value in torch_models.state_dict(params, config.model).items()
        }
        self.model.load_state_dict(copied)
        self.model.to(self._device)
        self.compile(False)
        self.versions = {"library": f"torch {torch.__version__}", "num_threads": torch.get_num_threads()}

    def compile(self, wanted: bool = True) -> None:
        """From now on runs what torch.compile makes of model and loss, or both eagerly."""
        import torch

        wrap = torch.compile if wanted else lambda function: function
        self.score, self.call = wrap(self._scored), wrap(self.model)

    def compiled_is_faster(self) -> bool:
        """Whether it is, tried in turns of half a second; False where nothing can be compiled."""
        import torch

        self.run(2)
        turn = max(2, round(2 * _TRIAL_SECONDS / self.run(2)[0]))
        try:
            self.compile()
            self.run(2)
            seconds = {False: [], True: []}
            for wanted in (False, True) * 2:
                self.compile(wanted)
                seconds[wanted].append(self.run(turn)[0])
        except Exception as error:  # of many kinds, where there is no compiler for it
            print(f"torch.compile fails here ({type(error).__name__}); torch runs eagerly", file=sys.stderr)
            return False
        finally:
            self.compile(False)
        has_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # of some modules it makes nothing
        return has_graphs and min(seconds[True]) < min(seconds[False])

    def run(self, num_units: int) -> tuple[float, float]:
        """As `Workload.run`."""
        raise NotImplementedError

    def first_loss(self) -> float:
        """Nats per token of the first batch, without a step and without dropout."""
        import torch

        inputs_BT, targets_BT, _ = self._on_device(self._source.batch(0, slice(None)))
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return float(self._scored(inputs_BT, None, targets_BT)[0])
        finally:
            self.model.train(was_training)

    def _half(self):
        """Autocast to bfloat16, where the config computes in it."""
        import torch

        half = self._config.compute_dtype == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16) if half else contextlib.nullcontext()

    def _scored(self, inputs_BT, state, targets_BT, **options):
        from torch import nn

        with self._half():
            logits_BTV, state = self.model(inputs_BT, state)
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), **options), state

    def _on_device(self, batch):
        """Inputs, targets, and whether all rows start empty (a stream's rows begin an epoch together)."""
        import torch

        tensors = [torch.from_numpy(np.asarray(x)).long() for x in (batch.inputs_BT, batch.targets_BT)]
        if self._device.type == "cuda":
            tensors = [x.pin_memory().to(self._device, non_blocking=True) for x in tensors]
        return *tensors, bool(batch.reset_B.all())

    def _ahead(self):
        """The source's batches, made in a thread."""
        make = lambda step: self._on_device(self._source.batch(step, slice(None)))  # noqa: E731
        return prefetch(make, 0, sys.maxsize, self._config.data.prefetch)

    def device_peak_bytes(self) -> int | None:
        """Most memory so far of the accelerator; None on a CPU."""
        import torch

        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def _wait(self):
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize()


class TrainingPeer(Peer):
    """Trains on the batches that ours trains on."""

    def __init__(self, *args, learning_rates: np.ndarray, **options):
        """Like Peer.

        Args:
          learning_rates: of the steps, from the first; after the last it begins anew.
        """
        super().__init__(*args, **options)
        self._learning_rates, self._num_steps = learning_rates, 0
        self._optimizer = _optimizer(self._config, self.model)
        self._state = None
        self._batches = self._ahead()

    def run(self, num_units: int) -> tuple[float, float]:
        """As `Workload.run`."""
        return run_on(self._batches, num_units, self._train)

    def _train(self, batches):
        for batch in batches:
            self._step(*batch)
        self._wait()

    def _step(self, inputs_BT, targets_BT, starts):
        from torch import nn

        settings, training = self._config.optimizer, self._config.training
        state = None if starts else self._state
        loss, state = self.score(inputs_BT, state, targets_BT, label_smoothing=training.label_smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        elif settings.clip_value is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), settings.clip_value)
        for group in self._optimizer.param_groups:
            group["lr"] = float(self._learning_rates[self._num_steps % len(self._learning_rates)])
        self._optimizer.step()
        self._num_steps += 1
        self._state = _detached(state)

    def close(self) -> None:
        """Stops the thread that makes batches."""
        self._batches.close()


class EvaluationPeer(Peer):
    """Scores every token of the batches, its state carried from one to the next."""

    _MATMULS_ON_GPU = "highest"  # as lm.evaluation.scorers has it

    def __init__(self, *args, **options):
        """Like Peer."""
        super().__init__(*args, **options)
        self.model.eval()
        self._state = None
        self._batches = self._ahead()

    def run(self, num_units: int) -> tuple[float, float]:
        """As `Workload.run`."""
        import torch

        with torch.inference_mode():
            return run_on(self._batches, num_units, self._evaluate)

    def _evaluate(self, batches):
        underway = collections.deque()  # as ours, two batches are on the device while an earlier one is fetched
        for inputs_BT, targets_BT, starts in batches:
            nll_N, self._state = self.score(inputs_BT, None if starts else self._state, targets_BT, reduction="none")
            underway.append(nll_N)
            if len(underway) > 2:
                underway.popleft().cpu().numpy()
        for nll_N in underway:
            nll_N.cpu().numpy()

    def close(self) -> None:
        """Stops the thread that makes batches."""
        self._batches.close()


class GeneratingPeer(Peer):
    """Samples a token a step, with the state or the keys and values of what stands before."""

    def __init__(self, *args, generation: Generation, **options):
        """Like Peer."""
        super().__init__(*args, length=generation.num_tokens, **options)
        self.model.eval()
        self._generation, self._eos = generation, self._source.eos

    def run(self, num_units: int) -> tuple[float, float]:
        """As `Workload.run`."""
        started = time.perf_counter()
        for _ in range(num_units):
            self.sample()
        return time.perf_counter() - started, 0.0

    def sample(self) -> np.ndarray:
        """Token ids [num_samples, num_tokens], drawn from the model."""
        import torch

        samples, num_tokens = self._generation.num_samples, self._generation.num_tokens
        token_B1 = torch.full((samples, 1), self._eos, dtype=torch.long, device=self._device)
        drawn, state = [], self.model.empty_state(samples)
        with torch.inference_mode(), self._half():  # once, since it keeps what it has cast until it ends
            for _ in range(num_tokens):
                logits_B1V, state = self.call(token_B1, state)
                token_B1 = torch.multinomial(logits_B1V[:, -1].float().softmax(-1), 1)
                drawn.append(token_B1)
            return torch.cat(drawn, dim=1).cpu().numpy()

    def close(self) -> None:
        """Nothing is open."""


def peer(
    mode: str,
    config: Config,
    vocab_size: int,
    params: Any,
    source: Any,
    learning_rates: np.ndarray,
    generation: Generation,
    device: str = "cpu",
) -> TrainingPeer | EvaluationPeer | GeneratingPeer:
    """The peer by the name of what is measured."""
    common = (config, vocab_size, params, source)
    if mode == "train":
        return TrainingPeer(*common, learning_rates=learning_rates, device=device)
    if mode == "generate":
        return GeneratingPeer(*common, generation=generation, device=device)
    return EvaluationPeer(*common, device=device)


def start(given: Start, platform: str, compiled: bool) -> TrainingPeer | EvaluationPeer | GeneratingPeer:
    """The peer that `PeerSide` asks for.

    Raises:
      UserError: an installed torch that does not load, or finds no GPU where JAX has one.
    """
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(f"the PyTorch that is installed does not load ({error}); install the extra peers anew") from None
    config, params, batches, learning_rates = given.read()
    device = {"cpu": "cpu", "gpu": "cuda"}[platform]
    found = peer(given.mode, config, given.vocab_size, params, batches, learning_rates, given.generation, device)
    found.compile(compiled)
    return found


def _detached(state):
    return [_detached(part) for part in state] if isinstance(state, (list, tuple)) else state.detach()


def _optimizer(config, model):
    """Decay is for matrices only; where it is decoupled from the gradient (sgd, adamw), torch's is the same as ours."""
    import torch

    settings = config.optimizer
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.startswith("stack.") and parameter.ndim == 2].append(parameter)
    decayed = [
        {"params": groups[True], "weight_decay": settings.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda or None  # None: as torch chooses
    if settings.name in ("adam", "adamw"):
        return torch.optim.AdamW(decayed, lr=settings.learning_rate, betas=(settings.b1, settings.b2), fused=fused)
    return torch.optim.SGD(decayed, lr=settings.learning_rate, momentum=settings.momentum or 0.0, fused=fused)
