"""Run the training steps of the tree on PYTHONPATH for `bench_train_step.py`: questions on stdin, answers on stdout.

It relies on few names, which are looked up where ecb2f2d has them, then where the later layout has them.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timing import matrix_flops, matrix_rate
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from llgbm.dataset import ExperimentData
from llgbm.delta import DeltaTable, EncodedProbes
from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.training import MultiTaskLoss, TrainingConfig


def found(name: str, *modules: str) -> Any:
    """The object of that name in the first of these modules that has it."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


ConditionPools = found("ConditionPools", "llgbm.generator.conditions", "llgbm.conditions")
EncodedPairs = found("EncodedPairs", "llgbm.models.encoding", "llgbm.encoding")
LoraBatch = found("LoraBatch", "llgbm.lora", "llgbm.lora.adapters")
Trial = found("Trial", "llgbm.training")


def make_trial(setting: dict[str, Any]) -> Any:
    """The default training on a made-up bank."""
    model = Qwen2ForCausalLM(Qwen2Config(**setting["config"]))
    model.load_state_dict(setting["weights"])
    lora_model = FunctionalLoRA(nn.Module.eval(model), setting["rank"], 2.0 * setting["rank"])
    probes = EncodedProbes(setting["ids_APT"], setting["positions_APQ"], setting["valid_APQ"])
    table = DeltaTable(probes, setting["base_APQD"], setting["delta_APQD"])
    pool = setting["train_ANC"]
    generator = torch.Generator().manual_seed(setting["seed"])
    n, ids = len(pool), setting["ids_APT"][:, 0]
    tasks = tuple(f"task{index}" for index in range(n))
    known: dict[str, Any] = {
        "adapter_ids": tasks,
        "tasks": tasks,
        "families": tasks,
        "rows": {"train": tuple(range(n)), "val": (), "test": ()},
        "values_AV": 0.05 * torch.randn(n, lora_model.spec.n_values, generator=generator),
        "multitask_V": torch.zeros(lora_model.spec.n_values),
        "conditions": ConditionPools(pool, pool[:, :16], pool[0]),
        "loss_deltas": table,
        "shared_deltas": table,
        "generic_deltas": table,
        "examples": EncodedPairs(ids, ids),
        "n_examples": 1,
        "encoder": "random",
        "encoder_hash": "random",
        "hash": "random",
    }
    names = [field.name for field in fields(ExperimentData) if field.name in known]
    data = ExperimentData(**{name: known[name] for name in names})
    config = replace(TrainingConfig(), steps=100_000, eval_every=100_000)
    return Trial(config, data, lora_model)


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor seconds, seconds by the clock, and what the run gives."""
    started, clock = time.process_time(), time.perf_counter()
    value = run()
    return time.process_time() - started, time.perf_counter() - clock, value


def check(trial: Any, batch: dict[str, torch.Tensor], path: str) -> dict[str, Any]:
    """Losses of one batch; its gradients go to a file."""
    terms = trial.compute_loss(batch)
    terms["loss"].backward()
    gradients = [p.grad.flatten() for p in trial.generator.parameters()]
    torch.save(torch.cat(gradients), path)
    trial.generator.zero_grad(set_to_none=True)
    ends = batch["positions"].amax(-1) + 1
    padding = 1 - ends.float().mean() / ends.max()
    return {"losses": [terms[name].item() for name in sorted(terms)], "padding": padding.item()}


def run_parts(trial: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Processor seconds of the parts of a step, each by itself."""
    generator = trial.generator

    def weight_part() -> torch.Tensor:
        tokens = generator(batch["condition"])
        loss = MultiTaskLoss(1.0, 0.0)(tokens_pred=tokens, tokens_teacher=batch["tokens"])
        loss["loss"].backward()
        return tokens.detach()

    generator_s, _, tokens = seconds(weight_part)
    optimiser_s, _, _ = seconds(
        lambda: (trial.optimizer.step(), trial.optimizer.zero_grad(set_to_none=True))
    )
    tokens.requires_grad_()
    width = int(batch["positions"].max()) + 1
    marks = int(batch["valid"].sum(-1).max())
    probes = EncodedProbes(
        batch["probe_ids"][..., :width],
        batch["positions"][..., :marks],
        batch["valid"][..., :marks],
    )
    base = batch["base_states"][..., :marks, :]
    attribute = "lora_model" if hasattr(trial, "lora_model") else "flora"  # the name up to ecb2f2d
    lora_model = getattr(trial, attribute)

    def delta_part() -> None:
        compute_delta_differentiable(
            lora_model, generator.to_lora(tokens), probes, base
        ).sum().backward()

    delta_s, _, _ = seconds(delta_part)
    return {"generator_cpu_s": generator_s, "optimiser_cpu_s": optimiser_s, "delta_cpu_s": delta_s}


def block(trial: Any, batches: Iterator[dict[str, torch.Tensor]], steps: int) -> dict[str, float]:
    """Seconds a step of several steps, then of the parts of one more."""
    step_cpu = step_wall = draw_cpu = 0.0
    for _ in range(steps):
        cpu, wall, batch = seconds(lambda: next(batches))
        draw_cpu, step_cpu, step_wall = draw_cpu + cpu, step_cpu + cpu, step_wall + wall
        cpu, wall, _ = seconds(lambda batch=batch: trial.advance(batch))
        step_cpu, step_wall = step_cpu + cpu, step_wall + wall
    each = {"step_cpu_s": step_cpu, "step_wall_s": step_wall, "draw_cpu_s": draw_cpu}
    return {
        **{name: value / steps for name, value in each.items()},
        **run_parts(trial, next(batches)),
    }


def products(trial: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """FLOPs of the matrix products of a step, and the seconds that they take at least on this process's threads."""
    flops, rate = matrix_flops(lambda: trial.advance(batch)), matrix_rate()
    return {"step_gflop": flops / 1e9, "matrix_gflops": rate / 1e9, "products_s": flops / rate}


def main() -> None:
    setting_file, tree = sys.argv[1:]
    used = Path(sys.modules["llgbm.functional"].__file__ or "")
    if not used.is_relative_to(tree):
        sys.exit(f"{used} is not of the tree {tree}")
    setting = torch.load(setting_file)
    torch.manual_seed(0)
    trial = make_trial(setting)
    batches = iter(trial.batches())
    first = next(batches)
    batches = chain([first], batches)
    for line in sys.stdin:
        question = json.loads(line)
        if "check" in question:
            answer = check(trial, first, question["check"])
        elif "steps" in question:
            answer = block(trial, batches, question["steps"])
        elif "products" in question:
            answer = products(trial, next(batches))
        else:
            answer = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
