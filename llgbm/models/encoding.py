"""Texts to padded token ids. The one place where prompts and answers become tensors.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llgbm.runtime import UserError
from llgbm.tasks.suite import Example

IGNORED = -100


@dataclass(frozen=True)
class EncodedPairs:
    """Right-padded prompt + answer texts.

    `targets_ST[s, t]` is the token that position t has to predict where that is an answer token (or the end token),
    and -100 elsewhere; so `targets_ST >= 0` marks the positions that predict the answer.
    """

    input_ids_ST: Tensor
    targets_ST: Tensor

    def to(self, device: str | torch.device) -> EncodedPairs:
        return EncodedPairs(self.input_ids_ST.to(device), self.targets_ST.to(device))

    @property
    def lengths_S(self) -> Tensor:
        """Tokens of each text that are read."""
        places_T = torch.arange(1, self.targets_ST.shape[1] + 1, device=self.targets_ST.device)
        return ((self.targets_ST >= 0) * places_T).amax(1)

    def select(self, rows: slice | Tensor) -> EncodedPairs:
        """Some of the texts, cut to the longest of them."""
        ids, targets = self.input_ids_ST[rows], self.targets_ST[rows]
        width = int(EncodedPairs(ids, targets).lengths_S.max())
        return EncodedPairs(ids[:, :width], targets[:, :width])

    def __len__(self) -> int:
        return self.input_ids_ST.shape[0]


def chat_prompt(
    tokenizer: Any, prompt: str, system: str | None = None, shots: Sequence[tuple[str, str]] = ()
) -> str:
    """Text that a model reads before it answers, in the chat template of its tokenizer.

    `system` None marks a bare text, which no template touches; an empty one leaves the choice to the template. `shots`
    are solved (prompt, answer) pairs that go before, as earlier turns. A tokenizer without a template gets lines.
    """
    turns = [turn for pair in shots for turn in zip(("user", "assistant"), pair, strict=True)] + [
        ("user", prompt)
    ]
    if system is None:
        return "".join(text for _, text in turns)
    if not tokenizer.chat_template:
        lines = [system, *(text for _, text in turns)] if system else [text for _, text in turns]
        return "".join(f"{text}\n" for text in lines)
    return _by_template(tokenizer, turns, system)


def example_prompt(tokenizer: Any, example: Example, shots: Sequence[tuple[str, str]] = ()) -> str:
    """Return the prompt of an example after its own earlier turns, as `chat_prompt`."""
    return chat_prompt(tokenizer, example.prompt, example.system, (*shots, *example.before))


def _by_template(tokenizer: Any, turns: Sequence[tuple[str, str]], system: str) -> str:
    """Put turns into the tokenizer's template; where that has no system turn, the system text goes before the first
    prompt. Raises UserError for a template that takes no such turns."""
    (role, first), *rest = turns
    ways = [[("system", system), *turns], [(role, f"{system}\n\n{first}"), *rest]]
    reason = ""
    for way in ways if system else [list(turns)]:
        messages = [{"role": role, "content": text} for role, text in way]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (
            Exception
        ) as error:  # a template raises what its author wrote, or any error of jinja2
            reason = str(error)
            continue
        if system.strip() in text:
            return text
        reason = "it leaves the system text out"
    raise UserError(
        f"the chat template of the tokenizer in {tokenizer.name_or_path} takes no such turns ({reason[:200]}): mend "
        "it, or leave the chat format out"
    )


def start_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text by itself; most put none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for place in range(len(full) - len(plain) + 1):
        if full[place : place + len(plain)] == plain:
            return list(full[:place])
    return []


def prompt_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of prompts, behind the tokenizer's start token unless a text begins with that already."""
    start = start_tokens(tokenizer)
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    return [row if row[: len(start)] == start else [*start, *row] for row in rows]


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> EncodedPairs:
    """Encode (prompt, answer) pairs; each answer is closed by the end token.

    Raises ValueError for no pair, and for a prompt without a token, after which nothing could be predicted.
    """
    if not pairs:
        raise ValueError("no text to encode: a batch needs at least one prompt with its answer")
    prompts = prompt_tokens(tokenizer, [p for p, _ in pairs])
    if not all(prompts):
        raise ValueError("a prompt is empty: an answer needs at least one token before it")
    answers = tokenizer([a for _, a in pairs], add_special_tokens=False)["input_ids"]
    closed = [[*ids, tokenizer.eos_token_id] for ids in answers]
    width = max(len(p) + len(a) for p, a in zip(prompts, closed, strict=True)) - 1
    whole = [[*p, *a[:-1]] for p, a in zip(prompts, closed, strict=True)]
    ids = place_tokens(whole, [0] * len(pairs), width, tokenizer.pad_token_id)
    targets = place_tokens(closed, [len(p) - 1 for p in prompts], width, IGNORED)
    return EncodedPairs(ids, targets)


def place_tokens(
    rows: Sequence[Sequence[int]], starts: Sequence[int], width: int, filler: int
) -> Tensor:
    """Return rows of tokens [S, T] in a table of a width, each from its start on, with a filler beside them."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    tokens = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    shift = np.asarray(starts) + lengths - lengths.cumsum()
    columns = np.arange(len(tokens)) + np.repeat(shift, lengths)
    table = np.full((len(rows), width), filler, np.int64)
    table[np.repeat(np.arange(len(rows)), lengths), columns] = tokens
    return torch.from_numpy(table)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], padding: str = "right"
) -> tuple[Tensor, Tensor]:
    """Return padded ids [S, T] and attention mask [S, T] of prompts. Raises ValueError for none or an empty one."""
    rows = prompt_tokens(tokenizer, prompts) if prompts else []
    if not rows or not all(prompts) or not all(rows):
        raise ValueError("no text to encode, or an empty one: each prompt needs at least one token")
    width = max(map(len, rows))
    starts = [0 if padding == "right" else width - len(row) for row in rows]
    ids = place_tokens(rows, starts, width, tokenizer.pad_token_id)
    mask = place_tokens([[1] * len(row) for row in rows], starts, width, 0)
    return ids, mask
