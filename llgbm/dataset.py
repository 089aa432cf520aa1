"""Training data: conditions, standardised teacher weights and teacher deltas, row for row, split by task.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from llgbm.delta import DeltaCache, DeltaTable, EncodedProbes
from llgbm.generator.conditioning import Conditioning
from llgbm.generator.conditions import ConditionPools, TextEncoder, build_conditions
from llgbm.generator.hyperconv import TokenStandardiser
from llgbm.generator.networks import TokenMap
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import Base
from llgbm.models.reading import Questions
from llgbm.models.scoring import encode_examples
from llgbm.probes import ProbeSet
from llgbm.runtime import UserError, stream_seed
from llgbm.tasks.suite import Example, Suite
from llgbm.teachers.bank import Bank
from llgbm.teachers.table import BankTable

PARTS = ("train", "val", "test")
# Labelled examples of each training row.
LABELLED = 32


@dataclass(frozen=True)
class LevelData:
    """Tasks of one level of novelty: prompts to generate from, [A, N, C], and examples to score on, adapter-major."""

    name: str
    tasks: tuple[str, ...]
    conditions_ANC: Tensor
    examples: EncodedPairs

    def to(self, device: str | torch.device) -> LevelData:
        return replace(
            self, conditions_ANC=self.conditions_ANC.to(device), examples=self.examples.to(device)
        )


@dataclass(frozen=True)
class ExperimentData:
    """Tensors of a world that all trials share, on one device. Row i of every table is the same adapter.

    The delta loss uses `loss_deltas`; reports use `shared_deltas` (the suite's domain probes) and `generic_deltas`.
    `values_AV` is read through `teachers`, from memory or from the disk. `examples` are evaluation examples,
    adapter-major, `n_examples` per task, and `questions` the same ones as they are asked and read (None: exact match
    only). `labelled` holds equally many labelled examples of each training row, for references. `multitask_V` is the
    adapter trained on all training tasks together. `size`, `delta_probes` and `conditioning` are those that a trial's
    configuration must name ("" and None fit any). `levels` are the open levels of novelty. `sentences` holds one vector
    of each prompt, which baselines read (None: `conditions` does). `cache` is the folder for what a training
    measures once, if there is one.
    """

    adapter_ids: tuple[str, ...]
    tasks: tuple[str, ...]
    families: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]
    values_AV: Tensor | BankTable
    multitask_V: Tensor
    conditions: ConditionPools
    loss_deltas: DeltaTable
    shared_deltas: DeltaTable
    generic_deltas: DeltaTable
    examples: EncodedPairs
    n_examples: int
    encoder: str
    hash: str
    encoder_hash: str = ""
    size: str = ""
    delta_probes: str = ""
    levels: tuple[LevelData, ...] = ()
    labelled: EncodedPairs | None = None
    questions: Questions | None = None
    conditioning: Conditioning | None = None
    sentences: ConditionPools | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        by_part = {part: {self.tasks[i] for i in self.rows[part]} for part in PARTS}
        if (
            by_part["train"] & (by_part["val"] | by_part["test"])
            or by_part["val"] & by_part["test"]
        ):
            raise ValueError("a task stands in two parts of the data: held out must mean held out")

    def to(self, device: str | torch.device) -> ExperimentData:
        """Copy all tensors to a device."""
        tables = ("loss_deltas", "shared_deltas", "generic_deltas")
        moved = ("values_AV", "multitask_V", "conditions", *tables, "examples")
        labelled = self.labelled and self.labelled.to(device)
        sentences = self.sentences and self.sentences.to(device)
        levels = tuple(level.to(device) for level in self.levels)
        own = {name: getattr(self, name).to(device) for name in moved}
        return replace(self, labelled=labelled, levels=levels, sentences=sentences, **own)

    @property
    def device(self) -> torch.device:
        return self.multitask_V.device

    @property
    def prompt_pools(self) -> ConditionPools:
        """Return one vector of each prompt, whatever a generator reads."""
        return self.sentences or self.conditions

    def teachers(self, rows: Sequence[int]) -> Tensor:
        """Return the flat teachers at some rows, [A, V], on the device of the data."""
        return self.values_AV[list(rows)].to(self.device)

    def examples_of(self, rows: Sequence[int]) -> EncodedPairs:
        """Select the evaluation examples of some adapters, adapter-major."""
        index = torch.tensor(rows)
        ids = self.examples.input_ids_ST.unflatten(0, (-1, self.n_examples))[index].flatten(0, 1)
        targets = self.examples.targets_ST.unflatten(0, (-1, self.n_examples))[index].flatten(0, 1)
        return EncodedPairs(ids, targets)

    def with_few_examples(self, count: int) -> ExperimentData:
        """Return the same data with only the first `count` evaluation examples of each task, or all if it has less."""
        kept = min(count, self.n_examples)
        index_S = torch.arange(len(self.examples)).view(-1, self.n_examples)[:, :kept].flatten()
        questions = self.questions and self.questions.select(index_S.tolist(), 1)
        examples = self.examples.select(index_S.to(self.device))
        return replace(self, examples=examples, n_examples=kept, questions=questions)


def evaluation_examples(suite: Suite, tasks: Sequence[str], count: int) -> list[Example]:
    """Return `count` evaluation examples of each task, task after task."""
    found = [suite.examples(task, "evaluation", count, "evaluation") for task in tasks]
    return list(chain.from_iterable(found))


def labelled_examples(base: Base, suite: Suite, tasks: Sequence[str]) -> EncodedPairs:
    """Encode labelled training examples of tasks, task after task, for references that use labels."""
    count = min(LABELLED, suite.available("train"))
    found = [suite.examples(task, "train", count, "labels") for task in tasks]
    return encode_examples(base, list(chain.from_iterable(found)))


def rows_by_part(suite: Suite, bank: Bank) -> dict[str, tuple[int, ...]]:
    """Rows of each part: all teachers of a training task, the first teacher of a held-out task."""
    part_of: dict[str, str] = {}
    for part in PARTS:
        part_of |= dict.fromkeys(getattr(suite.split, part), part)
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for index, (adapter_id, task) in enumerate(bank.adapters.items()):
        if part_of[task] == "train" or adapter_id.endswith("_0"):
            rows[part_of[task]].append(index)
    return {part: tuple(found) for part, found in rows.items()}


class Draw(NamedTuple):
    """Index of a sample: a row of the training part, and a step."""

    row: int
    step: int


class TeacherTokens:
    """Tokens of the teachers at some rows, each encoded when it is asked for: a bank that is read from the disk."""

    def __init__(self, data: ExperimentData, rows: Sequence[int], tokens: TokenMap) -> None:
        self._data, self._rows, self._tokens = data, list(rows), tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Tensor:
        if isinstance(index, slice):
            return self._tokens.encode(self._data.teachers(self._rows[index]))
        return self._tokens.encode(self._data.teachers([self._rows[index]]))[0]

    @property
    def ndim(self) -> int:
        return self[0].ndim + 1


class DeltaAugmentedDataset(Dataset[dict[str, Tensor]]):
    """Training samples: N prompts drawn anew, the teacher's tokens [A, ...], K of its probes with their deltas.

    `n_prompts` is N, or its least and greatest value; the rows of prompts that a sample leaves out are NaN. Conditions
    are [A, N, C], or [A, N, L, C] of token states. A sample depends on seed, step and row only, so that a resumed run
    sees the samples of an unbroken one.
    """

    def __init__(
        self,
        conditions_ANC: Tensor,
        tokens: Tensor | TeacherTokens,
        deltas: DeltaTable,
        n_prompts: int | tuple[int, int],
        n_probes: int,
        seed: int,
    ) -> None:
        least, most = (n_prompts, n_prompts) if isinstance(n_prompts, int) else n_prompts
        if not len(conditions_ANC) == len(tokens) == len(deltas.delta_APQD):
            raise ValueError(
                f"{len(conditions_ANC)} conditions, {len(tokens)} adapters and {len(deltas.delta_APQD)} deltas: "
                "each row needs one of each"
            )
        if most > conditions_ANC.shape[1]:
            raise UserError(
                f"{most} prompts a sample asked for, the pools hold {conditions_ANC.shape[1]}"
            )
        self._conditions_ANC, self._tokens, self._deltas = conditions_ANC, tokens, deltas
        self._least, self._most, self._seed = least, most, seed
        self._n_probes = min(n_probes, deltas.delta_APQD.shape[1])

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(
            stream_seed("sample", self._seed, draw.step, draw.row)
        )
        prompts = torch.randperm(self._conditions_ANC.shape[1], generator=generator)[: self._most]
        probes = torch.randperm(self._deltas.delta_APQD.shape[1], generator=generator)[
            : self._n_probes
        ]
        own = self._deltas.probes
        # For terms that draw something of their own: drawn last, so that nothing above depends on it.
        draw_of_terms = torch.randint(2**62, (), generator=generator)
        condition = self._conditions_ANC[draw.row, prompts]
        if self._least < self._most:
            kept = torch.randint(self._least, self._most + 1, (), generator=generator)
            condition[int(kept) :] = torch.nan
        return {
            "row": torch.tensor(draw.row),
            "draw": draw_of_terms,
            "probes": probes,
            "condition": condition,
            "tokens": self._tokens[draw.row],
            "probe_ids": own.ids_APT[draw.row, probes],
            "positions": own.positions_APQ[draw.row, probes],
            "valid": own.valid_APQ[draw.row, probes],
            "base_states": self._deltas.base_APQD[draw.row, probes],
            "delta": self._deltas.delta_APQD[draw.row, probes],
        }


@dataclass(frozen=True)
class Sampling:
    """Settings of a sample: the tasks drawn from, and how many prompts and probes are drawn of each row."""

    tasks: Sequence[str]
    n_prompts: int = 16
    n_probes: int = 4
    seed: int = 0


class Text2Qwen25LoRA_DeltaDataset(DeltaAugmentedDataset):
    """Samples read from a bank on disk: encoded prompts, DnD's tokens, and the deltas of a probe set.

    Raises UserError where the bank holds no adapter of the tasks.
    """

    def __init__(
        self,
        bank: Bank,
        base: Base,
        encoder: TextEncoder,
        probe_set: ProbeSet,
        cache: Path,
        sampling: Sampling,
    ) -> None:
        wanted = set(sampling.tasks)
        rows = [i for i, task in enumerate(bank.adapters.values()) if task in wanted]
        if not rows:
            first = next(iter(sampling.tasks), "none")
            raise UserError(f"the bank holds no adapter of the tasks asked for, such as {first!r}")
        batch = bank.load()
        pools = build_conditions(cache, encoder, bank, ["nonsense"])
        deltas = DeltaCache.build(cache, base, bank, probe_set, batch)
        self.standardiser = TokenStandardiser(bank.spec)
        super().__init__(
            pools.train_ANC[rows],
            self.standardiser.encode(batch.flatten(bank.spec)[rows]),
            deltas.table(base, probe_set).select(rows),
            sampling.n_prompts,
            sampling.n_probes,
            sampling.seed,
        )


class StepSampler(Sampler[list[Draw]]):
    """Batches of draws for steps `start` to `stop`. No row comes twice in an epoch; each epoch is reshuffled.

    Rows left over after the last full batch of an epoch wait for the next one.
    """

    def __init__(self, n_rows: int, batch_size: int, start: int, stop: int, seed: int) -> None:
        if n_rows < 1 or batch_size < 1:
            raise ValueError(f"{n_rows} rows in batches of {batch_size}: both must be at least 1")
        self._n_rows, self._batch_size, self._seed = n_rows, min(batch_size, n_rows), seed
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[Draw]]:
        per_epoch = self._n_rows // self._batch_size
        for step in range(self._start, self._stop):
            epoch, place = divmod(step, per_epoch)
            order = self._order(epoch)[place * self._batch_size : (place + 1) * self._batch_size]
            yield [Draw(index, step) for index in order]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(stream_seed("epoch", self._seed, epoch))
        return torch.randperm(self._n_rows, generator=generator).tolist()


def create_dataloader(
    dataset: DeltaAugmentedDataset, batch_size: int, steps: int, seed: int = 0, start: int = 0
) -> DataLoader[Any]:
    """Return a loader of one batch per step, from step `start` to `steps`, reshuffled every epoch."""
    sampler = StepSampler(len(dataset), batch_size, start, steps, seed)
    # A generator of its own: a loader draws from torch's stream otherwise, and a resumed run would differ.
    return DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator())


def batch_deltas(batch: Mapping[str, Tensor]) -> DeltaTable:
    """Return the probes and teacher deltas of a batch of `create_dataloader`, cut to its longest text.

    On a GPU all batches keep one shape, which `llgbm.lora.graphs` records once.
    """
    positions, valid = batch["positions"], batch["valid"]
    if positions.is_cuda:
        width, marks = batch["probe_ids"].shape[-1], valid.shape[-1]
    else:
        width, marks = int(positions.max()) + 1, int(valid.sum(-1).max())
    probes = EncodedProbes(
        batch["probe_ids"][..., :width], positions[..., :marks], valid[..., :marks]
    )
    return DeltaTable(probes, batch["base_states"][..., :marks, :], batch["delta"][..., :marks, :])
