"""Write a package of somebody else with a loss term, a generator, an encoder and a suite, offered by entry points."""

from __future__ import annotations

from pathlib import Path

OWN = """
from dataclasses import dataclass
from typing import ClassVar
from llgbm.terms.term import Term

@dataclass(frozen=True)
class Small(Term):
    power: float = 2.0
    name: ClassVar = "small"
    title: ClassVar = "size of the predicted tokens"
    reads: ClassVar = frozenset({"tokens"})
    matches: ClassVar = "size"

    def value(self, step):
        return step.tokens.abs().pow(self.power).mean()
"""
PARTS = """
import torch
from torch import nn
from llgbm.generator.conditions import TextEncoder
from llgbm.generator.networks import LoraGenerator

class Straight(LoraGenerator):
    def __init__(self, spec, condition_width, standardiser, config):
        super().__init__(spec, condition_width, standardiser)
        self.map = nn.Linear(condition_width, spec.n_values)

    @property
    def standardiser(self):
        return self.statistics

    def forward(self, condition_ANC):
        return self.map(condition_ANC.mean(1))

class Letters(TextEncoder):
    name, hash, width = "letters", "letters-1", 26

    def __init__(self, base):
        pass

    def encode(self, prompts):
        counts = [[text.count(chr(97 + i)) for i in range(26)] for text in prompts]
        return torch.tensor(counts, dtype=torch.float32)
"""
SUITE = """
import random
import zlib
from dataclasses import dataclass
from llgbm.runtime import UserError
from llgbm.tasks.suite import WHOLE, Example, Split, Suite, Task

SIGNS = tuple("abcdefghijkl")
TIMES = {"once": 1, "twice": 2, "thrice": 3, "fourfold": 4, "fivefold": 5, "sixfold": 6}

@dataclass(frozen=True)
class Repeats(Suite):
    name: str = "repeats"

    @property
    def tasks(self):
        return tuple(Task(name, "repeats") for name in TIMES)

    @property
    def split(self):
        return Split(("once", "thrice", "fivefold", "sixfold"), ("twice",), ("fourfold",))

    def examples(self, task, purpose, count, stream, share=WHOLE):
        self.task(task)
        rng = random.Random(f"{task} {purpose} {stream} {share}")
        return [self._example(rng, task, purpose == "train") for _ in range(count)]

    def _example(self, rng, task, taught):
        while True:
            sign = " ".join(rng.sample(SIGNS, 2))
            if (zlib.crc32(sign.encode()) % 3 > 0) == taught:
                return Example(f"say {task} : {sign}", f" {sign}" * TIMES[task])

    def available(self, purpose):
        return 10**6

    @property
    def fingerprint(self):
        return "repeats-1"

    @property
    def probe_prompts(self):
        return tuple(e.prompt for e in self.examples("thrice", "evaluation", 4, "probes"))

    @property
    def nonsense_prompts(self):
        return tuple(f"say {sign} : {sign} {sign}" for sign in SIGNS + SIGNS)

    @property
    def vocabulary(self):
        return ("say", " :", *(f" {word}" for word in (*SIGNS, *TIMES)))

    def pretraining_example(self, rng, bare, needs=None):
        example = self._example(rng, rng.choice(list(TIMES)), True)
        prompt = example.prompt[example.prompt.index(":") :] if bare else example.prompt
        return Example(prompt, example.answer)
"""
ENTRY_POINTS = """
[llgbm.terms]
small = own_terms:Small
[llgbm.generators]
straight = own_parts:Straight
[llgbm.encoders]
letters = own_parts:Letters
[llgbm.suites]
repeats = own_suite:Repeats
plain = own_suite:random.Random
absent = own_suite:Nothing
"""


def write_package(folder: Path) -> None:
    """Write its modules and the metadata of its distribution into a folder that is on the path."""
    folder.mkdir(exist_ok=True)
    (folder / "own_terms.py").write_text(OWN)
    (folder / "own_parts.py").write_text(PARTS)
    (folder / "own_suite.py").write_text(SUITE)
    info = folder / "own_terms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own_terms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
