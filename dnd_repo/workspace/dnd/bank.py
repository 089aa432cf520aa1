"""A bank on disk: `TASK/*/adapter_model.safetensors` with prompts, drawn from in an order that the seed alone decides.

Letters: B adapters in a batch, N prompts, L tokens of a prompt, T tokens of an adapter, H and W their size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dnd.conditions import Part, condition_texts, encode_texts
from dnd.errors import DndError
from dnd.files import read_state
from dnd.tokenizer import LoraTokenizer2D

ADAPTER_WEIGHTS, ADAPTER_CONFIG, PROMPTS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "prompts.json",
)


@dataclass(frozen=True)
class AdapterBank:
    """Adapter files with the task of each, and the texts of every task that condition on it."""

    folder: Path
    adapters: tuple[tuple[Path, str], ...]
    texts: Mapping[str, tuple[str, ...]]

    @classmethod
    def open(
        cls,
        folder: Path,
        tasks: Sequence[str] = (),
        data: Path | None = None,
        part: Part = "prompts",
    ) -> AdapterBank:
        """Adapters of the tasks named, or of all. Texts come from `prompts.json` beside an adapter, or from
        `DATA/TASK_train.json` or `DATA/TASK.json`, in DnD's format.

        Raises DndError for a missing or empty bank, an unknown task and missing texts.
        """
        found = sorted(folder.glob("*/*/*.safetensors")) or sorted(folder.glob("*/*.safetensors"))
        by_task = {path.relative_to(folder).parts[0]: path for path in found}
        if not found:
            raise DndError(
                f"there is no bank at {folder}: train a LoRA a task with PEFT into {folder}/TASK/TASK_0/ "
                f"({ADAPTER_WEIGHTS}, {ADAPTER_CONFIG}, {PROMPTS}) or fetch a published one; name it with --bank, or "
                "take --smoke for the embedded one"
            )
        odd = sorted(set(tasks) - by_task.keys())
        if odd:
            raise DndError(f"{folder} has no task {odd[0]!r}; it has: {', '.join(by_task)}")
        chosen = tuple(
            (p, t)
            for p in found
            for t in [p.relative_to(folder).parts[0]]
            if not tasks or t in tasks
        )
        texts = {
            t: task_texts(by_task[t].parent, t, data, part)
            for t in dict.fromkeys(t for _, t in chosen)
        }
        return cls(folder, chosen, texts)

    def states(self) -> Iterator[dict[str, Tensor]]:
        """One adapter after the other."""
        return (self.read(index) for index in range(len(self.adapters)))

    def read(self, index: int) -> dict[str, Tensor]:
        """One adapter. Raises DndError where it is torn, or its keys or shapes are not those of the first."""
        path = self.adapters[index][0]
        state = read_adapter(path)
        odd = sorted(_shapes(state) ^ self._first_shapes)
        if odd:
            raise DndError(
                f"{path} and {self.adapters[0][0]} differ, such as in {odd[0][0]}: "
                "the adapters of a bank share one base and one rank"
            )
        return state

    @cached_property
    def _first_shapes(self) -> set[tuple[str, torch.Size]]:
        return _shapes(read_adapter(self.adapters[0][0]))

    @property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json` of the first adapter. Raises DndError where there is none."""
        return read_json(self.adapters[0][0].parent / ADAPTER_CONFIG)


def _shapes(state: Mapping[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(key, tensor.shape) for key, tensor in state.items()}


def read_adapter(path: Path) -> dict[str, Tensor]:
    """One adapter's matrices, float32, in the order of their names. Raises DndError for a torn or foreign file."""
    state = read_state(path)
    return {key: state[key].float() for key in sorted(state)}


def read_json(path: Path) -> Any:
    """Raises DndError for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DndError(f"{path} is missing or no JSON file: make or fetch it again") from error


def task_texts(
    folder: Path,
    task: str,
    data: Path | None = None,
    part: Part = "prompts",
    purpose: str = "train",
) -> tuple[str, ...]:
    """Texts that condition on a task: from a folder of DnD's files, else from `prompts.json` (a list, or a list for
    each purpose) in `folder`. Raises DndError for none."""
    if data is None:
        stored = read_json(folder / PROMPTS)
    else:
        files = [f for f in (data / f"{task}_{purpose}.json", data / f"{task}.json") if f.is_file()]
        if not files:
            raise DndError(
                f"{data} has neither {task}_{purpose}.json nor {task}.json: conditions need the task's texts"
            )
        stored = read_json(files[0])
    rows = stored.get(purpose, ()) if isinstance(stored, Mapping) else stored
    return tuple(condition_texts([{"prompt": r} if isinstance(r, str) else r for r in rows], part))


@dataclass(frozen=True)
class Samples(Dataset[dict[str, Tensor]]):
    """Item p of an endless stream: prompts [N, L] and tokens [T, H, W] of one adapter.

    Each epoch is an order of its own, and what stands at p depends on seed and p alone: so any number of processes,
    from any step on, share out the same stream.
    """

    bank: AdapterBank
    tokenizer: LoraTokenizer2D
    text_tokenizer: Any
    n_prompts: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        short = [task for task, texts in self.bank.texts.items() if len(texts) < self.n_prompts]
        if short:
            raise DndError(
                f"{short[0]} has {len(self.bank.texts[short[0]])} prompts, {self.n_prompts} are needed"
            )

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        epoch, place = divmod(position, len(self.bank.adapters))
        index = _order(len(self.bank.adapters), self.seed, epoch)[place]
        texts = self.bank.texts[self.bank.adapters[index][1]]
        drawn = torch.randperm(len(texts), generator=_stream(self.seed, 1, position))[
            : self.n_prompts
        ]
        encoded = encode_texts(self.text_tokenizer, [texts[i] for i in drawn], self.length)
        return {**encoded, "tokens": self.tokenizer.tokenize(self.bank.read(index))}


def positions(step: int, batch_size: int, rank: int, n_ranks: int) -> list[int]:
    """Places in the stream that one of `n_ranks` processes reads at a step."""
    first = (step * n_ranks + rank) * batch_size
    return list(range(first, first + batch_size))


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=_stream(seed, 0, epoch)).tolist()


def _stream(seed: int, kind: int, index: int) -> torch.Generator:
    """Random stream of its own for each seed, kind and index."""
    return torch.Generator().manual_seed((seed * 2 + kind) * 1_000_003 + index)
