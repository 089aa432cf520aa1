"""The bank of teacher adapters: all tasks' LoRAs trained together through the batched primitive, saved as PEFT folders.

The adapters start from one shared A (so they share a gauge) and B = 0; the loss is a sum over adapters and Adam works
element by element, so each adapter is trained exactly as it would be alone. Letters: A adapters, B examples an adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llgbm.batched import PASS_LOGITS, adapters_applied, chunks, final_hidden, head_logits
from llgbm.cache import build_entry, write_json
from llgbm.encoding import EncodedPairs, chat_prompt, encode_pairs
from llgbm.lora import LoraBatch, LoraSpec, adapter_config, load_adapter, write_adapter_files
from llgbm.models import Base
from llgbm.output import check_name
from llgbm.probes import Probe, ProbeSet
from llgbm.runtime import UserError, content_hash, progress, release_device_memory, stream_seed
from llgbm.suites import Example, Suite

VERSION = 1


@dataclass(frozen=True)
class TeacherConfig:
    """How a bank is trained. `per_task` teachers of a task differ in their examples, not in their initial A."""

    rank: int = 4
    alpha: float = 8.0
    per_task: int = 1
    steps: int = 150
    examples: int = 6
    learning_rate: float = 5e-3
    seed: int = 0
    condition_train: int = 32
    condition_evaluation: int = 16
    trajectories: int = 16

    def __post_init__(self) -> None:
        if min(self.per_task, self.steps, self.examples, self.trajectories) < 1:
            raise UserError("a bank needs at least one teacher a task, one step, one example and one trajectory")


@dataclass(frozen=True)
class Bank:
    """A bank on disk: `checkpoints/{task}/{task}_{idx}/` with weights, config and the prompts that condition on it."""

    folder: Path
    hash: str
    spec: LoraSpec
    adapters: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, spec: LoraSpec, key: str) -> Bank:
        """Read the list of adapters. Raises UserError where the folder is no bank."""
        index = folder / "bank.json"
        if not index.is_file():
            raise UserError(f"{folder} is no bank of adapters (it has no bank.json)")
        return cls(folder, key, spec, json.loads(index.read_text())["adapters"])

    def adapter_folder(self, adapter_id: str) -> Path:
        return self.folder / "checkpoints" / self.adapters[adapter_id] / adapter_id

    def load(self) -> LoraBatch:
        """All adapters, checked. Raises UserError for one that is torn, not finite or of another rank or base."""
        return LoraBatch.from_state_dicts([load_adapter(self.adapter_folder(i), self.spec) for i in self.adapters])

    def prompts(self, adapter_id: str) -> dict[str, list[str]]:
        """The unlabelled prompts of an adapter, by purpose: `train` and `evaluation`."""
        return json.loads((self.adapter_folder(adapter_id) / "prompts.json").read_text())

    @property
    def facts(self) -> dict[str, float]:
        """What was measured when the bank was made, such as `teacher_accuracy`."""
        return json.loads((self.folder / "bank.json").read_text())["facts"]

    def trajectories(self) -> ProbeSet:
        """Each task's prompts, continued by its first teacher's own greedy answers."""
        stored = json.loads((self.folder / "trajectories.json").read_text())
        return ProbeSet.trajectories({task: [Probe(p, a) for p, a in pairs] for task, pairs in stored.items()})


def bank_key(base_hash: str, suite: Suite, config: TeacherConfig) -> str:
    """The name of a bank in the cache."""
    return content_hash("bank", VERSION, base_hash, suite.fingerprint, config)


def build_bank(root: Path, base: Base, suite: Suite, config: TeacherConfig) -> Bank:
    """Train the bank of a suite, or find it: named by base, suite, config and the version of this code."""
    spec = LoraSpec.from_model(base.model, config.rank, config.alpha)
    key = bank_key(base.hash, suite, config)

    def write(folder: Path) -> None:
        tasks = [task for task in suite.split.tasks for _ in range(config.per_task)]
        streams = [f"teacher {config.seed} {index % config.per_task}" for index in range(len(tasks))]
        batch = train_teachers(base, spec, config, example_source(suite, base, tasks, streams, config))
        _write_bank(folder, base, suite, config, tasks, batch, spec)

    return Bank.open(build_entry(root, "banks", key, write), spec, key)


def example_source(
    suite: Suite, base: Base, tasks: Sequence[str], streams: Sequence[str], config: TeacherConfig
) -> Callable[[int], EncodedPairs]:
    """Encoded training examples of every adapter at a step, adapter-major: [A * B] texts."""
    count, n = config.steps * config.examples, config.per_task
    pools = [
        suite.examples(task, "train", count, stream, (index % n, n))
        for index, (task, stream) in enumerate(zip(tasks, streams, strict=True))
    ]

    def at(step: int) -> EncodedPairs:
        rows = slice(step * config.examples, (step + 1) * config.examples)
        return encode_examples(base, [example for pool in pools for example in pool[rows]])

    return at


def encode_examples(base: Base, examples: Sequence[Example]) -> EncodedPairs:
    """Encode examples for a base, on its device; those that are turns of a chat in the base's own template."""
    pairs = [(chat_prompt(base.tokenizer, e.prompt, e.system), e.answer) for e in examples]
    return encode_pairs(base.tokenizer, pairs).to(base.model.device)


def shared_initial_a(spec: LoraSpec, seed: int) -> dict[str, Tensor]:
    """One A [R, in] a module, drawn as PEFT draws it: Kaiming-uniform with a = sqrt(5)."""
    generator = torch.Generator().manual_seed(stream_seed("initial A", seed))
    drawn = {}
    for m in spec.modules:
        drawn[m.name] = torch.empty(spec.rank, m.n_in)
        nn.init.kaiming_uniform_(drawn[m.name], a=math.sqrt(5), generator=generator)
    return drawn


def train_teachers(
    base: Base, spec: LoraSpec, config: TeacherConfig, examples_at: Callable[[int], EncodedPairs]
) -> LoraBatch:
    """Train as many adapters as `examples_at` gives texts for (adapter-major), all at once. Adam, cosine decay."""
    n_adapters = len(examples_at(0)) // config.examples
    device = base.model.device
    initial = shared_initial_a(spec, config.seed)
    batch = LoraBatch(
        {n: a.to(device).repeat(n_adapters, 1, 1).requires_grad_() for n, a in initial.items()},
        {m.name: torch.zeros(n_adapters, m.n_out, spec.rank, device=device, requires_grad=True) for m in spec.modules},
    )
    optimizer, schedule = adam_with_decay([*batch.a.values(), *batch.b.values()], config.learning_rate, config.steps)
    for step in progress(range(config.steps), f"{n_adapters} teachers"):
        loss_A = adapter_losses(base.model, spec, batch, examples_at(step))
        optimizer.zero_grad(set_to_none=True)
        loss_A.sum().backward()
        optimizer.step()
        schedule.step()
    release_device_memory()
    return LoraBatch({n: t.detach() for n, t in batch.a.items()}, {n: t.detach() for n, t in batch.b.items()})


def adam_with_decay(
    parameters: Iterable[Tensor], learning_rate: float, steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.CosineAnnealingLR]:
    """Adam, its rate falling to a twentieth along a cosine: how every teacher is trained."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=learning_rate / 20)


def adapter_losses(model: PreTrainedModel, spec: LoraSpec, batch: LoraBatch, texts: EncodedPairs) -> Tensor:
    """Mean answer cross-entropy [A] of each adapter on its own texts (adapter-major)."""
    with adapters_applied(model, batch, spec.scaling):
        losses_ST = token_losses(model, texts)
    per_adapter = losses_ST.view(batch.n_adapters, -1).sum(1)
    return per_adapter / (texts.targets_ST >= 0).view(batch.n_adapters, -1).sum(1)


def token_losses(model: PreTrainedModel, texts: EncodedPairs) -> Tensor:
    """Cross-entropy [S, T] of every answer token, 0 elsewhere, under whatever adapters are applied."""
    marked = texts.targets_ST >= 0
    states = final_hidden(model, texts.input_ids_ST)[marked]
    losses = nn.functional.cross_entropy(head_logits(model, states).float(), texts.targets_ST[marked], reduction="none")
    return torch.zeros(marked.shape, device=losses.device).masked_scatter(marked, losses)


def greedy_answers(
    base: Base, spec: LoraSpec, batch: LoraBatch, prompts: Sequence[Sequence[str]], max_tokens: int = 24
) -> list[list[str]]:
    """Greedy continuations of each adapter on its own prompts, up to the end token or `max_tokens`.

    Raises ValueError where there are not as many lists of prompts as adapters, all of one length.
    """
    if len(prompts) != batch.n_adapters or len({len(own) for own in prompts}) != 1 or not prompts[0]:
        raise ValueError(f"{len(prompts)} lists of prompts for {batch.n_adapters} adapters: each needs one as long")
    longest = max(len(ids) for own in prompts for ids in base.tokenizer(list(own))["input_ids"])
    answers: list[list[str]] = []
    for rows in chunks(batch.n_adapters, len(prompts[0]) * (longest + max_tokens)):
        flat = [prompt for own in prompts[rows] for prompt in own]
        with adapters_applied(base.model, batch.select(rows), spec.scaling):
            texts = iter(continue_texts(base, flat, max_tokens))
        answers += [[next(texts) for _ in own] for own in prompts[rows]]
    return answers


def continue_texts(base: Base, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """Greedy continuations under whatever adapters are applied, one pass of the library's `generate`."""
    encoded = base.tokenizer(
        list(prompts),
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    ).to(base.model.device)
    with torch.no_grad():
        ids = cast(Any, base.model).generate(**encoded, max_new_tokens=max_tokens, do_sample=False)
    return base.tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(
    base: Base, spec: LoraSpec, batch: LoraBatch, examples: Sequence[Sequence[Example]], chunk: int = 48
) -> Tensor:
    """Exact-match accuracy [A] of greedy decoding on each adapter's examples, in one teacher-forced pass.

    Greedy decoding gives the wanted answer if and only if every answer token (the end token too) is the most likely
    one after the right prefix; so no token needs to be generated. Raises ValueError for a mismatch in number.
    """
    if len(examples) != batch.n_adapters or len({len(own) for own in examples}) != 1 or not examples[0]:
        raise ValueError(
            f"{len(examples)} lists of examples for {batch.n_adapters} adapters: each needs one, all as long"
        )
    texts, n = encode_examples(base, [e for own in examples for e in own]), len(examples[0])
    pieces = []
    for rows in chunks(batch.n_adapters, n * texts.input_ids_ST.shape[1], chunk):
        own = texts.select(slice(rows.start * n, rows.stop * n))
        with torch.no_grad(), adapters_applied(base.model, batch.select(rows), spec.scaling):
            pieces.append(right_answers(base.model, own).view(-1, n).float().mean(1))
    return torch.cat(pieces)


def right_answers(model: PreTrainedModel, texts: EncodedPairs) -> Tensor:
    """Whether greedy decoding would give the answer, [S], under whatever adapters are applied."""
    marked = texts.targets_ST >= 0
    states = final_hidden(model, texts.input_ids_ST)[marked]
    pieces = states.split(max(1, PASS_LOGITS // model.config.vocab_size))
    right = torch.cat([head_logits(model, piece).argmax(-1) for piece in pieces]) == texts.targets_ST[marked]
    wrong = torch.zeros(marked.shape, dtype=torch.bool, device=right.device).masked_scatter(marked, ~right)
    return ~wrong.any(1)


def base_accuracy(base: Base, examples: Sequence[Example]) -> float:
    """Exact-match accuracy of the base without any adapter."""
    texts = encode_examples(base, examples)
    with torch.no_grad():
        pieces = [
            right_answers(base.model, texts.select(rows))
            for rows in chunks(len(texts), texts.input_ids_ST.shape[1], at_most=len(texts))
        ]
    return torch.cat(pieces).float().mean().item()


def _write_bank(
    folder: Path,
    base: Base,
    suite: Suite,
    config: TeacherConfig,
    tasks: Sequence[str],
    batch: LoraBatch,
    spec: LoraSpec,
) -> None:
    ids = [f"{task}_{index % config.per_task}" for index, task in enumerate(tasks)]
    settings = adapter_config(spec, base.path)
    for index, (adapter_id, task, state) in enumerate(zip(ids, tasks, batch.to_state_dicts(), strict=True)):
        own = folder / "checkpoints" / check_name(task, "the task") / check_name(adapter_id, "the adapter")
        own.mkdir(parents=True)
        write_adapter_files(own, state, settings)
        share = (index % config.per_task, config.per_task)
        (own / "prompts.json").write_text(json.dumps(condition_prompts(suite, task, config, share)))
    index_bank(folder, base, suite, config, batch, spec)


def index_bank(folder: Path, base: Base, suite: Suite, config: TeacherConfig, batch: LoraBatch, spec: LoraSpec) -> None:
    """Measure the teachers of a suite, `per_task` a task in the order of its tasks; write trajectories and list."""
    tasks = [task for task in suite.split.tasks for _ in range(config.per_task)]
    ids = [f"{task}_{index % config.per_task}" for index, task in enumerate(tasks)]
    n_examples = min(32, suite.available("evaluation"))
    examples = [suite.examples(task, "evaluation", n_examples, "teacher accuracy") for task in tasks]
    accuracy_A = exact_match(base, spec, batch, examples)
    facts = {
        "teacher_accuracy": accuracy_A.mean().item(),
        "worst_teacher_accuracy": accuracy_A.min().item(),
        "base_accuracy": base_accuracy(base, [e for own in examples[:: config.per_task] for e in own]),
    }
    write_json(folder / "trajectories.json", _own_answers(base, suite, config, batch, spec))
    listing = {
        "adapters": dict(zip(ids, tasks, strict=True)),
        "facts": facts,
        "accuracy": dict(zip(ids, accuracy_A.tolist(), strict=True)),
    }
    write_json(folder / "bank.json", listing)


def condition_prompts(suite: Suite, task: str, config: TeacherConfig, share: tuple[int, int]) -> dict[str, list[str]]:
    """Prompts of what a teacher was trained on, its share of the examples, and others to condition on at evaluation."""
    known = suite.examples(task, "train", config.condition_train, "condition", share)
    others = suite.examples(task, "prompts", config.condition_evaluation, "condition")
    return {"train": [e.prompt for e in known], "evaluation": [e.prompt for e in others]}


def _own_answers(
    base: Base, suite: Suite, config: TeacherConfig, batch: LoraBatch, spec: LoraSpec
) -> dict[str, list[tuple[str, str]]]:
    """Prompts of each task with its first teacher's greedy answers."""
    firsts = batch.select(slice(0, None, config.per_task))
    tasks = suite.split.tasks
    share = (0, config.per_task)
    own = [suite.examples(t, "train", config.trajectories, "trajectory", share) for t in tasks]
    prompts = [[chat_prompt(base.tokenizer, e.prompt, e.system) for e in examples] for examples in own]
    answers = greedy_answers(base, spec, firsts, prompts)
    return {t: list(zip(p, a, strict=True)) for t, p, a in zip(tasks, prompts, answers, strict=True)}
