"""Training K teachers at once beside PEFT, one after another: same base, data, start, optimiser and final losses.

    python benchmarks/bench_teachers.py                        # K = 48 on the nano base
    python benchmarks/bench_teachers.py --adapters 8 --steps 10

The PEFT side is a plain loop: a fresh LoRA on the base, the library's own loss from `labels`, Adam with the same cosine
decay. Losses and gradients at the start agree to 1e-5, the losses at the end to 1e-3 (Adam divides small gradients by
themselves, so that rounding grows with the steps). The last line of standard output is one JSON object; see
`record.py`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peers import SETTINGS, peft_flat
from record import environment, save
from timing import check_same, interleave
from torch import Tensor

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import Base
from llgbm.models.pretrain import make_tokenizer, new_model
from llgbm.models.scoring import adapter_losses
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.train import (
    Pupil,
    TeacherConfig,
    adam_with_decay,
    example_source,
    shared_initial_a,
    train_teachers,
)

FINAL_TOLERANCE = 1e-3
Source = Callable[[int], EncodedPairs]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("toy", "nano", "micro", "wide"), default="nano")
    parser.add_argument("--adapters", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a toy size; says nothing but that it runs"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.size, options.adapters, options.steps, options.repeats = "toy", 2, 2, 2
    return options


def make_base(size: str) -> Base:
    """A base with random weights and the suite's tokenizer, frozen."""
    tokenizer = make_tokenizer(SyntheticSuite().vocabulary)
    model = new_model(SETTINGS[size][0], tokenizer, seed=0)
    return Base(model.eval().requires_grad_(False), tokenizer, "random", "random")


def make_source(base: Base, config: TeacherConfig, adapters: int) -> Source:
    """Examples by step, adapter-major, each step's encoded once (both sides read the same tensors)."""
    suite = SyntheticSuite()
    tasks = [suite.split.tasks[index % len(suite.split.tasks)] for index in range(adapters)]
    pupils = [Pupil(task, index) for index, task in enumerate(tasks)]
    at = example_source(suite, base, pupils, replace(config, per_task=adapters))
    steps = [at(step) for step in range(config.steps)]
    return steps.__getitem__


def fresh_peft(base: Base, spec: LoraSpec, seed: int) -> Any:
    """The base with one adapter that starts where ours do."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank, lora_alpha=int(spec.alpha), target_modules=list(spec.target_modules)
    )
    model = get_peft_model(copy.deepcopy(base.model), config, adapter_name="own")
    for name, a_RI in shared_initial_a(spec, seed).items():
        model.base_model.model.get_submodule(name).lora_A["own"].weight.data.copy_(a_RI)
    return model


def own_texts(texts: EncodedPairs, index: int, count: int) -> EncodedPairs:
    """One adapter's texts, cut to the longest of them."""
    return texts.select(slice(index * count, (index + 1) * count))


def peft_loss(model: Any, texts: EncodedPairs) -> Tensor:
    """The library's own mean cross-entropy of the answer tokens."""
    ids, targets = texts.input_ids_ST, texts.targets_ST
    labels = torch.cat([torch.full_like(targets[:, :1], -100), targets], dim=1)
    padded = torch.cat([ids, ids[:, -1:]], dim=1)  # the library shifts labels by one
    return model(input_ids=padded, labels=labels, use_cache=False).loss


def train_peft(base: Base, spec: LoraSpec, config: TeacherConfig, source: Source) -> Tensor:
    """Train the adapters one after another: their values [A, V]."""
    found = []
    for index in range(len(source(0)) // config.examples):
        model = fresh_peft(base, spec, config.seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, schedule = adam_with_decay(parameters, config)
        for step in range(config.steps):
            loss = peft_loss(model, own_texts(source(step), index, config.examples))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        found.append(peft_flat(model, spec, "own"))
    return torch.stack(found)


def check_start(base: Base, spec: LoraSpec, config: TeacherConfig, source: Source) -> float:
    """Compare losses and gradients on the first step's texts, at adapters whose B is not zero (A has a gradient)."""
    generator = torch.Generator().manual_seed(3)
    n = len(source(0)) // config.examples
    values_AV = (0.05 * torch.randn(n, spec.n_values, generator=generator)).requires_grad_()
    ours_A = adapter_losses(base.model, spec, LoraBatch.unflatten(spec, values_AV), source(0))
    ours_A.sum().backward()
    assert values_AV.grad is not None
    model, worst = fresh_peft(base, spec, config.seed), 0.0
    for index in range(n):
        set_values(model, spec, values_AV[index].detach())
        model.zero_grad(set_to_none=True)
        loss = peft_loss(model, own_texts(source(0), index, config.examples))
        loss.backward()
        worst = max(worst, check_same("losses at the start", loss, ours_A[index]))
        worst = max(
            worst,
            check_same("gradients", peft_flat(model, spec, "own", True), values_AV.grad[index]),
        )
    return worst


def set_values(model: Any, spec: LoraSpec, values_V: Tensor) -> None:
    from peers import set_peft_values

    with torch.no_grad():
        set_peft_values(model, spec, "own", values_V)


def final_losses(base: Base, spec: LoraSpec, values_AV: Tensor, texts: EncodedPairs) -> Tensor:
    """Losses [A] of trained adapters on the last step's texts."""
    with torch.no_grad():
        return adapter_losses(base.model, spec, LoraBatch.unflatten(spec, values_AV), texts)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    base = make_base(options.size)
    config = TeacherConfig(steps=options.steps)
    spec = LoraSpec.from_model(base.model, config.rank, config.alpha)
    source = make_source(base, config, options.adapters)
    started = check_start(base, spec, config, source)
    last = source(config.steps - 1)
    ours_A = final_losses(
        base, spec, train_teachers(base, spec, config, source).flatten(spec), last
    )
    peft_A = final_losses(base, spec, train_peft(base, spec, config, source), last)
    ended = check_same("final losses", ours_A, peft_A, FINAL_TOLERANCE)
    runs = {
        "ours": partial(train_teachers, base, spec, config, source),
        "peft_in_turn": partial(train_peft, base, spec, config, source),
    }
    timings = interleave(runs, options.repeats)
    ratio = timings["peft_in_turn"].median_s / timings["ours"].median_s
    cpu = {name: statistics.median(timing.cpu_s) for name, timing in timings.items()}
    result = {
        "benchmark": "teachers",
        "config": vars(options),
        "environment": environment("torch", "transformers", "peft"),
        "relative_difference": {"start": started, "final_losses": ended},
        "final_loss": ours_A.mean().item(),
        "sides": {name: timing.as_dict() for name, timing in timings.items()},
        "over_ours": ratio,
        "cpu_over_ours": cpu["peft_in_turn"] / cpu["ours"],
        "ratios": {f"{options.size} K={options.adapters} peft_in_turn": ratio},
    }
    save("teachers_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
