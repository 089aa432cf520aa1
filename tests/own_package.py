"""Write a package of somebody else with a loss term, a generator and an encoder, offered by entry points."""

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
ENTRY_POINTS = """
[llgbm.terms]
small = own_terms:Small
[llgbm.generators]
straight = own_parts:Straight
[llgbm.encoders]
letters = own_parts:Letters
"""


def write_package(folder: Path) -> None:
    """Write its modules and the metadata of its distribution into a folder that is on the path."""
    folder.mkdir(exist_ok=True)
    (folder / "own_terms.py").write_text(OWN)
    (folder / "own_parts.py").write_text(PARTS)
    info = folder / "own_terms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own_terms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
