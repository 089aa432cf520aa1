"""Train teacher adapters, many at once through the batched primitive.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llgbm.lora.adapters import LoraBatch, LoraSpec, StateDict
from llgbm.lora.shapes import TARGET_MODULES
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import Base
from llgbm.models.scoring import adapter_losses, encode_examples
from llgbm.runtime import (
    UserError,
    keep_freed_memory,
    progress,
    release_device_memory,
    say,
    stream_seed,
)
from llgbm.tasks.suite import Example, Suite
from llgbm.teachers.writer import NewAdapter

TEACHERS_VERSION = 1
# Adapters are passed in up to so many parts of alike lengths, each of at least so many texts: less is padding.
PARTS, TEXTS_A_PART = 4, 64


@dataclass(frozen=True)
class TeacherConfig:
    """Settings for training a bank. `per_task` teachers of a task differ in their examples, not in their initial A.

    Teachers below the accuracy `target` go on for up to `rounds` rounds of `steps`, with `more_examples` times as many
    examples in a step; with a target of 0 there is one round.
    A trajectory is an answer of up to `max_tokens` tokens. `betas` are Adam's decay rates of its two means.
    """

    rank: int = 4
    alpha: float = 8.0
    per_task: int = 1
    steps: int = 150
    examples: int = 6
    learning_rate: float = 5e-3
    seed: int = 0
    condition_train: int = 32
    condition_evaluation: int = 16
    trajectories: int = 16
    target: float = 0.0
    rounds: int = 1
    max_tokens: int = 24
    target_modules: tuple[str, ...] = TARGET_MODULES
    more_examples: int = 1
    betas: tuple[float, float] = (0.9, 0.999)

    def spec_of(self, model: nn.Module) -> LoraSpec:
        """Return the shapes of adapters of a base. Raises UserError for a target module that it does not have."""
        return LoraSpec.from_model(model, self.rank, self.alpha, self.target_modules)

    def __post_init__(self) -> None:
        counts = (self.per_task, self.steps, self.examples, self.trajectories, self.max_tokens)
        if min(*counts, self.more_examples) < 1:
            raise UserError(
                "a bank needs at least one teacher a task, one step, one example and one trajectory of one token"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(
                f"the learning rate of teachers is {self.learning_rate}; it must be a number above 0"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"the betas of teachers are {self.betas}; they must be two numbers of at least 0 and below 1"
            )
        if self.rounds < 1 or not 0 <= self.target <= 1:
            raise UserError(
                f"teachers train for at least one round, until an accuracy of 0 to 1, not for {self.rounds} until "
                f"{self.target:g}"
            )

    def of_round(self, number: int) -> TeacherConfig:
        """Return the settings of a round, counted from 0."""
        if number == 0:
            return self
        return replace(self, examples=self.examples * self.more_examples, more_examples=1)


def named_targets(named: Sequence[str] | None) -> tuple[str, ...]:
    """Return target modules in an order that does not depend on how they were typed; the default for none."""
    if not named or set(named) == set(TARGET_MODULES):
        return TARGET_MODULES
    return tuple(sorted(set(named)))


@dataclass(frozen=True)
class Pupil:
    """Teacher to be: its task, and its number among the teachers of that task."""

    task: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.task}_{self.number}"

    def stream(self, seed: int, turn: int = 0) -> str:
        """Name of the examples that it trains on in a round."""
        return f"teacher {seed} {self.number}" + f" round {turn}" * bool(turn)


def example_source(
    suite: Suite, base: Base, pupils: Sequence[Pupil], config: TeacherConfig, turn: int = 0
) -> Callable[[int], EncodedPairs]:
    """Encoded training examples of every adapter at a step of a round, adapter-major: [A * B] texts."""
    count, n = config.steps * config.examples, config.per_task
    pools = []
    for pupil in pupils:
        stream = pupil.stream(config.seed, turn)
        pools.append(suite.examples(pupil.task, "train", count, stream, (pupil.number, n)))

    def at(step: int) -> EncodedPairs:
        rows = slice(step * config.examples, (step + 1) * config.examples)
        return encode_examples(base, list(chain.from_iterable(pool[rows] for pool in pools)))

    return at


def shared_initial_a(spec: LoraSpec, seed: int) -> dict[str, Tensor]:
    """One A [R, in] a module, drawn as PEFT draws it: Kaiming-uniform with a = sqrt(5)."""
    generator = torch.Generator().manual_seed(stream_seed("initial A", seed))
    drawn = {}
    for m in spec.modules:
        drawn[m.name] = torch.empty(spec.rank, m.n_in)
        nn.init.kaiming_uniform_(drawn[m.name], a=math.sqrt(5), generator=generator)
    return drawn


def new_adapters(base: Base, spec: LoraSpec, seed: int, count: int) -> LoraBatch:
    """Return adapters as training starts from them: the shared A, and a B of zeros."""
    device = base.model.device
    initial = shared_initial_a(spec, seed)
    zeros = {m.name: torch.zeros(count, m.n_out, spec.rank, device=device) for m in spec.modules}
    return LoraBatch({n: a.to(device).repeat(count, 1, 1) for n, a in initial.items()}, zeros)


def train_teachers(
    base: Base,
    spec: LoraSpec,
    config: TeacherConfig,
    examples_at: Callable[[int], EncodedPairs],
    start: LoraBatch | None = None,
) -> LoraBatch:
    """Train as many adapters as `examples_at` gives texts for (adapter-major), all at once. Adam, cosine decay.

    They start anew, or from the adapters `start`.
    """
    keep_freed_memory()
    n_adapters = len(examples_at(0)) // config.examples
    start = start or new_adapters(base, spec, config.seed, n_adapters)
    batch = LoraBatch(
        {n: a.clone().requires_grad_() for n, a in start.a.items()},
        {n: b.clone().requires_grad_() for n, b in start.b.items()},
    )
    optimizer, schedule = adam_with_decay([*batch.a.values(), *batch.b.values()], config)
    for step in progress(range(config.steps), f"{n_adapters} teachers"):
        optimizer.zero_grad(set_to_none=True)
        for rows, texts in _by_length(examples_at(step), n_adapters):
            adapter_losses(base.model, spec, batch.select(rows), texts).sum().backward()
        optimizer.step()
        schedule.step()
    release_device_memory()
    return LoraBatch(
        {n: t.detach() for n, t in batch.a.items()}, {n: t.detach() for n, t in batch.b.items()}
    )


def _by_length(texts: EncodedPairs, n_adapters: int) -> Iterator[tuple[list[int], EncodedPairs]]:
    """Yield parts of the adapters with their texts (adapter-major), those with the shortest texts first."""
    numbers_AB = torch.arange(len(texts)).view(n_adapters, -1)
    n_parts = max(1, min(PARTS, n_adapters, len(texts) // TEXTS_A_PART))
    for rows in texts.lengths_S.view(n_adapters, -1).amax(1).argsort(stable=True).chunk(n_parts):
        yield rows.tolist(), texts.select(numbers_AB[rows.cpu()].flatten())


def adam_with_decay(
    parameters: Iterable[Tensor], config: TeacherConfig
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.CosineAnnealingLR]:
    """Adam, its rate falling to a twentieth along a cosine: how every teacher is trained."""
    rate = config.learning_rate
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=config.betas)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, config.steps, eta_min=rate / 20
    )


def fitted(config: TeacherConfig, suite: Suite) -> TeacherConfig:
    """Return a configuration that conditions on no more prompts than every dataset has; say where that lowers it."""
    prompts = suite.available("prompts")
    if prompts >= config.condition_evaluation:
        return config
    say(
        f"the smallest dataset has {prompts} prompts to condition on, not {config.condition_evaluation}: all are used"
    )
    return replace(config, condition_evaluation=prompts)


def condition_prompts(
    suite: Suite, task: str, config: TeacherConfig, share: tuple[int, int]
) -> dict[str, list[str]]:
    """Prompts of what a teacher was trained on, its share of the examples, and others to condition on at evaluation."""
    known = suite.examples(task, "train", config.condition_train, "condition", share)
    others = suite.examples(task, "prompts", config.condition_evaluation, "condition")
    return {"train": [e.prompt for e in known], "evaluation": [e.prompt for e in others]}


METHODS = ("peft", "batched")
CHECKPOINTING = ("auto", "on", "off")


@dataclass(frozen=True)
class SFTConfig:
    """Settings for training teachers: `teachers.per_task` adapters a dataset, `checkpoints` of them from each run.

    A run saves its last checkpoints `every` steps apart. `teachers.examples` are read a step, in `accumulation` pieces.
    """

    teachers: TeacherConfig = TeacherConfig(
        rank=8, alpha=16.0, per_task=4, steps=100, examples=16, learning_rate=1e-4
    )
    method: str = "peft"
    checkpoints: int = 2
    every: int = 10
    accumulation: int = 1
    gradient_checkpointing: str = "auto"
    at_once: int = 0

    def __post_init__(self) -> None:
        known = (
            (self.method, "method", METHODS),
            (self.gradient_checkpointing, "checkpointing", CHECKPOINTING),
        )
        for value, what, allowed in known:
            if value not in allowed:
                raise UserError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")
        if min(self.checkpoints, self.every, self.accumulation) < 1 or self.at_once < 0:
            raise UserError(
                "checkpoints, every and accumulation must be at least 1, at_once at least 0"
            )
        if self.teachers.per_task % self.checkpoints or self.teachers.examples % self.accumulation:
            raise UserError(
                f"{self.teachers.per_task} adapters a task from runs of {self.checkpoints} checkpoints, and "
                f"{self.teachers.examples} examples a step in {self.accumulation} pieces: both must divide evenly"
            )
        if self.method == "batched" and (self.checkpoints > 1 or self.accumulation > 1):
            raise UserError(
                "the batched method saves one checkpoint a run and reads a step's examples in one piece"
            )
        if self.saved_at[0] < 1:
            raise UserError(
                f"{self.checkpoints} checkpoints {self.every} steps apart need more than {self.steps} steps"
            )

    @property
    def steps(self) -> int:
        return self.teachers.steps

    @property
    def subsets(self) -> int:
        """Runs a dataset."""
        return self.teachers.per_task // self.checkpoints

    @property
    def saved_at(self) -> list[int]:
        """Steps that a run leaves an adapter at."""
        return [self.steps - self.every * back for back in reversed(range(self.checkpoints))]

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that adapters depend on, without those that save memory."""
        savers = {"gradient_checkpointing", "at_once"}
        found = {name: value for name, value in asdict(self).items() if name not in savers}
        for name in ("target_modules", "betas"):
            found["teachers"][name] = list(getattr(self.teachers, name))
        # Banks that were made before there were these settings have their defaults.
        for name in ("max_tokens", "target_modules", "betas"):
            if getattr(self.teachers, name) == getattr(TeacherConfig, name):
                del found["teachers"][name]
        return found


@dataclass(frozen=True)
class Run:
    """One training: a dataset, one of its subsets, and the adapters that it leaves."""

    task: str
    subset: int
    config: SFTConfig
    suite: Suite
    base: Base

    @property
    def adapter_ids(self) -> list[str]:
        """In the order of `saved_at`. The last checkpoint has the lowest number, so that a task's first teacher, which
        stands for a held-out task and answers its prompts, is a fully trained one."""
        n = self.config.checkpoints
        return [f"{self.task}_{self.subset * n + i}" for i in reversed(range(n))]

    @property
    def share(self) -> tuple[int, int]:
        return self.subset, self.config.subsets

    def examples_at(self) -> Callable[[int], list[Example]]:
        """Examples of a step (counted from 0), in an order of the run's own."""
        per_step, seed = self.config.teachers.examples, self.config.teachers.seed
        stream = f"teacher {seed} {self.subset}"
        pool = self.suite.examples(
            self.task, "train", self.config.steps * per_step, stream, self.share
        )
        return lambda step: pool[step * per_step : (step + 1) * per_step]

    @property
    def prompts(self) -> dict[str, list[str]]:
        return condition_prompts(self.suite, self.task, self.config.teachers, self.share)

    def adapter(self, state: StateDict, step: int | None = None, **facts: Any) -> NewAdapter:
        """Return the adapter that the run leaves at a step (default: its last), for a bank."""
        step = step or self.config.steps
        adapter_id = self.adapter_ids[self.config.saved_at.index(step)]
        subset = f"{self.subset + 1} of {self.config.subsets}"
        told = {"subset": subset, "step": step, **facts}
        return NewAdapter(adapter_id, self.task, state, self.prompts, told)
