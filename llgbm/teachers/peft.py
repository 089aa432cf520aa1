"""Train teachers of bases of real size with PEFT and Accelerate, one run at a time, resumable."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor

from llgbm.lora.adapters import PEFT_PREFIX, LoraSpec
from llgbm.lora.apply import blocks_checkpointed
from llgbm.models.cost import HEADROOM, BaseShape, pass_bytes
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import Base
from llgbm.models.scoring import answer_loss, encode_examples
from llgbm.runtime import UserError, content_hash, free_memory, progress, progress_bar
from llgbm.system.accumulation import make_accelerator
from llgbm.teachers.train import Run, adam_with_decay, shared_initial_a
from llgbm.teachers.writer import BankWriter

STATES = ".states"


def _train_with_peft(target: BankWriter, runs: Sequence[Run]) -> None:
    shape = BaseShape.of(target.base.model, target.spec)
    with peft_adapter(target.base, target.spec) as model:
        for run in progress(runs, "runs", total=len(runs)):
            trainer = PeftRun(run, model, target.spec, shape)
            trainer.resume(target)
            trainer.finish(target)


@contextmanager
def peft_adapter(base: Base, spec: LoraSpec) -> Iterator[PeftModel]:
    """Base with one LoRA of PEFT's put into it, to be trained; the base is as it was afterwards."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=list(spec.target_modules),
        fan_in_fan_out=spec.is_transposed,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.unload()
        base.model.requires_grad_(False)


class PeftRun:
    """Run's state: the adapter inside `model`, its optimiser, and the step."""

    def __init__(self, run: Run, model: PeftModel, spec: LoraSpec, shape: BaseShape) -> None:
        base, config = run.base, run.config
        self.run, self.model, self.shape, self.examples_at = run, model, shape, run.examples_at()
        self.accelerator = make_accelerator(
            "bf16" if base.model.dtype == torch.bfloat16 else "no",
            config.accumulation,
            on_cpu=base.model.device.type == "cpu",
        )
        set_peft_model_state_dict(model, initial_state(spec, config.teachers.seed))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, self.schedule = adam_with_decay(parameters, config.teachers)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.step, self.loss = 0, math.nan
        self.key = content_hash(config.settings, base.hash, run.suite, run.task, run.subset)

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
            raise UserError(
                f"the loss of {self.run.task} is {total} at step {self.step}: lower the learning rate"
            )
        self.schedule.step()
        self.step, self.loss = self.step + 1, total

    @contextmanager
    def _saving(self, texts: EncodedPairs) -> Iterator[None]:
        wanted = self.run.config.gradient_checkpointing
        needed = wanted == "on" or (wanted == "auto" and self._is_tight(texts))
        with blocks_checkpointed(self.run.base.model) if needed else nullcontext():
            yield

    def _is_tight(self, texts: EncodedPairs) -> bool:
        """Return whether a plain pass over the texts could exceed what memory is free."""
        return HEADROOM * pass_bytes(self.shape, texts) > free_memory(
            str(self.run.base.model.device)
        )

    def finish(self, target: BankWriter) -> None:
        """Train to the last step; leave adapters and, every few steps, a state to go on from."""
        config = self.run.config
        bar = progress_bar(
            f"{self.run.task} {self.run.subset + 1}/{config.subsets}", config.steps - self.step
        )
        while self.step < config.steps:
            try:
                self.advance()
            except UserError:  # what was kept on the way would lead there again
                self._forget(target.folder)
                raise
            bar.update()
            if self.step in config.saved_at:
                target.add([self.run.adapter(self.adapter(), self.step, loss=round(self.loss, 6))])
            if self.step % config.every == 0 and self.step < config.steps:
                self.save(target.folder)
        bar.close()
        self._forget(target.folder)

    def _forget(self, folder: Path) -> None:
        """Remove the state to go on from, and the folder of states if it is the last one."""
        file = self._state_file(folder)
        file.unlink(missing_ok=True)
        with suppress(OSError):
            file.parent.rmdir()

    def adapter(self) -> dict[str, Tensor]:
        """Adapter as it stands, in float32."""
        return {
            k: v.detach().float().cpu().clone()
            for k, v in get_peft_model_state_dict(self.model).items()
        }

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

    def resume(self, target: BankWriter) -> None:
        """Go on from the run's saved state, unless an adapter from before that step must be made again."""
        file = self._state_file(target.folder)
        if not file.is_file():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = target.missing(self.run.adapter_ids)
        steps = [
            s
            for i, s in zip(self.run.adapter_ids, self.run.config.saved_at, strict=True)
            if i in missing
        ]
        if state["key"] != self.key or min(steps) <= state["step"]:
            return
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]


def initial_state(spec: LoraSpec, seed: int) -> dict[str, Tensor]:
    """Return the starting point of every teacher: the shared A, and B = 0, under PEFT's keys."""
    a = shared_initial_a(spec, seed)
    states = {f"{PEFT_PREFIX}{m.name}.lora_A.weight": a[m.name] for m in spec.modules}
    return states | {
        f"{PEFT_PREFIX}{m.name}.lora_B.weight": torch.zeros(m.n_out, spec.rank)
        for m in spec.modules
    }
