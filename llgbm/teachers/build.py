"""Build a bank of teachers for a suite, and the multi-task LoRA.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llgbm.cache import build_entry, write_json
from llgbm.lora.adapters import (
    LoraBatch,
    LoraSpec,
    adapter_config,
    load_adapter,
    write_adapter_files,
)
from llgbm.models.cost import HEADROOM, BaseShape, pass_bytes
from llgbm.models.encoding import EncodedPairs, chat_prompt
from llgbm.models.load import Base
from llgbm.models.scoring import base_accuracy, encode_examples, exact_match, greedy_answers
from llgbm.output import check_name
from llgbm.runtime import UserError, content_hash, free_memory, progress, say, stream_seed
from llgbm.tasks.suite import Example, Suite
from llgbm.teachers.bank import LISTING, Bank, BankFolder, check_bank_address, open_bank
from llgbm.teachers.train import (
    TEACHERS_VERSION,
    Run,
    SFTConfig,
    TeacherConfig,
    condition_prompts,
    example_source,
    train_teachers,
)


def bank_key(base_hash: str, suite: Suite, config: TeacherConfig) -> str:
    """The name of a bank in the cache."""
    return content_hash("bank", TEACHERS_VERSION, base_hash, suite.fingerprint, config)


def build_bank(root: Path, base: Base, suite: Suite, config: TeacherConfig) -> Bank:
    """Train the bank of a suite, or find it: named by base, suite, config and the version of this code."""
    spec = LoraSpec.from_model(base.model, config.rank, config.alpha)
    key = bank_key(base.hash, suite, config)

    def write(folder: Path) -> None:
        tasks = [task for task in suite.split.tasks for _ in range(config.per_task)]
        streams = [
            f"teacher {config.seed} {index % config.per_task}" for index in range(len(tasks))
        ]
        batch = train_teachers(
            base, spec, config, example_source(suite, base, tasks, streams, config)
        )
        _write_bank(folder, base, suite, config, tasks, batch, spec)

    return Bank.open(build_entry(root, "banks", key, write), spec, key)


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
    for index, (adapter_id, task, state) in enumerate(
        zip(ids, tasks, batch.to_state_dicts(), strict=True)
    ):
        own = (
            folder
            / "checkpoints"
            / check_name(task, "the task")
            / check_name(adapter_id, "the adapter")
        )
        own.mkdir(parents=True)
        write_adapter_files(own, state, settings)
        share = (index % config.per_task, config.per_task)
        (own / "prompts.json").write_text(json.dumps(condition_prompts(suite, task, config, share)))
    index_bank(folder, base, suite, config, batch, spec)


def index_bank(
    folder: Path, base: Base, suite: Suite, config: TeacherConfig, batch: LoraBatch, spec: LoraSpec
) -> None:
    """Measure the teachers of a suite, `per_task` a task in the order of its tasks; write trajectories and list."""
    tasks = [task for task in suite.split.tasks for _ in range(config.per_task)]
    ids = [f"{task}_{index % config.per_task}" for index, task in enumerate(tasks)]
    n_examples = min(32, suite.available("evaluation"))
    examples = [
        suite.examples(task, "evaluation", n_examples, "teacher accuracy") for task in tasks
    ]
    accuracy_A = exact_match(base, spec, batch, examples)
    facts = {
        "teacher_accuracy": accuracy_A.mean().item(),
        "worst_teacher_accuracy": accuracy_A.min().item(),
        "base_accuracy": base_accuracy(
            base, [e for own in examples[:: config.per_task] for e in own]
        ),
    }
    write_json(folder / "trajectories.json", _own_answers(base, suite, config, batch, spec))
    listing = {
        "adapters": dict(zip(ids, tasks, strict=True)),
        "facts": facts,
        "accuracy": dict(zip(ids, accuracy_A.tolist(), strict=True)),
    }
    write_json(folder / "bank.json", listing)


def _own_answers(
    base: Base, suite: Suite, config: TeacherConfig, batch: LoraBatch, spec: LoraSpec
) -> dict[str, list[tuple[str, str]]]:
    """Prompts of each task with its first teacher's greedy answers."""
    firsts = batch.select(slice(0, None, config.per_task))
    tasks = suite.split.tasks
    share = (0, config.per_task)
    own = [suite.examples(t, "train", config.trajectories, "trajectory", share) for t in tasks]
    prompts = [
        [chat_prompt(base.tokenizer, e.prompt, e.system) for e in examples] for examples in own
    ]
    answers = greedy_answers(base, spec, firsts, prompts)
    return {
        t: list(zip(p, a, strict=True)) for t, p, a in zip(tasks, prompts, answers, strict=True)
    }


def make_bank(base: Base, suite: Suite, config: SFTConfig, out: Path) -> Bank:
    """Train whatever adapter of the suite's tasks is missing or torn in `out`; measure them; give the bank.

    Raises UserError for a folder that holds something else, and FloatingPointError where a loss is not finite.
    """
    from llgbm.teachers.peft import _train_with_peft

    out = check_bank_address(out).path
    teachers = config.teachers
    spec = LoraSpec.from_model(base.model, teachers.rank, teachers.alpha)
    settings = {**config.settings, "data": suite.fingerprint}
    target = BankFolder(out, base, spec, settings)
    runs = [
        Run(task, k, config, suite, base)
        for task in suite.split.tasks
        for k in range(config.subsets)
    ]
    for adapter_id in (i for run in runs for i in run.adapter_ids):
        check_name(adapter_id, "the adapter")
    with target.opened():
        open_runs = [run for run in runs if target.missing(run.adapter_ids)]
        if open_runs:
            say(
                f"{len(runs) - len(open_runs)} of {len(runs)} runs are done; {len(open_runs)} to go"
            )
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


def _train_batched(target: BankFolder, runs: Sequence[Run]) -> None:
    """Groups of runs at once. A group that was killed is trained again, those before it stay."""
    at_once = runs[0].config.at_once or _that_fit(target, runs[0])
    groups = [runs[i : i + at_once] for i in range(0, len(runs), at_once)]
    for group in progress(groups, f"groups of {at_once} runs", total=len(groups)):
        batch = train_teachers(
            target.base, target.spec, group[0].config.teachers, _together(group, target.base)
        )
        for run, state in zip(group, batch.to_state_dicts(), strict=True):
            target.add(
                run.adapter_ids[0], run.task, state, run.prompts, run.facts(run.config.steps)
            )


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


MULTITASK_VERSION = 1
EXAMPLES_A_STEP = 32
STEPS_OVER_TEACHER = 4


def build_multitask(
    root: Path, base: Base, suite: Suite, config: TeacherConfig, spec: LoraSpec
) -> Tensor:
    """Train the adapter, or find it: its values [V]. It has the rank, alpha and target modules of `spec`."""
    settings = adapter_config(spec, base.path)
    recipe = (
        config,
        spec.rank,
        spec.alpha,
        spec.target_modules,
        EXAMPLES_A_STEP,
        STEPS_OVER_TEACHER,
    )
    key = content_hash(
        "multitask", MULTITASK_VERSION, TEACHERS_VERSION, base.hash, suite.fingerprint, recipe
    )

    def write(folder: Path) -> None:
        own = replace(config, steps=STEPS_OVER_TEACHER * config.steps, examples=EXAMPLES_A_STEP)
        batch = train_teachers(base, spec, own, mixture(suite, base, own))
        write_adapter_files(folder, batch.to_state_dicts()[0], settings)

    folder = build_entry(root, "multitask", key, write)
    return LoraBatch.from_state_dicts([load_adapter(folder, spec)]).flatten(spec)[0]


def mixture(suite: Suite, base: Base, config: TeacherConfig) -> Callable[[int], EncodedPairs]:
    """Encoded examples of the training tasks by step, each task as often as any other (to within one)."""
    tasks = suite.split.train
    rounds = -(-config.steps * config.examples // len(tasks))
    pools = [suite.examples(task, "train", rounds, f"multitask {config.seed}") for task in tasks]
    rng = random.Random(stream_seed("multitask", config.seed))
    mixed: list[Example] = []
    for once in zip(*pools, strict=True):
        mixed += rng.sample(once, len(once))

    def at(step: int) -> EncodedPairs:
        return encode_examples(base, mixed[step * config.examples : (step + 1) * config.examples])

    return at
