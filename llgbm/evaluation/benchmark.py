"""Accuracy of adapters on datasets in files: greedy answers are parsed, choices are scored by likelihood.

Each accuracy comes with two that need no model: the commonest training answer, and chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.lora.apply import adapters_applied, chunks
from llgbm.models.encoding import encode_pairs, example_prompt
from llgbm.models.load import Base
from llgbm.models.reading import ANSWER_TOKENS, respond
from llgbm.models.scoring import token_losses
from llgbm.runtime import UserError
from llgbm.tasks.extraction import Kind, extract, in_form, is_same, rivals
from llgbm.tasks.files import FileSuite
from llgbm.tasks.suite import Example


@dataclass(frozen=True)
class System:
    """System under test: the base, with an adapter or without, after `shots` solved examples."""

    name: str
    adapter: LoraBatch | None = None
    spec: LoraSpec | None = None
    shots: int = 0

    def applied(self, base: Base) -> Any:
        """Return a context in which the adapter is applied to the base."""
        if self.adapter is None or self.spec is None:
            return nullcontext()
        return adapters_applied(base.model, self.adapter, self.spec.scaling)


@dataclass(frozen=True)
class Questions:
    """Rows of one dataset that all systems answer, in at most `max_tokens` tokens (by kind where it is None)."""

    suite: FileSuite
    task: str
    examples: Sequence[Example]
    max_tokens: int | None = None

    @property
    def kind(self) -> Kind:
        """Kind of answer that the dataset asks for."""
        return self.suite.datasets[self.suite.task(self.task).name].kind


def measure(
    base: Base,
    suite: FileSuite,
    task: str,
    systems: Sequence[System],
    count: int,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Measure the accuracy of each system on the same `count` rows, with the trivial baselines of these rows.

    Raises UserError for an unknown dataset, or more rows than it has.
    """
    kind = suite.datasets[suite.task(task).name].kind
    examples = suite.examples(task, "evaluation", count, "benchmark")
    known = [row.example for row in suite.datasets[task].rows["train"]]
    questions = Questions(suite, task, examples, max_tokens)
    return {
        "task": task,
        "kind": kind,
        "examples": count,
        "majority": majority_accuracy(kind, known, examples),
        "chance": round(chance_accuracy(kind, examples), 4),
        "systems": {system.name: _measure_one(base, system, questions) for system in systems},
    }


def _measure_one(base: Base, system: System, asked: Questions) -> dict[str, Any]:
    kind, examples = asked.kind, asked.examples
    shots = solved_examples(asked.suite, asked.task, system.shots)
    prompts = [example_prompt(base.tokenizer, e, shots) for e in examples]
    with system.applied(base):
        responses = respond(base, prompts, asked.max_tokens or ANSWER_TOKENS[kind], system.name)
        likeliest = likeliest_rivals(base, kind, prompts, examples)
    return score_responses(kind, examples, responses, likeliest)


def solved_examples(suite: FileSuite, task: str, count: int) -> list[tuple[str, str]]:
    """Training rows of the dataset with their answers, the same for every question. Raises UserError for too many."""
    if count > len(suite.datasets[task].rows["train"]):
        raise UserError(
            f"{count} solved examples asked for; {task} has {len(suite.datasets[task].rows['train'])}"
        )
    return [(e.prompt, e.answer) for e in suite.examples(task, "train", count, "shots")]


def likeliest_rivals(
    base: Base, kind: Kind, prompts: Sequence[str], examples: Sequence[Example]
) -> list[str] | None:
    """Return the most likely of the answers that each question allows; None for open questions."""
    allowed = [rivals(kind, e.prompt) for e in examples]
    if not all(allowed):
        return None
    pairs = [(prompt, rival) for prompt, own in zip(prompts, allowed, strict=True) for rival in own]
    texts = encode_pairs(base.tokenizer, pairs).to(base.model.device)
    with torch.no_grad():
        pieces = [
            token_losses(base.model, texts.select(rows)).sum(1)
            for rows in chunks(len(pairs), texts.input_ids_ST.shape[1])
        ]
    losses = iter(torch.cat(pieces).tolist())
    return [
        min((next(losses), place, rival) for place, rival in enumerate(own))[2] for own in allowed
    ]


def score_responses(
    kind: Kind,
    examples: Sequence[Example],
    responses: Sequence[str],
    likeliest: Sequence[str] | None,
) -> dict[str, Any]:
    """Fractions of right answers (with a 95 % interval), of parsed responses, and of those in the form asked.

    A response without an answer, or with two, is wrong.
    """
    answers = [extract(kind, e.prompt, text) for e, text in zip(examples, responses, strict=True)]
    right = [is_same(kind, a, gold(kind, e)) for e, a in zip(examples, answers, strict=True)]
    picked = [
        extract(kind, e.prompt, text)
        for e, text in zip(examples, likeliest or responses, strict=True)
    ]
    best = [is_same(kind, a, gold(kind, e)) for e, a in zip(examples, picked, strict=True)]
    return {
        "accuracy": share(right),
        "interval": wilson(sum(right), len(right)),
        "answered": share([answer is not None for answer in answers]),
        "in_form": share([in_form(kind, text) for text in responses]),
        "likelihood_accuracy": None if likeliest is None else share(best),
    }


def share(truths: Sequence[bool]) -> float:
    """Fraction that is true, to four digits."""
    return round(sum(truths) / len(truths), 4)


def gold(kind: Kind, example: Example) -> str:
    """Parse the reference answer of a row. Raises UserError for a response without one, or with two."""
    answer = extract(kind, example.prompt, example.answer)
    if answer is None:
        raise UserError(
            f"no answer can be read from the response {example.answer[:60]!r}: mend this row"
        )
    return answer


def majority_accuracy(kind: Kind, known: Sequence[Example], examples: Sequence[Example]) -> float:
    """Accuracy of always giving the commonest answer of the rows `known`."""
    commonest = Counter(gold(kind, e) for e in known).most_common(1)[0][0]
    return share([gold(kind, e) == commonest for e in examples])


def chance_accuracy(kind: Kind, examples: Sequence[Example]) -> float:
    """Accuracy of a uniform guess over the allowed answers; 0 for open questions."""
    allowed = [len(rivals(kind, e.prompt)) for e in examples]
    return sum(1 / n for n in allowed if n) / len(examples)


def wilson(right: int, n: int) -> list[float]:
    """Return the 95 % interval of a fraction (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(method="wilson")
    return [round(float(interval.low), 4), round(float(interval.high), 4)]
