"""Request for one adapter: prompts of a task, or subsets of them, and a description of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from llgbm.generator.conditioning import Conditioning
from llgbm.generator.conditions import TextEncoder
from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.runtime import UserError, content_hash, stream_seed
from llgbm.system.lineage import prompts_facts
from llgbm.tasks.prompts import check_prompts

MOST_SUBSETS = 256


@dataclass(frozen=True)
class Asked:
    """Texts that a generator is asked with. With `subsets` the adapter is the mean over so many halves of the prompts.

    The weights' mean is taken, of A and of B. Texts are as `check_prompts` returns them.
    """

    prompts: tuple[str, ...]
    description: str = ""
    subsets: int = 0

    @classmethod
    def of(
        cls, how: Conditioning, prompts: Sequence[str], subsets: int = 0, description: str = ""
    ) -> Asked:
        """Check what is given for a generator of some conditioning.

        Raises UserError for a text that is missing, that is none or that the generator does not read, and for subsets
        that there are not.
        """
        if how.has_description and not description:
            raise UserError(
                "the generator reads a description of the task: give it with --description"
            )
        if description and not how.has_description:
            raise UserError("the generator was trained on prompts alone: leave the description out")
        if not how.has_prompts and (len(prompts) or subsets):
            raise UserError(
                "the generator reads a description alone: leave prompts and subsets out"
            )
        texts = tuple(check_prompts(prompts)) if how.has_prompts else ()
        if subsets:
            _check_subsets(len(texts), subsets)
        if description:
            (description,) = check_prompts([description], "the description")
        return cls(texts, description, subsets)

    @property
    def made_by(self) -> str:
        """Say in words what an adapter was generated from."""
        parts = [f"{len(self.prompts)} prompts"] if self.prompts else []
        parts += ["a description"] if self.description else []
        mean = f", the mean over {self.subsets} subsets" if self.subsets else ""
        return f"generated from {' and '.join(parts)}{mean}"

    @property
    def facts(self) -> dict[str, Any]:
        """Return number and hash of the texts, and what of them is no plain set of prompts."""
        found = prompts_facts(self.prompts)
        if self.description:
            found["description_sha256"] = content_hash([self.description], length=64)
        if self.subsets:
            found["subsets"] = self.subsets
        return found

    def condition(self, encoder: TextEncoder, how: Conditioning) -> Tensor:
        """Condition [1, N, ...], or [subsets, half of N, ...]."""
        whole = how.condition(encoder, self.prompts, self.description)
        if not self.subsets:
            return whole
        return whole[0][torch.tensor(draw_subsets(self.prompts, self.subsets))]


def draw_subsets(prompts: Sequence[str], count: int) -> list[list[int]]:
    """Draw different halves of the prompts, rounded up, by index; the same texts in any order have the same ones."""
    order = sorted(range(len(prompts)), key=lambda index: prompts[index])
    rng = random.Random(stream_seed("subsets", *(prompts[index] for index in order)))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple(sorted(rng.sample(range(len(order)), half(len(order)))))] = None
    return [[order[place] for place in places] for places in found]


def half(n_prompts: int) -> int:
    """Return the number of prompts of a subset."""
    return -(-n_prompts // 2)


def _check_subsets(n_prompts: int, count: int) -> None:
    known = min(MOST_SUBSETS, comb(n_prompts, half(n_prompts)))
    if count < 2:
        raise UserError(f"a mean over {count} subsets is none: give at least 2, or none")
    if count > known:
        raise UserError(
            f"{count} subsets asked for, of {n_prompts} prompts at most {known} are read ({half(n_prompts)} prompts "
            "each): ask for fewer, or give more prompts"
        )


def mean_adapter(batch: LoraBatch, spec: LoraSpec) -> LoraBatch:
    """Mean of adapters, of their A and of their B, as a batch of one."""
    return LoraBatch.unflatten(spec, batch.flatten(spec).mean(0, keepdim=True))
