"""Teachers for bases of real size, into a bank folder that a killed run goes on with.

As in Drag-and-Drop LLMs, the training rows of a dataset are parted into subsets that do not overlap, each subset is one
run, and a run leaves several checkpoints. `peft` trains one run at a time with PEFT and Accelerate (bf16, accumulation,
block checkpointing), `batched` several at once through the batched primitive, as many as fit. Both learn the answers
only, start from one shared A and use the same optimiser, so that they give the same adapters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from llgbm.banks import LISTING, BankFolder, check_bank_address, open_bank
from llgbm.batched import blocks_checkpointed
from llgbm.cost import BaseShape
from llgbm.encoding import EncodedPairs
from llgbm.lora import PEFT_PREFIX, LoraBatch, LoraSpec, load_adapter
from llgbm.models import Base, answer_loss
from llgbm.output import check_name
from llgbm.runtime import UserError, content_hash, free_memory, progress, progress_bar, say
from llgbm.suites import Example, Suite
from llgbm.teachers import (
    Bank,
    TeacherConfig,
    adam_with_decay,
    condition_prompts,
    encode_examples,
    index_bank,
    shared_initial_a,
    train_teachers,
)

METHODS = ("peft", "batched")
CHECKPOINTING = ("auto", "on", "off")
STATES = ".states"
# What a pass holds beside its activations: gradients on their way, the logits, the allocator's waste.
HEADROOM = 2.0


@dataclass(frozen=True)
class SFTConfig:
    """How teachers are trained: `teachers.per_task` adapters a dataset, `checkpoints` of them from each run.

    A run saves its last checkpoints `every` steps apart. `teachers.examples` are read a step, in `accumulation` pieces.
    """

    teachers: TeacherConfig = TeacherConfig(rank=8, alpha=16.0, per_task=4, steps=100, examples=16, learning_rate=1e-4)
    method: str = "peft"
    checkpoints: int = 2
    every: int = 10
    accumulation: int = 1
    gradient_checkpointing: str = "auto"
    at_once: int = 0

    def __post_init__(self) -> None:
        known = ((self.method, "method", METHODS), (self.gradient_checkpointing, "checkpointing", CHECKPOINTING))
        for value, what, allowed in known:
            if value not in allowed:
                raise UserError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")
        if min(self.checkpoints, self.every, self.accumulation) < 1 or self.at_once < 0:
            raise UserError("checkpoints, every and accumulation must be at least 1, at_once at least 0")
        if self.teachers.per_task % self.checkpoints or self.teachers.examples % self.accumulation:
            raise UserError(
                f"{self.teachers.per_task} adapters a task from runs of {self.checkpoints} checkpoints, and "
                f"{self.teachers.examples} examples a step in {self.accumulation} pieces: both must divide evenly"
            )
        if self.method == "batched" and (self.checkpoints > 1 or self.accumulation > 1):
            raise UserError("the batched method saves one checkpoint a run and reads a step's examples in one piece")
        if self.saved_at[0] < 1:
            raise UserError(
                f"{self.checkpoints} checkpoints {self.every} steps apart need more than {self.steps} steps"
            )

    @property
    def steps(self) -> int:
        return self.teachers.steps

    @property
    def subsets(self) -> int:
        """Runs a dataset."""
        return self.teachers.per_task // self.checkpoints

    @property
    def saved_at(self) -> list[int]:
        """The steps that a run leaves an adapter at."""
        return [self.steps - self.every * back for back in reversed(range(self.checkpoints))]

    @property
    def settings(self) -> dict[str, Any]:
        """What the adapters depend on: how memory is saved is not among it."""
        savers = {"gradient_checkpointing", "at_once"}
        return {name: value for name, value in asdict(self).items() if name not in savers}


@dataclass(frozen=True)
class Run:
    """One training: a dataset, one of its subsets, and the adapters that it leaves."""

    task: str
    subset: int
    config: SFTConfig
    suite: Suite
    base: Base

    @property
    def adapter_ids(self) -> list[str]:
        """In the order of `saved_at`. The last checkpoint has the lowest number, so that a task's first teacher, which
        stands for a held-out task and answers its prompts, is a fully trained one."""
        n = self.config.checkpoints
        return [f"{self.task}_{self.subset * n + i}" for i in reversed(range(n))]

    @property
    def share(self) -> tuple[int, int]:
        return self.subset, self.config.subsets

    def examples_at(self) -> Callable[[int], list[Example]]:
        """The examples of a step (counted from 0), in an order of the run's own."""
        per_step, seed = self.config.teachers.examples, self.config.teachers.seed
        stream = f"teacher {seed} {self.subset}"
        pool = self.suite.examples(self.task, "train", self.config.steps * per_step, stream, self.share)
        return lambda step: pool[step * per_step : (step + 1) * per_step]

    @property
    def prompts(self) -> dict[str, list[str]]:
        return condition_prompts(self.suite, self.task, self.config.teachers, self.share)

    def facts(self, step: int) -> dict[str, Any]:
        """What the manifest says of an adapter."""
        return {"subset": f"{self.subset + 1} of {self.config.subsets}", "step": step}


def make_bank(base: Base, suite: Suite, config: SFTConfig, out: Path) -> Bank:
    """Train whatever adapter of the suite's tasks is missing or torn in `out`; measure them; give the bank.

    Raises UserError for a folder that holds something else, and FloatingPointError where a loss is not finite.
    """
    out = check_bank_address(out).path
    teachers = config.teachers
    spec = LoraSpec.from_model(base.model, teachers.rank, teachers.alpha)
    settings = {**config.settings, "data": suite.fingerprint}
    target = BankFolder(out, base, spec, settings)
    runs = [Run(task, k, config, suite, base) for task in suite.split.tasks for k in range(config.subsets)]
    for adapter_id in (i for run in runs for i in run.adapter_ids):
        check_name(adapter_id, "the adapter")
    with target.opened():
        open_runs = [run for run in runs if target.missing(run.adapter_ids)]
        if open_runs:
            say(f"{len(runs) - len(open_runs)} of {len(runs)} runs are done; {len(open_runs)} to go")
            (out / LISTING).unlink(missing_ok=True)
            (_train_with_peft if config.method == "peft" else _train_batched)(target, open_runs)
        if not (out / LISTING).is_file():
            ids = [i for run in runs for i in reversed(run.adapter_ids)]
            tasks = {i: run.task for run in runs for i in reversed(run.adapter_ids)}
            states = [load_adapter(out / "checkpoints" / tasks[i] / i, spec) for i in ids]
            batch = _on(LoraBatch.from_state_dicts(states), base)
            index_bank(out, base, suite, teachers, batch, spec)
    return open_bank(out, base)


def _on(batch: LoraBatch, base: Base) -> LoraBatch:
    device = base.model.device
    return LoraBatch(*({n: t.to(device) for n, t in side.items()} for side in (batch.a, batch.b)))


def _train_with_peft(target: BankFolder, runs: Sequence[Run]) -> None:
    shape = BaseShape.of(target.base.model, target.spec)
    with peft_adapter(target.base, target.spec) as model:
        for run in progress(runs, "runs", total=len(runs)):
            trainer = PeftRun(run, model, target.spec, shape)
            trainer.resume(target)
            trainer.finish(target)


@contextmanager
def peft_adapter(base: Base, spec: LoraSpec) -> Iterator[PeftModel]:
    """The base with one LoRA of PEFT's put into it, to be trained; the base is as it was afterwards."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=list(spec.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.unload()
        base.model.requires_grad_(False)


class PeftRun:
    """A run's state: the adapter inside `model`, its optimiser, and the step."""

    def __init__(self, run: Run, model: PeftModel, spec: LoraSpec, shape: BaseShape) -> None:
        from accelerate import Accelerator

        base, config = run.base, run.config
        self.run, self.model, self.shape, self.examples_at = run, model, shape, run.examples_at()
        self.accelerator = Accelerator(
            cpu=base.model.device.type == "cpu",
            mixed_precision="bf16" if base.model.dtype == torch.bfloat16 else "no",
            gradient_accumulation_steps=config.accumulation,
        )
        set_peft_model_state_dict(model, initial_state(spec, config.teachers.seed))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, self.schedule = adam_with_decay(parameters, config.teachers.learning_rate, config.steps)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.step, self.loss = 0, math.nan
        self.key = content_hash(config.settings, base.hash, run.suite.fingerprint, run.task, run.subset)

    def advance(self) -> None:
        """One step: its examples in `accumulation` pieces, weighted by their tokens as if they were one."""
        whole = encode_examples(self.run.base, self.examples_at(self.step))
        n = len(whole) // self.run.config.accumulation
        pieces = [whole.select(slice(i, i + n)) for i in range(0, len(whole), n)]
        wanted = (whole.targets_ST >= 0).sum()
        total = 0.0
        for piece in pieces:
            with self.accelerator.accumulate(self.model), self._saving(piece):
                share = (piece.targets_ST >= 0).sum() / wanted
                with self.accelerator.autocast():
                    loss = answer_loss(self.run.base.model, piece) * share
                self.accelerator.backward(loss * len(pieces))
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of {self.run.task} is {total} at step {self.step}: lower the rate")
        self.schedule.step()
        self.step, self.loss = self.step + 1, total

    @contextmanager
    def _saving(self, texts: EncodedPairs) -> Iterator[None]:
        wanted = self.run.config.gradient_checkpointing
        needed = wanted == "on" or (wanted == "auto" and self._is_tight(texts))
        with blocks_checkpointed(self.run.base.model) if needed else nullcontext():
            yield

    def _is_tight(self, texts: EncodedPairs) -> bool:
        """Whether a plain pass over the texts could exceed what memory is free."""
        return HEADROOM * pass_bytes(self.shape, texts) > free_memory(str(self.run.base.model.device))

    def finish(self, target: BankFolder) -> None:
        """Train to the last step; leave adapters and, every few steps, a state to go on from."""
        config = self.run.config
        bar = progress_bar(f"{self.run.task} {self.run.subset + 1}/{config.subsets}", config.steps - self.step)
        while self.step < config.steps:
            self.advance()
            bar.update()
            if self.step in config.saved_at:
                adapter_id = self.run.adapter_ids[config.saved_at.index(self.step)]
                facts = {**self.run.facts(self.step), "loss": round(self.loss, 6)}
                target.add(adapter_id, self.run.task, self.adapter(), self.run.prompts, facts)
            if self.step % config.every == 0 and self.step < config.steps:
                self.save(target.folder)
        bar.close()
        self._state_file(target.folder).unlink(missing_ok=True)

    def adapter(self) -> dict[str, Tensor]:
        """The adapter as it stands, in float32."""
        return {k: v.detach().float().cpu().clone() for k, v in get_peft_model_state_dict(self.model).items()}

    def _state_file(self, folder: Path) -> Path:
        return folder / STATES / f"{self.run.task}_{self.run.subset}.pt"

    def save(self, folder: Path) -> None:
        """Write what a killed run goes on from, whole or not at all."""
        file = self._state_file(folder)
        file.parent.mkdir(exist_ok=True)
        stage = file.with_suffix(".writing")
        content = {
            "key": self.key,
            "step": self.step,
            "adapter": self.adapter(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with stage.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(stage, file)

    def resume(self, target: BankFolder) -> None:
        """Go on from the run's saved state, unless an adapter from before that step must be made again."""
        file = self._state_file(target.folder)
        if not file.is_file():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = target.missing(self.run.adapter_ids)
        steps = [s for i, s in zip(self.run.adapter_ids, self.run.config.saved_at, strict=True) if i in missing]
        if state["key"] != self.key or min(steps) <= state["step"]:
            return
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]


def initial_state(spec: LoraSpec, seed: int) -> dict[str, Tensor]:
    """Where every teacher starts: the shared A, and B = 0, under PEFT's keys."""
    a = shared_initial_a(spec, seed)
    states = {f"{PEFT_PREFIX}{m.name}.lora_A.weight": a[m.name] for m in spec.modules}
    return states | {f"{PEFT_PREFIX}{m.name}.lora_B.weight": torch.zeros(m.n_out, spec.rank) for m in spec.modules}


def pass_bytes(shape: BaseShape, texts: EncodedPairs, checkpointing: bool = False) -> float:
    """What training holds of some texts: activations, and the answers' logits in float32 with their gradient."""
    rows, tokens = texts.input_ids_ST.shape
    answers = int((texts.targets_ST >= 0).sum())
    return shape.activation_bytes(rows, tokens, checkpointing) + 3 * 4 * answers * shape.vocabulary


def _train_batched(target: BankFolder, runs: Sequence[Run]) -> None:
    """Groups of runs at once. A group that was killed is trained again, those before it stay."""
    at_once = runs[0].config.at_once or _that_fit(target, runs[0])
    groups = [runs[i : i + at_once] for i in range(0, len(runs), at_once)]
    for group in progress(groups, f"groups of {at_once} runs", total=len(groups)):
        batch = train_teachers(target.base, target.spec, group[0].config.teachers, _together(group, target.base))
        for run, state in zip(group, batch.to_state_dicts(), strict=True):
            target.add(run.adapter_ids[0], run.task, state, run.prompts, run.facts(run.config.steps))


def _together(runs: Sequence[Run], base: Base) -> Callable[[int], EncodedPairs]:
    sources = [run.examples_at() for run in runs]
    return lambda step: encode_examples(base, [example for at in sources for example in at(step)])


def _that_fit(target: BankFolder, run: Run) -> int:
    """How many runs can be trained at once in the memory that is free. Raises UserError for none."""
    shape = BaseShape.of(target.base.model, target.spec)
    states = 4 * 4 * target.spec.n_values
    first = encode_examples(target.base, run.examples_at()(0))
    each = HEADROOM * pass_bytes(shape, first) + states
    free = free_memory(str(target.base.model.device))
    if each > free:
        raise UserError(
            f"one run needs about {each / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: use --method peft, which can "
            "accumulate and checkpoint"
        )
    return int(free // each)
