"""Measures a config: ours and, if asked, a peer, in processes of their own, in rounds that take turns."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lm.backend import start
from lm.benchmark import scan_peer, torch_peer
from lm.benchmark.flops import TRAINING, forward_flops_per_token
from lm.benchmark.machine import Matmul, busy_cores, spread
from lm.benchmark.peer_side import Batches, PeerSide, Start
from lm.benchmark.units import host_peak_bytes
from lm.benchmark.workers import Worker
from lm.benchmark.workloads import Task, workload
from lm.config import resolve, to_json
from lm.data.batches import batches
from lm.errors import UserError
from lm.files import check_writable
from lm.models.build import initialise
from lm.parallel import Placement, device_summary, peak_bytes, place
from lm.runs.folder import environment
from lm.training import optimizer as optimizers

_PEERS = {"torch": torch_peer, "scan": scan_peer}
ALLOCATORS = ("tuned", "system")
_WARM_UP = 5  # units after the first that are done before anything is measured
_ROUND_SECONDS = 2.0
_LOSS_TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}  # two libraries round to bfloat16 at different places
_LEARNING_RATES = 10_000  # of the first steps, for a peer


def benchmark(
    task: Task,
    against: str | None = None,
    steps: int | None = None,
    rounds: int = 5,
    allocator: str = "tuned",
    compile_peer: bool = True,
    profile: pathlib.Path | None = None,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures for some rounds.

    Args:
      task: what is measured.
      against: "torch", "scan" (a plain lax.scan) or None. Its rounds and ours take turns, and which goes first changes. On a
        CPU where our allocator is tuned it runs twice: as its users start it, and with the same allocator.
      steps: units of a round (training steps, scored batches, generated texts); None: as many of ours as fill two seconds.
      allocator: one of ALLOCATORS; see `lm.backend.start`.
      compile_peer: let the peer try torch.compile, and keep what is faster.
      profile: folder for a trace of a few units, which TensorBoard and Perfetto open.
      on_round: called after each.

    Returns:
      All that was measured, in plain types.

    Raises:
      UserError: a bad config or text; an n-gram; a peer that is missing, that cannot do what the config asks for, or whose
        first loss is another one; a loss that is not finite.
    """
    if profile is not None:
        check_writable(profile / "trace")
    busy = busy_cores()
    config = resolve(task.draft)
    if config.model.architecture == "ngram":
        raise UserError("config.model.architecture is 'ngram', which is counted in one pass and has nothing to measure here")
    if config.data.seq_len_std is not None:
        raise UserError("config.data.seq_len_std is set, but steps of one length are measured here; leave it open")
    if against is not None:
        _PEERS[against].check(task.draft, config, task.mode)
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        ours = functools.partial(Worker, OurSide, task, allocator, scratch)
        with contextlib.ExitStack() as stack:
            measured = _measure(stack, ours, against, steps, rounds, compile_peer, profile, scratch, on_round)
        with ours() as again:
            measured["warm_first_step_seconds"] = again.call("run", 1)[0]
    generated = {"generation": dataclasses.asdict(task.generation)} if task.mode == "generate" else {}
    measured["environment"] = {**environment(), **measured["environment"]}
    return {"mode": task.mode, **generated, **measured, "busy_cores": busy}


def _measure(stack, start_ours, against, steps, rounds, compile_peer, profile, scratch, on_round):
    ours = stack.enter_context(start_ours(environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if against else {}))
    first_step_seconds = ours.call("run", 1)[0]
    ours.call("run", _WARM_UP)
    steps = steps or max(1, round(_ROUND_SECONDS * 3 / ours.call("run", 3)[0]))
    memory, first_loss, facts = ours.call("memory"), ours.call("first_loss"), ours.call("facts")
    workers, peers = {}, {}
    if against:
        workers, peers = _start_peers(stack, ours, facts, first_loss, against, compile_peer, scratch)

    def between():
        on_round()
        return ours.call("matmul_rates")

    rates, waits, matmul_rates = _take_turns({"ours": ours, **workers}, steps, rounds, facts["tokens_per_step"], between)
    ours.call("first_loss")  # raises where a loss on the way was not finite
    if profile is not None:
        ours.call("profile", profile)
    speed = spread(rates["ours"], 1)
    for name, peer in peers.items():
        ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates[name], strict=True)]
        peer |= {"tokens_per_second": spread(rates[name], 1), "ratio": spread(ratios, 4)}
    flops_per_second = facts["flops_per_token"] * speed["median"]
    matmuls = {name: {**facts[name], "flops_per_second": max(rate[name] for rate in matmul_rates)} for name in matmul_rates[0]}
    return {
        **facts,
        "steps": steps,
        "rounds": rounds,
        "first_step_seconds": first_step_seconds,
        "first_loss": first_loss,
        "tokens_per_second": speed,
        "step_seconds": facts["tokens_per_step"] / speed["median"],
        "waiting_share": spread(waits["ours"], 4),
        "memory": memory,
        "flops_per_second": flops_per_second,
        **matmuls,
        **{f"share_of_{name}_peak": flops_per_second / found["flops_per_second"] for name, found in matmuls.items()},
        "against": {"name": against, "allocators": peers} if against else None,
    }


def _start_peers(stack, ours, facts, first_loss, against, compile_peer, scratch):
    """Workers and what is known of them by the name of their allocator."""
    platform, workers, peers = facts["environment"]["platform"], {}, {}
    if facts["environment"]["num_devices"] > 1:
        raise UserError(f"--against={against} compares on one device, but JAX uses several; set --config.num_devices=1")
    if against == "torch" and platform not in ("cpu", "gpu"):
        raise UserError(f"--against=torch compares on a CPU or a GPU, but JAX uses {platform}; set JAX_PLATFORMS=cpu")
    start = ours.call("export", scratch)
    # torch has the accelerator to itself; the other peer is JAX's
    environment = {"JAX_PLATFORMS": "cpu"} if against == "torch" else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for allocator in ALLOCATORS[::-1] if platform == "cpu" and facts["allocator"] == "tuned" else ("system",):
        make = functools.partial(Worker, PeerSide, against, start, allocator, platform, environment=environment)
        compiled = against != "torch"  # which alone has the choice
        if compile_peer and not compiled:  # tried in a process of its own: what loses would count in the other's memory
            with make(compiled=False) as trial:
                compiled = trial.call("compiled_is_faster")
        worker = stack.enter_context(make(compiled=compiled))
        found = worker.call("first_unit")
        _check_same(first_loss, found["first_loss"], against, facts["matmul"]["dtype"])
        worker.call("run", _WARM_UP)
        workers[allocator], peers[allocator] = worker, {**found, "compiled": compiled, "memory": worker.call("memory")}
    return workers, peers


def _take_turns(workers, steps, rounds, tokens_per_step, between):
    """Tokens per second and share of waiting, of each worker in each round; and what `between` gave after each."""
    rates, waits, others = {name: [] for name in workers}, {name: [] for name in workers}, []
    names = list(workers)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds, waited = workers[name].call("run", steps)
            rates[name].append(steps * tokens_per_step / seconds)
            waits[name].append(waited / seconds)
        others.append(between())  # each round, so that a moment of other work does not set it
    return rates, waits, others


def _check_same(ours: float, theirs: float, name: str, dtype: str) -> None:
    if not abs(ours - theirs) <= _LOSS_TOLERANCES[dtype]:
        raise UserError(
            f"the first loss is {ours:.6f} here and {theirs:.6f} in {name}, more than {_LOSS_TOLERANCES[dtype]:g} apart: the two "
            "models are not the same, so their speeds cannot be compared"
        )


class OurSide:
    """Ours, in its process."""

    def __init__(self, task: Task, allocator: str, scratch: pathlib.Path):
        """Prepares the experiment; nothing is compiled yet. What is compiled later is kept in `scratch` for a second start."""
        start(allocator, compile_cache=scratch / "compiled")
        self._task, self._allocator = task, allocator
        config = resolve(task.draft)
        if task.mode == "generate":
            self._placement = Placement(1)  # where launch.generate works
        else:
            self._placement = place(config)
            self._placement.check_rows(config.data.batch_size, config.training.num_micro_batches)
        self._experiment = task.prepare()
        self._before = host_peak_bytes()
        self._workload = workload(task.mode, self._experiment, self._placement, task.generation)
        self._made: dict[str, Matmul] = {}

    def run(self, num_units: int) -> tuple[float, float]:
        """As `Workload.run`."""
        return self._workload.run(num_units)

    def first_loss(self) -> float:
        """As `Workload.first_loss`."""
        return self._workload.first_loss()

    def memory(self) -> dict[str, int | None]:
        """Peaks so far, in bytes: of the process, of it before the model was made, and of the device."""
        return {
            "host_peak_bytes": host_peak_bytes(),
            "host_peak_bytes_before": self._before,
            "device_peak_bytes": peak_bytes(self._placement),
        }

    def facts(self) -> dict[str, Any]:
        """What was measured on what."""
        config, vocab_size = self._experiment.config, self._experiment.facts["vocab_size"]
        forward = self._forward_flops_per_token()
        return {
            "model": config.model.architecture,
            "num_params": self._experiment.facts["num_params"],
            "vocab_size": vocab_size,
            "text": self._experiment.train.name,
            "batch_size": config.data.batch_size,
            "seq_len": config.data.seq_len,
            "tokens_per_step": self._workload.tokens_per_unit,
            "flops_per_token": forward * TRAINING if self._task.mode == "train" else forward,
            **{
                name: {"rows": one.rows, "size": one.size, "width": one.width, "dtype": config.compute_dtype}
                for name, one in self._matmuls().items()
            },
            "allocator": self._allocator,
            "resolved": to_json(config),
            "environment": device_summary(self._placement),
        }

    def _forward_flops_per_token(self):
        length = self._task.generation.num_tokens if self._task.mode == "generate" else None
        return forward_flops_per_token(self._experiment.config, self._experiment.facts["vocab_size"], length)

    def _matmuls(self):
        """A square one, and where texts are generated one of as many rows, by as many numbers as a token is multiplied by."""
        if not self._made:
            dtype = self._experiment.config.compute_dtype
            exact = self._task.mode == "evaluate" and dtype == "float32"  # as lm.evaluation.scorers has it
            kind = self._placement, dtype, "highest" if exact else "default"
            self._made["matmul"] = Matmul(*kind)
            if self._task.mode == "generate":
                numbers = round(self._forward_flops_per_token() / 2)
                self._made["few_row_matmul"] = Matmul(*kind, rows=self._task.generation.num_samples, numbers=numbers)
        return self._made

    def matmul_rates(self) -> dict[str, float]:
        """As `Matmul.rate`, of each."""
        return {name: one.rate() for name, one in self._matmuls().items()}

    def export(self, scratch: pathlib.Path) -> Start:
        """Writes fresh parameters, batches and learning rates; returns what a peer needs to start from the same point."""
        experiment, task = self._experiment, self._task
        config, source = experiment.config, batches(experiment.config, experiment.train, experiment.mixture)
        params = self._placement.get_state(initialise(experiment.model, config.seed))
        schedule = optimizers.build(config, source.steps_per_epoch)[1]
        np.savez(
            scratch / "start.npz",
            learning_rates=np.asarray(schedule(np.arange(_LEARNING_RATES))),
            **Batches.take(source),
            **traverse_util.flatten_dict(params, sep="/"),
        )
        facts = experiment.facts["vocab_size"], experiment.tokenizer.eos, source.steps_per_epoch
        return Start(task.mode, to_json(config), *facts, task.generation, scratch / "start.npz")

    def profile(self, folder: pathlib.Path) -> None:
        """Writes a trace of three units."""
        with jax.profiler.trace(folder):
            self._workload.run(3)

    def close(self) -> None:
        """Ends the workload's threads."""
        self._workload.close()
