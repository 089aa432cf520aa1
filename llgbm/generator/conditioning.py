"""Reading of a task by a generator: its prompts, a description of it in words, or both. Axis letters: see `llgbm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llgbm.generator.conditions import (
    ConditionPools,
    TextEncoder,
    build_conditions,
    embed_texts,
    encode_texts,
)
from llgbm.generator.pooling import mean_of_rows, rows_of
from llgbm.runtime import UserError, content_hash
from llgbm.tasks.suite import Suite
from llgbm.teachers.bank import Bank

CONDITIONS = ("prompts", "description", "both")


@dataclass(frozen=True)
class Conditioning:
    """Kind of a condition, and how many token states of a text it holds (0: one vector a text)."""

    kind: str = CONDITIONS[0]
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CONDITIONS:
            raise UserError(f"unknown condition {self.kind!r}; there are: {', '.join(CONDITIONS)}")
        if not isinstance(self.tokens, int) or self.tokens < 0:
            raise UserError(
                f"{self.tokens!r} tokens of a prompt cannot be read: give a whole number"
            )

    @property
    def has_prompts(self) -> bool:
        return self.kind != "description"

    @property
    def has_description(self) -> bool:
        return self.kind != "prompts"

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a bundle has to say of it: nothing where it is a vector of each prompt."""
        return (
            {} if self == Conditioning() else {"condition": self.kind, "prompt_tokens": self.tokens}
        )

    def condition(self, encoder: TextEncoder, prompts: Sequence[str], description: str) -> Tensor:
        """Condition of one task, [1, N, C] or [1, N, L, C]; a text that the kind does not ask for is not read."""
        read = encode_texts(encoder, prompts, self.tokens)[None] if self.has_prompts else None
        told = encode_texts(encoder, [description], self.tokens) if self.has_description else None
        return joined(read, told)


def joined(prompts: Tensor | None, described: Tensor | None) -> Tensor:
    """Join prompts [A, N, C] or [A, N, L, C] and descriptions [A, C] or [A, L, C] to the condition of each task.

    A description alone stands where one prompt does. Beside prompts its vector, of tokens their mean, follows that of
    every row, so that C is twice the encoder's width: among many prompts a description would weigh as one more.
    """
    if described is None:
        assert prompts is not None
        return prompts
    alone = described[:, None]
    if prompts is None:
        return alone
    told_AC = mean_of_rows(*rows_of(alone))
    told = told_AC.reshape(len(told_AC), *[1] * (prompts.ndim - 2), -1)
    return torch.cat([prompts, torch.where(prompts.isnan(), torch.nan, told)], dim=-1)


def condition_pools(
    root: Path,
    encoder: TextEncoder,
    bank: Bank,
    suite: Suite,
    how: Conditioning,
    sentences: ConditionPools,
) -> ConditionPools:
    """Embed what conditions read of a bank's tasks, or find it in the cache; `sentences` has a vector of each prompt.

    A description is the same in training and evaluation; a nonsense prompt stands for a nonsense description.
    """
    nonsense = suite.nonsense_prompts
    pools = None
    if how.has_prompts:
        pools = sentences
    if how.has_prompts and how.tokens:
        pools = build_conditions(root, encoder, bank, nonsense, how.tokens)
    if not how.has_description:
        assert pools is not None
        return pools
    row = {task: index for index, task in enumerate(dict.fromkeys(bank.adapters.values()))}
    texts = [*(describe(suite, task) for task in row), nonsense[0]]
    embedded = embed_texts(root, encoder, texts, how.tokens)
    told, of_nonsense = embedded[[row[task] for task in bank.adapters.values()]], embedded[-1:]
    if pools is None:
        alone = joined(None, told)
        return ConditionPools(alone, alone, joined(None, of_nonsense)[0])
    return ConditionPools(
        joined(pools.train_ANC, told),
        joined(pools.evaluation_ANC, told),
        joined(pools.nonsense_NC[None], of_nonsense)[0],
    )


def level_conditions(
    root: Path, encoder: TextEncoder, suite: Suite, level: str, n_prompts: int, how: Conditioning
) -> Tensor:
    """Conditions of the tasks of a level of novelty, in their order."""
    tasks = next(own.tasks for own in suite.levels if own.name == level)
    read = told = None
    if how.has_prompts:
        prompts = []
        for task in tasks:
            asked = suite.level_examples(level, task, "prompts", n_prompts)
            prompts += [example.prompt for example in asked]
        read = embed_texts(root, encoder, prompts, how.tokens).unflatten(0, (len(tasks), -1))
    if how.has_description:
        texts = [describe(suite, task, level) for task in tasks]
        told = embed_texts(root, encoder, texts, how.tokens)
    return joined(read, told)


def describe(suite: Suite, task: str, level: str = "") -> str:
    """Return the description of a task. Raises UserError where the suite has none."""
    found = suite.description(task, level).strip()
    if not found:
        raise UserError(
            f"the suite {suite.name} has no description of the task {task}: give it one, or leave --condition out"
        )
    return found


def descriptions_hash(suite: Suite) -> str:
    """Hash the descriptions of all tasks of a suite. Raises UserError as `describe`."""
    texts = [describe(suite, task) for task in suite.split.tasks]
    for level in suite.levels:
        texts += [describe(suite, task, level.name) for task in level.tasks]
    return content_hash("descriptions", texts)
