"""Score by reading: a base answers questions greedily, with adapters or without, and the answers are read.

The one reader of `evaluate` and of held-out accuracy on datasets in files. Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.lora.apply import adapters_applied, chunks
from llgbm.models.encoding import EncodedPairs, example_prompt
from llgbm.models.load import Base
from llgbm.models.scoring import (
    base_right,
    continue_texts,
    encode_examples,
    right_per_adapter,
)
from llgbm.runtime import progress
from llgbm.tasks.extraction import Kind, extract, is_same
from llgbm.tasks.suite import Example, Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Longest answer by kind, in tokens.
ANSWER_TOKENS = {"choice": 16, "truth": 16, "number": 320, "text": 320}


class Writer(NamedTuple):
    """Model that writes texts, with its tokenizer; a `Base` is one too."""

    model: PreTrainedModel
    tokenizer: Any


@dataclass(frozen=True)
class Question:
    """Question as it is asked (in a chat template, maybe) and as it stands in the file, with its right answer."""

    kind: Kind
    asked: str
    prompt: str
    wanted: str

    def is_answered(self, response: str) -> bool:
        """Say if a response gives the right answer."""
        return is_same(self.kind, extract(self.kind, self.prompt, response), self.wanted)


@dataclass(frozen=True)
class Questions:
    """Evaluation questions of tasks, as many for each, task after task; None for one that counts by exact match."""

    tokenizer: Any
    items: tuple[Question | None, ...]

    @classmethod
    def of(
        cls, tokenizer: Any, suite: Suite, tasks: Sequence[str], examples: Sequence[Example]
    ) -> Questions:
        """Make questions of the examples of tasks, in the order of the tasks."""
        share = len(examples) // len(tasks)
        kinds = [suite.answer_kind(task) for task in tasks for _ in range(share)]
        pairs = zip(kinds, examples, strict=True)
        return cls(tokenizer, tuple(_question(tokenizer, kind, e) for kind, e in pairs))

    def select(self, rows: Sequence[int], share: int) -> Questions:
        """Return the questions of some tasks, of which each has `share`."""
        chosen: list[Question | None] = []
        for row in rows:
            chosen += self.items[row * share : (row + 1) * share]
        return Questions(self.tokenizer, tuple(chosen))


def _question(tokenizer: Any, kind: Kind, example: Example) -> Question | None:
    wanted = None if kind == "text" else extract(kind, example.prompt, example.answer)
    if wanted is None:
        return None
    return Question(kind, example_prompt(tokenizer, example), example.prompt, wanted)


def read_right(
    model: PreTrainedModel, questions: Questions, right_S: Tensor, known: Sequence[int]
) -> Tensor:
    """Return [S] with those of the texts at `known` set too whose written answer is read as the right one.

    A text that is right already is not asked: its greedy response is the reference itself. The adapters that are
    applied count.
    """
    writer, right_S = Writer(model, questions.tokenizer), right_S.clone()
    for kind in ANSWER_TOKENS:
        open_ones: list[tuple[int, Question]] = []
        for place in known:
            item = questions.items[place]
            if item is not None and item.kind == kind and not right_S[place]:
                open_ones.append((place, item))
        asked = [item.asked for _, item in open_ones]
        responses = respond(writer, asked, ANSWER_TOKENS[kind], "answers") if asked else []
        for (place, item), response in zip(open_ones, responses, strict=True):
            right_S[place] = item.is_answered(response)
    return right_S


def accuracy_by_reading(
    model: PreTrainedModel,
    spec: LoraSpec,
    batch: LoraBatch,
    texts: EncodedPairs,
    questions: Questions,
) -> Tensor:
    """Return the accuracy [A] of adapters on their own texts (adapter-major): exact match, or the answer as read."""
    right_AN = right_per_adapter(model, spec, batch, texts, at_most=24)
    share = right_AN.shape[1]
    flat = right_AN.flatten()
    if any(questions.items):
        for row in range(batch.n_adapters):
            with adapters_applied(model, batch.select([row]), spec.scaling):
                own = range(row * share, (row + 1) * share)
                flat = read_right(model, questions, flat, own)
    return flat.view(-1, share).float().mean(1)


def suite_accuracy(
    base: Base,
    suite: Suite,
    tasks: Sequence[str],
    examples: Sequence[Sequence[Example]],
    adapters: tuple[LoraSpec, LoraBatch] | None = None,
) -> Tensor:
    """Return the accuracy of adapters [A], each on the examples of its task, or of the base alone on each task's."""
    flat = [example for own in examples for example in own]
    texts = encode_examples(base, flat)
    questions = Questions.of(base.tokenizer, suite, tasks, flat)
    if adapters is not None:
        return accuracy_by_reading(base.model, *adapters, texts, questions)
    right_S = read_right(base.model, questions, base_right(base, texts), range(len(flat)))
    return right_S.view(len(tasks), -1).float().mean(1)


def respond(base: Base | Writer, prompts: Sequence[str], max_tokens: int, label: str) -> list[str]:
    """Greedy responses, generated in batches of prompts of about one length, in the order of the prompts."""
    lengths = [
        len(ids) for ids in base.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    ]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    responses = [""] * len(prompts)
    for rows in progress(chunks(len(order), max(lengths) + max_tokens), label):
        batch = order[rows]
        texts = continue_texts(base, [prompts[i] for i in batch], max_tokens)
        for index, text in zip(batch, texts, strict=True):
            responses[index] = text
    return responses
