"""A bank on disk: `TASK/*/adapter_model.safetensors` with prompts, drawn from in an order that the seed alone decides.

Letters: B adapters in a batch, N prompts, L tokens of a prompt, T tokens of an adapter, H and W their size.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from dnd.names import data_file, is_of_task
from dnd.tokenizer import LoraTokenizer2D

ADAPTER_WEIGHTS, ADAPTER_CONFIG, PROMPTS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "prompts.json",
)
# Fields of an adapter's config, beside rank and alpha, that decide how its weights are read.
DECIDING = ("peft_type", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")


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
        held_out: Sequence[str] = (),
    ) -> AdapterBank:
        """Adapters of the tasks named, or of all but those held out. Texts come from `prompts.json` beside an adapter,
        or from a folder of DnD's files.

        Raises DndError for a missing or empty bank, a task that is unknown or held out, and missing texts.
        """
        if odd := [task for task in tasks if is_of_task(task, held_out)]:
            raise DndError(
                f"{odd[0]} is held out by this script: leave it out of the tasks, or train with a script of another"
            )
        found = sorted(folder.glob("*/*/*.safetensors")) or sorted(folder.glob("*/*.safetensors"))
        if not found:
            raise DndError(
                f"there is no bank at {folder}: train a LoRA a task with PEFT into {folder}/TASK/TASK_0/ "
                f"({ADAPTER_WEIGHTS}, {ADAPTER_CONFIG}, {PROMPTS}) or fetch a published one; name it with --bank, or "
                "take --smoke for the embedded one"
            )
        free = [path for path in found if not _is_held_out(path, folder, held_out)]
        by_task = {path.relative_to(folder).parts[0]: path for path in free}
        if odd := sorted(set(tasks) - by_task.keys()):
            raise DndError(f"{folder} has no task {odd[0]!r}; it has: {', '.join(by_task)}")
        named = [(path, path.relative_to(folder).parts[0]) for path in free]
        chosen = tuple((path, task) for path, task in named if not tasks or task in tasks)
        if not chosen:
            raise DndError(f"{folder} holds {', '.join(held_out)} alone: that is held out here")
        texts = {}
        for task in dict.fromkeys(task for _, task in chosen):
            texts[task] = task_texts(by_task[task].parent, task, data, part)
        return cls(folder, chosen, texts)

    def states(self) -> Iterator[dict[str, Tensor]]:
        """One adapter after the other."""
        return (self.read(index) for index in range(len(self.adapters)))

    def read(self, index: int) -> dict[str, Tensor]:
        """One adapter, its B scaled so that the first one's alpha holds for it.

        Raises DndError where it is torn, or its keys or shapes are not those of the first.
        """
        path = self.adapters[index][0]
        state = read_adapter(path)
        odd = sorted(_shapes(state) ^ self._first_shapes)
        if odd:
            raise DndError(
                f"{path} and {self.adapters[0][0]} differ, such as in {odd[0][0]}: "
                "the adapters of a bank share one base and one rank"
            )
        factor = self.factors[index]
        return state if factor == 1 else _scaled(state, factor)

    @cached_property
    def _first_shapes(self) -> set[tuple[str, torch.Size]]:
        return _shapes(read_adapter(self.adapters[0][0]))

    @property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json` of the first adapter: beside it, or above it in the bank.

        Raises DndError where there is none.
        """
        found = self._config(self.adapters[0][0])
        if found is None:
            raise DndError(
                f"no {ADAPTER_CONFIG} beside {self.adapters[0][0]}: put that of its adapters into {self.folder}"
            )
        return found

    def _config(self, path: Path) -> dict[str, Any] | None:
        above = [place for place in path.parents if place.is_relative_to(self.folder)]
        files = [place / ADAPTER_CONFIG for place in above]
        beside = next((file for file in files if file.is_file()), None)
        if beside is None:
            return None
        found = read_json(beside)
        if not isinstance(found, dict):
            raise DndError(f"{beside} is no config of an adapter: make or fetch it again")
        return found

    @cached_property
    def factors(self) -> tuple[float, ...]:
        """Factor of every adapter's B that makes its scaling the first one's.

        Raises DndError for an adapter whose config says that its weights are read otherwise.
        """
        first = self._config(self.adapters[0][0])
        factors = []
        for path, _ in self.adapters:
            own = self._config(path)
            for name in DECIDING:
                if own and first and (own.get(name) or None) != (first.get(name) or None):
                    raise DndError(
                        f"{path.parent} and {self.adapters[0][0].parent} differ in {name}: the adapters of a bank are "
                        "read in one way; leave one out"
                    )
            factors.append(_scaling(own, path) / _scaling(first, path) if own and first else 1.0)
        return tuple(factors)

    @cached_property
    def digest(self) -> str:
        """Hash of what a training reads of the bank: the adapters in their order, their scaling and their texts."""
        contents = []
        for (path, task), factor in zip(self.adapters, self.factors, strict=True):
            with path.open("rb") as stream:
                weights = hashlib.file_digest(stream, "sha256").hexdigest()
            contents.append([task, weights, factor])
        return hashlib.sha256(json.dumps([contents, self.texts]).encode()).hexdigest()


def _is_held_out(path: Path, folder: Path, held_out: Sequence[str]) -> bool:
    """Return whether any folder between the bank and an adapter bears the name of a held-out task.

    Links are followed; of a place outside the bank the two folders above the file count.
    """
    real, root = path.resolve(), folder.resolve()
    names = real.relative_to(root).parts[:-1] if real.is_relative_to(root) else real.parts[-3:-1]
    return any(is_of_task(n, held_out) for n in (*path.relative_to(folder).parts[:-1], *names))


def _scaling(config: Mapping[str, Any], path: Path) -> float:
    """Return the factor of B A: alpha / r, or alpha / sqrt(r) for rsLoRA. Raises DndError for no such numbers."""
    alpha, rank = config.get("lora_alpha", 8), config.get("r", 8)
    if not all(isinstance(n, int | float) and 0 < n < math.inf for n in (alpha, rank)):
        raise DndError(f"{ADAPTER_CONFIG} of {path.parent} has no alpha and rank above 0")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _scaled(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {key: v * factor if ".lora_B." in key else v for key, v in state.items()}


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
    stored = read_json(folder / PROMPTS if data is None else data_file(data, task, purpose))
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
