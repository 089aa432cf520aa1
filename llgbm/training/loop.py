"""Training loop. It reports through callbacks and depends on neither Ray nor MLflow.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llgbm.dataset import (
    DeltaAugmentedDataset,
    ExperimentData,
    TeacherTokens,
    create_dataloader,
)
from llgbm.evaluation.metrics import evaluate
from llgbm.functional import FunctionalLoRA
from llgbm.generator import make_generator
from llgbm.generator.networks import LoraGenerator, Standardiser, TrainingRows
from llgbm.runtime import UserError, progress, seed_everything
from llgbm.system.accumulation import make_accelerator, weighted_pieces
from llgbm.terms.step import Step, TermData
from llgbm.training.config import TrainingConfig
from llgbm.training.mixup import with_mixtures
from llgbm.training.subset import with_fewer

Report = Callable[[int, Mapping[str, float]], bool]
State = dict[str, Any]
VERSION = (
    4  # Raise it when the same config and data would give other numbers: trial ids depend on it.
)
# Begins the names of a generator's own parts of the loss, which are reported as `generator/<name>`.
OWN_PART = "generator_"


def _random_state() -> dict[str, Tensor]:
    """Return the state of torch's random streams, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _always(step: int, metrics: Mapping[str, float]) -> bool:
    return True


def _nothing(state: State) -> None:
    pass


@dataclass(frozen=True)
class Outcome:
    """Result of a training: the generator that `Trial.keep_if_good` kept, its step and its validation accuracy.

    `steps_run` and `seconds` include those before a resume.
    """

    generator: LoraGenerator
    best_step: int
    best_score: float
    steps_run: int
    seconds: float


def fit_teachers(data: ExperimentData, rows: list[int]) -> Standardiser:
    """Standardisation of the training teachers; from the disk block by block, with the same bits."""
    if isinstance(data.values_AV, Tensor):
        return Standardiser.fit(data.teachers(rows))
    if len(rows) < 2:
        return Standardiser.fit(data.teachers(rows))  # which says what is wrong
    return Standardiser.fit_columns(block.to(data.device) for block in data.values_AV.columns(rows))


def teacher_tokens(
    data: ExperimentData, rows: list[int], generator: LoraGenerator
) -> Tensor | TeacherTokens:
    """Tokens of the training teachers: all of them, or from the disk as they are asked for."""
    if isinstance(data.values_AV, Tensor):
        return generator.standardiser.encode(data.teachers(rows))
    return TeacherTokens(data, rows, generator.standardiser)


def training_rows(data: ExperimentData, rows: list[int]) -> TrainingRows:
    """Return what a generator may keep of the training rows; nothing is read before it asks."""
    tasks = tuple(data.tasks[row] for row in rows)
    return TrainingRows(tasks, lambda: data.conditions.train_ANC[rows], lambda: data.teachers(rows))


def _check_data(config: TrainingConfig, data: ExperimentData) -> None:
    """Raise UserError for data of another size, other probes or other conditions than the configuration names."""
    for name in ("size", "delta_probes", "conditioning"):
        asked = getattr(config, "model_size" if name == "size" else name)
        found = getattr(data, name)
        if found and asked != found:
            raise UserError(
                f"the configuration names {name} {asked!r}, its data are of {found!r}: build the world for the "
                "configuration, or name what it was built for"
            )


class Trial:
    """State of one training: generator, optimiser, loss, and the best generator so far."""

    def __init__(
        self, config: TrainingConfig, data: ExperimentData, lora_model: FunctionalLoRA
    ) -> None:
        _check_data(config, data)
        data = with_fewer(data, config)
        seed_everything(config.seed)
        self.config, self.data, self.lora_model = config, data, lora_model
        self.accelerator = make_accelerator(
            config.mixed_precision,
            config.gradient_accumulation,
            on_cpu=lora_model.model.device.type == "cpu",
        )
        rows = list(data.rows["train"])
        standardiser = fit_teachers(data, rows)
        width = data.conditions.train_ANC.shape[-1]
        generator = make_generator(
            config.generator, lora_model.spec, width, standardiser, config.seed
        )
        generator.check_reads(config.prompt_tokens, padded=config.n_prompts_min > 0)
        # Not wrapped by Accelerate, which would score it in another precision than the bundle that is registered.
        self.generator = generator.to(lora_model.model.device)
        generator.prepare_training(training_rows(data, rows))
        optimizer = torch.optim.AdamW(
            generator.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.optimizer = self.accelerator.prepare(optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        # Standardised and evaluated as without mixtures.
        taught = with_mixtures(data, lora_model, config.mixup, config.seed)
        rows = list(taught.rows["train"])
        tokens = teacher_tokens(taught, rows, generator)
        self.loss = config.objective.prepare(TermData(taught, rows, tokens, lora_model, generator))
        self.dataset = DeltaAugmentedDataset(
            taught.conditions.train_ANC[rows],
            tokens,
            taught.loss_deltas.select(rows),
            config.prompts_drawn,
            config.n_probes,
            config.seed,
        )
        self.step, self.best_step, self.last_improvement, self.best_score = 0, 0, 0, -math.inf
        self.highest, self.least = -math.inf, -math.inf  # score so far, and what is as good as it
        self.best: dict[str, Tensor] = {}
        self.spent, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds trained so far, those before a resume included."""
        return self.spent + time.perf_counter() - self._since

    def _rate(self, step: int) -> float:
        """Linear warm-up over a twentieth of the steps, then cosine decay to a twentieth of the rate."""
        steps = self.config.steps // self.config.gradient_accumulation
        warm = max(1, steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.05 + 0.475 * (
            1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm)))
        )

    def advance(
        self, batch: Mapping[str, Tensor], factors: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Take one step, or with accumulation a piece of one; return its losses.

        `factors` weight the terms of a piece, as `weighted_pieces` gives them. Raises FloatingPointError when the loss
        is not finite.
        """
        with self.accelerator.accumulate(self.generator):
            terms = self.compute_loss(batch)
            if not torch.isfinite(terms["loss"]):
                raise FloatingPointError(
                    f"the loss is {terms['loss'].item()} at step {self.step}: lower the learning rate"
                )
            self.accelerator.backward(self._weighted(terms, factors))
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.generator.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.sync_gradients:
            self.schedule.step()
        self.step += 1
        values = {name.replace("_", "/", 1): value.item() for name, value in terms.items()}
        return {"loss/total": values.pop("loss"), **values}

    def _weighted(self, terms: Mapping[str, Tensor], factors: Mapping[str, float] | None) -> Tensor:
        """Return the loss of a batch, or of a piece of one with the factors of its terms."""
        if factors is None:
            return terms["loss"]
        return self._total(
            {name: factors[name] * value for name, value in terms.items() if name != "loss"}
        )

    def _total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum weight x value of the loss terms and of the generator's own parts."""
        total = self.loss.total(values)
        for name, weight in self.generator.penalties.items():
            total = total + weight * values[OWN_PART + name]
        return total

    def _counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Count the values that each term averages over in a batch."""
        counts = {f"loss_{term.name}": term.count(batch) for term in self.loss.terms}
        own = (OWN_PART + name for name in self.generator.penalties)
        return {**counts, **dict.fromkeys(own, len(batch["tokens"]))}

    def compute_loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute `loss`, its terms and the generator's own parts of a batch; terms without a weight are skipped.

        Only the generator's own pass is of mixed precision: the base reads its adapters as it read the teachers'.
        """
        with self.accelerator.autocast():
            tokens, penalties = self.generator.training_forward(batch)
        step = Step(
            batch,
            tokens.float(),
            self.generator,
            self.lora_model,
            self.config.probe_chunk,
            self.config.activation_checkpointing,
            self.loss.prepared,
            self.loss.modules,
        )
        values = self.loss(step)
        own = {OWN_PART + name: value.float() for name, value in penalties.items()}
        return {**values, **own, "loss": self._total({**values, **own})} if own else values

    def batches(self) -> Any:
        """Return a loader from the present step to the last."""
        config = self.config
        return create_dataloader(
            self.dataset, config.batch_size, config.steps, config.seed, self.step
        )

    def keep_if_good(self, score: float, error: float = 0.0) -> None:
        """Keep the generator unless its score is below the highest so far by more than that one's standard error.

        The rule of one standard error (Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3):
        among scores that a few validation tasks cannot tell apart, the generator that trained longest is kept.
        """
        if score > self.highest:
            self.last_improvement = self.step
            self.highest, self.least = score, score - error
        if score >= self.least:
            self.best_score, self.best_step = score, self.step
            self.best = copy.deepcopy(self.generator.state_dict())

    def state(self) -> State:
        """Return everything that a resumed run needs: tensors, numbers, strings and dictionaries."""
        return {
            "step": self.step,
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "last_improvement": self.last_improvement,
            "best_score": self.best_score,
            "highest": self.highest,
            "least": self.least,
            "seconds": self.seconds,
            "random": _random_state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }

    def restore(self, state: State) -> None:
        """Continue from what `state` returned."""
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.best_step = state["step"], state["best_step"]
        # Checkpoints written before the rename hold `risen_step`, and older ones only the highest score.
        name = "last_improvement" if "last_improvement" in state else "risen_step"
        self.last_improvement = state[name]
        self.best_score, self.best = state["best_score"], state["best"]
        self.highest = state.get("highest", self.best_score)
        self.least = state.get("least", self.highest)
        self.spent, self._since = state["seconds"], time.perf_counter()
        if self.accelerator.scaler and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        # Older checkpoints hold no random state, which matters with dropout only.
        _set_random_state(state.get("random", {}))

    @property
    def should_stop(self) -> bool:
        """True where validation accuracy has not risen for `patience` evaluations."""
        waited = (self.step - self.last_improvement) // self.config.eval_every
        return self.config.patience > 0 and waited >= self.config.patience

    @property
    def is_checkpointable(self) -> bool:
        """False in the middle of an accumulation: the gradients so far are no part of `state`."""
        return self.step % self.config.gradient_accumulation == 0

    def remaining(self) -> Iterator[dict[str, float]]:
        """Train step by step; yield the losses of each step, with `val/accuracy` after an evaluation."""
        config = self.config
        batches = progress(self.batches(), "generator", total=config.steps - self.step)
        pieces = weighted_pieces(batches, config.gradient_accumulation, self._counts)
        while self.step < config.steps and not self.should_stop:
            metrics = self.advance(*next(pieces))
            if self.step % config.eval_every == 0 or self.step == config.steps:
                metrics |= evaluate(self.generator, self.data, self.lora_model, "val")
                self.keep_if_good(metrics["val/accuracy"], metrics["val/accuracy_error"])
            yield metrics

    def run(
        self,
        report: Report = _always,
        checkpoint: Callable[[State], None] = _nothing,
        checkpoint_seconds: float = math.inf,
    ) -> Outcome:
        """Train to the end. Besides evaluations, every `checkpoint_seconds` call `checkpoint`; else as `train`."""
        saved_at = time.perf_counter()
        for metrics in self.remaining():
            if not report(self.step, metrics):
                break
            due = "val/accuracy" in metrics or time.perf_counter() - saved_at >= checkpoint_seconds
            if due and self.is_checkpointable:
                checkpoint(self.state())
                saved_at = time.perf_counter()
        if self.best:
            self.generator.load_state_dict(self.best)
        return Outcome(
            self.generator.eval(), self.best_step, self.best_score, self.step, self.seconds
        )


def train(
    config: TrainingConfig,
    data: ExperimentData,
    lora_model: FunctionalLoRA,
    report: Report = _always,
    checkpoint: Callable[[State], None] = _nothing,
    state: State | None = None,
) -> Outcome:
    """Train a generator; return the one that trained longest among the best by validation accuracy.

    Each step calls `report(step, metrics)` with its losses; False ends the run. Every `eval_every` steps the metrics
    hold `val/accuracy` and `val/delta_cosine` too, and `checkpoint(state)` is called after the report. Pass such a
    `state` to resume. The same config, data and machine give the same numbers (float32 on the CPU: the same bits).
    Raises FloatingPointError when the loss is not finite.
    """
    trial = Trial(config, data, lora_model)
    if state is not None:
        trial.restore(state)
    return trial.run(report, checkpoint)
