"""Train teachers until each is good: in rounds, of which only the laggards take another.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.models.load import Base
from llgbm.models.scoring import exact_match
from llgbm.runtime import say
from llgbm.tasks.suite import Example, Suite
from llgbm.teachers.train import Pupil, TeacherConfig, example_source, new_adapters, train_teachers

GATE_EXAMPLES = 128
# Every so many rounds, those far from the target start again: more steps seldom free a teacher that is stuck.
RESTART_EVERY, STUCK_BELOW = 3, 0.8


@dataclass(frozen=True)
class Trained:
    """Adapters, the rounds that each took, and its accuracy [A] on examples of a stream of its own."""

    adapters: LoraBatch
    rounds: tuple[int, ...]
    accuracy_A: Tensor

    def joined(self, places: Sequence[int], later: Trained) -> Trained:
        """Return these with the adapters at `places` replaced by later ones."""
        rounds = list(self.rounds)
        accuracy_A = self.accuracy_A.clone()
        accuracy_A[list(places)] = later.accuracy_A
        for place, more in zip(places, later.rounds, strict=True):
            rounds[place] += more
        sides = (
            {n: t.clone() for n, t in side.items()} for side in (self.adapters.a, self.adapters.b)
        )
        joined = LoraBatch(*sides)
        for own, new in ((joined.a, later.adapters.a), (joined.b, later.adapters.b)):
            for name, tensor in new.items():
                own[name][list(places)] = tensor
        return Trained(joined, tuple(rounds), accuracy_A)


class Classroom:
    """Train the teachers of a suite on a base, with one configuration."""

    def __init__(self, base: Base, spec: LoraSpec, config: TeacherConfig, suite: Suite) -> None:
        self.base, self.spec, self.config, self.suite = base, spec, config, suite

    def train(self, pupils: Sequence[Pupil]) -> Trained:
        """Train a teacher for each pupil, those below `config.target` for up to `config.rounds` rounds.

        What decides is read neither by training nor by evaluation: lists for training, under a stream of their own.
        """
        new = new_adapters(self.base, self.spec, self.config.seed, len(pupils))
        found = Trained(new, (0,) * len(pupils), torch.zeros(len(pupils)))
        for number in range(self.config.rounds):
            left = self.laggards(found)
            if left:
                own = [pupils[place] for place in left]
                found = found.joined(
                    left, self._round(own, self._start(found, left, number), number)
                )
        return found

    def laggards(self, trained: Trained) -> list[int]:
        """Return the places of the adapters that are untrained or below the target."""
        return [
            place
            for place, rounds in enumerate(trained.rounds)
            if not rounds or trained.accuracy_A[place] < self.config.target
        ]

    def _start(self, found: Trained, left: Sequence[int], number: int) -> LoraBatch:
        """Return what the laggards go on from: their last adapters, or the beginning for those that are stuck."""
        if not number or number % RESTART_EVERY:
            return found.adapters.select(list(left))
        new = new_adapters(self.base, self.spec, self.config.seed, len(left))
        stuck = [i for i, place in enumerate(left) if found.accuracy_A[place] < STUCK_BELOW]
        begun = Trained(new, (0,) * len(left), torch.zeros(len(left)))
        free = [i for i in range(len(left)) if i not in stuck]
        places = [left[i] for i in free]
        kept = Trained(found.adapters.select(places), (0,) * len(free), torch.zeros(len(free)))
        return begun.joined(free, kept).adapters

    def _round(self, pupils: Sequence[Pupil], start: LoraBatch, number: int) -> Trained:
        config = self.config.of_round(number)
        source = example_source(self.suite, self.base, pupils, config, number)
        adapters = train_teachers(self.base, self.spec, config, source, start)
        accuracy_A = torch.ones(len(pupils))
        if self.config.target:
            examples = list(map(self._examples, pupils))
            accuracy_A = exact_match(self.base, self.spec, adapters, examples).cpu()
            below = int((accuracy_A < self.config.target).sum())
            say(
                f"teachers, round {number + 1}: {below} of {len(pupils)} below {self.config.target:g}"
            )
        return Trained(adapters, (1,) * len(pupils), accuracy_A)

    def _examples(self, pupil: Pupil) -> list[Example]:
        share = (pupil.number, self.config.per_task)
        return self.suite.examples(pupil.task, "train", GATE_EXAMPLES, "teacher gate", share)
