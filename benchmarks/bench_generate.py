"""From a new task's prompts to an adapter on disk, beside training a teacher that is as accurate.

    python benchmarks/bench_generate.py                        # the nano world, a generator of 600 steps

For every test task: encode its prompts, generate, write a PEFT folder, timed together. Then a LoRA is trained on the
task's examples, alone and through PEFT, until its exact match reaches the generated adapter's (looked at every
`--every` steps, which is not timed). A teacher needs labelled examples, a generator does not; `reached` counts the
tasks whose teacher got there within `--limit` steps. The last line of standard output is one JSON object; see
`record.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_teachers import fresh_peft, peft_loss
from peers import peft_flat
from record import environment, save
from timing import peak_memory, spread
from torch import Tensor

from llgbm.evaluation.metrics import accuracy_per_adapter
from llgbm.generator import LoraGenerator
from llgbm.generator.conditions import TextEncoder, make_encoder
from llgbm.lora import LoraBatch
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.teachers.train import Pupil, adam_with_decay, example_source
from llgbm.training import TrainingConfig, train
from llgbm.world import World, WorldConfig, build_world

ROOT = Path(__file__).parents[1]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("nano", "micro"), default="nano")
    parser.add_argument("--steps", type=int, default=600, help="of the generator's training")
    parser.add_argument("--tasks", type=int, default=8, help="test tasks, at most")
    parser.add_argument("--repeats", type=int, default=7, help="generations a task")
    parser.add_argument("--every", type=int, default=5, help="steps between two looks at a teacher")
    parser.add_argument("--limit", type=int, default=150, help="steps that a teacher gets at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".llgbm",
        help="where the world is kept, built if absent",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smoke world; says nothing but that it runs"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.tasks, options.repeats, options.limit = 4, 2, 2, 10
    return options


def make_world(options: argparse.Namespace) -> World:
    """The world of a size, or the toy one."""
    config = WorldConfig(size=options.size)
    if options.quick:
        from llgbm.world import smoke_world

        config = smoke_world(config)
    return build_world(options.cache, config, "cpu")


def generate(
    world: World, generator: LoraGenerator, encoder: TextEncoder, row: int, folder: Path
) -> LoraBatch:
    """Prompts to a PEFT folder."""
    prompts = world.bank.prompts(world.data.adapter_ids[row])["evaluation"]
    batch = generator.generate(encoder.encode(prompts)[None])
    save_adapter(folder, batch.to_state_dicts()[0], adapter_config(generator.spec, world.base.path))
    return batch


def time_generation(
    world: World, generator: LoraGenerator, encoder: TextEncoder, row: int, repeats: int
) -> tuple[list[float], LoraBatch]:
    """Seconds of several generations of one adapter, and the adapter."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            started = time.perf_counter()
            batch = generate(world, generator, encoder, row, Path(folder) / str(repeat))
            found.append(time.perf_counter() - started)
    return found, batch


def accuracy(world: World, values_V: Tensor, row: int) -> float:
    """Exact match of a flat adapter on the evaluation examples of a task."""
    batch = LoraBatch.unflatten(world.lora_model.spec, values_V[None])
    return accuracy_per_adapter(world.lora_model, batch, world.data, [row]).item()


def time_teacher(
    world: World, row: int, wanted: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds and steps that training a PEFT LoRA takes until its accuracy is `wanted`, and whether it got there."""
    spec, task = world.lora_model.spec, world.data.tasks[row]
    config = replace(world.config.teachers, steps=options.limit, per_task=1)
    source = example_source(world.config.suite, world.base, [Pupil(task, 0)], config)
    model = fresh_peft(world.base, spec, config.seed)
    optimizer, schedule = adam_with_decay(
        [p for p in model.parameters() if p.requires_grad], config
    )
    spent, step, reached = 0.0, 0, 0.0
    while step < options.limit and reached < wanted:
        started = time.perf_counter()
        for _ in range(options.every):
            loss = peft_loss(model, source(step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        spent += time.perf_counter() - started
        reached = accuracy(world, peft_flat(model, spec, "own"), row)
    return {"seconds": spent, "steps": step, "accuracy": reached, "reached": reached >= wanted}


def measure(
    world: World, generator: LoraGenerator, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both ways to an adapter, task by task, in turn."""
    encoder = make_encoder(world.config.encoder, world.base)
    rows = list(world.data.rows["test"])[: options.tasks]
    time_generation(world, generator, encoder, rows[0], 1)
    time_teacher(world, rows[0], 2.0, argparse.Namespace(limit=options.every, every=options.every))
    found = []
    for row in rows:
        seconds, batch = time_generation(world, generator, encoder, row, options.repeats)
        reached = accuracy(world, batch.flatten(world.lora_model.spec)[0], row)
        teacher = time_teacher(world, row, reached, options)
        facts = {"task": world.data.tasks[row], "generated_accuracy": reached}
        found.append(
            facts
            | {
                "seconds": statistics.median(seconds),
                "spread": spread(tuple(seconds)),
                "teacher": teacher,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    world = make_world(options)
    config = replace(
        TrainingConfig(),
        n_prompts=4 if options.quick else 16,
        model_size=options.size,
        steps=options.steps,
        eval_every=max(1, options.steps // 6),
    )
    outcome = train(config, world.data, world.lora_model)
    tasks = measure(world, outcome.generator, options)
    encoder, row = make_encoder(world.config.encoder, world.base), world.data.rows["test"][0]
    with tempfile.TemporaryDirectory() as folder:
        peak = peak_memory(
            lambda: generate(world, outcome.generator, encoder, row, Path(folder) / "one")
        )
    reached = [task for task in tasks if task["teacher"]["reached"]]
    ratios = [task["teacher"]["seconds"] / task["seconds"] for task in reached]
    result = {
        "benchmark": "generate",
        "config": vars(options),
        "environment": environment("torch", "transformers", "peft", "sentence-transformers"),
        "seconds": statistics.median(task["seconds"] for task in tasks),
        "peak_mb": peak / 1e6,
        "reached": len(reached),
        "teacher_over_generated": statistics.median(ratios) if ratios else None,
        "generator_training_s": outcome.seconds,
        "results": tasks,
    }
    save("generate_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
