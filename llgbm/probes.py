"""Probe texts with marked positions, at which the hidden state of a model is read. Loads no torch.

A probe without a continuation is read at its last token (Delta Activations, Xu et al. 2025). A probe with one is read
at every position that predicts a token of the continuation: in a causal model the state there *is* the last-token
state of the prefix that ends there, so one pass yields a delta for every prefix (a trajectory probe).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llgbm.runtime import UserError, content_hash


@dataclass(frozen=True)
class Probe:
    """Text with marked positions: the last token of `prompt`, or all that predict `continuation` and its end."""

    prompt: str
    continuation: str | None = None


@dataclass(frozen=True)
class ProbeSet:
    """Probes by owner: one entry called `shared` for all adapters, or one entry a task."""

    name: str
    scope: Literal["shared", "per_task"]
    probes: Mapping[str, tuple[Probe, ...]]

    def __post_init__(self) -> None:
        if not self.probes or not all(self.probes.values()):
            raise ValueError(
                f"probe set {self.name!r} is empty: a delta needs at least one probe for each owner"
            )
        if self.scope == "shared" and set(self.probes) != {"shared"}:
            raise ValueError(
                f"probe set {self.name!r} is shared and must hold the one entry 'shared'"
            )

    @classmethod
    def shared(cls, name: str, texts: Sequence[str]) -> ProbeSet:
        """Create probes that are read at their last token, the same for all adapters."""
        return cls(name, "shared", {"shared": tuple(Probe(text) for text in texts)})

    @classmethod
    def trajectories(cls, probes: Mapping[str, Sequence[Probe]]) -> ProbeSet:
        """Create probes of each task: its prompts continued by its teacher's answer."""
        return cls(
            "trajectory", "per_task", {task: tuple(of_task) for task, of_task in probes.items()}
        )

    def of(self, task: str) -> tuple[Probe, ...]:
        """Return the probes of a task's adapter. Raises KeyError for a task without any."""
        return self.probes["shared" if self.scope == "shared" else task]

    @property
    def hash(self) -> str:
        return content_hash(
            self.name,
            self.scope,
            [[k, [[p.prompt, p.continuation] for p in v]] for k, v in self.probes.items()],
        )


_GENERIC = (
    "You are given a job to do. Job : {}. Write your reply below .",
    "Here is what is asked of you : {}. Now give an answer that fits .",
    "Read the request and respond to it . Request : {}. Response :",
    "Somebody asks you the following . Question : {}. What do you say ?",
    "Input : {}. Output :",
)
_GENERIC_FILLER = "please help with the task that you know best"

_DOMAIN = {
    "math": (
        "A box holds seven red balls and five blue ones . How many balls are in it ?",
        "What is the sum of twelve and thirty , divided by two ?",
        "A train covers sixty miles in one hour . How far does it go in four hours ?",
    ),
    "code": (
        "Write a function that returns the largest number of a list .",
        "Which statement leaves a loop early in Python ?",
        "Fix the error : for i in range(3) print(i)",
    ),
    "commonsense": (
        "Where would you put milk so that it stays fresh ? A : oven B : fridge",
        "It rains and you must go out . What do you take along ?",
        "Is ice warmer than steam ? Answer True or False .",
    ),
}


def create_generic_probes() -> ProbeSet:
    """Create probes from five instruction templates that name no task."""
    return ProbeSet.shared("generic", [template.format(_GENERIC_FILLER) for template in _GENERIC])


def create_domain_probes(domain: str, prompts: Sequence[str] = ()) -> ProbeSet:
    """Create probes of a domain: `math`, `code`, `commonsense`, or any name with `prompts`.

    Raises UserError for an unknown domain without prompts.
    """
    texts = tuple(prompts) or _DOMAIN.get(domain, ())
    if not texts:
        raise UserError(f"unknown probe domain {domain!r}; there are: {', '.join(_DOMAIN)}")
    return ProbeSet.shared(f"domain:{domain}", texts)
