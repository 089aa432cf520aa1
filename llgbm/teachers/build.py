"""Build a bank of teachers for a suite, and the multi-task LoRA.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, product, repeat
from pathlib import Path

from torch import Tensor

from llgbm.lora.adapters import (
    LoraBatch,
    LoraSpec,
    adapter_config,
    load_adapter,
    write_adapter_files,
)
from llgbm.models.cost import HEADROOM, BaseShape, pass_bytes
from llgbm.models.encoding import EncodedPairs, example_prompt
from llgbm.models.load import Base
from llgbm.models.reading import suite_accuracy
from llgbm.models.scoring import encode_examples
from llgbm.runtime import UserError, content_hash, free_memory, progress, say, stream_seed
from llgbm.system.cache import build_entry, entry_is_whole
from llgbm.system.output import check_name
from llgbm.tasks.suite import Example, Suite
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.bank import Bank
from llgbm.teachers.rounds import GATE_EXAMPLES, Classroom
from llgbm.teachers.train import (
    TEACHERS_VERSION,
    Pupil,
    Run,
    SFTConfig,
    TeacherConfig,
    condition_prompts,
    train_teachers,
)
from llgbm.teachers.writer import BankWriter, NewAdapter, check_bank_address

# Examples of each task that the base alone is measured on: one number, over all tasks.
BASE_EXAMPLES = 32


def bank_key(base_hash: str, suite: Suite, config: TeacherConfig) -> str:
    """Name of a bank in the cache."""
    parts: list[str] = []
    if config.per_task > 1 and isinstance(suite, SyntheticSuite):
        parts.append("own prompts")  # Teachers of one of its tasks had the same prompts before.
    return content_hash("bank", TEACHERS_VERSION, base_hash, suite, config, *parts)


def build_bank(root: Path, base: Base, suite: Suite, config: TeacherConfig) -> Bank:
    """Train the bank of a suite, or find it: named by base, suite, config and the version of this code."""
    spec = config.spec_of(base.model)
    key = bank_key(base.hash, suite, config)

    def write(folder: Path) -> None:
        target = BankWriter(folder, base, spec, {"method": "cache", "key": key})
        target.start()
        pupils = pupils_of(suite.split.tasks, config)
        classroom = Classroom(base, spec, config, suite)
        kept = _with_default_trajectories(root, base, suite, config, spec)
        if kept is None:
            found = classroom.train(pupils)
            below = len(classroom.laggards(found))
            told = [{"rounds": rounds} for rounds in found.rounds]
            states = found.adapters.to_state_dicts()
        else:
            below = int(kept.facts.get("teachers_below_target", 0))
            told = [{} for _ in pupils]
            states = kept.load().to_state_dicts()
        trained = []
        for pupil, state, facts in zip(pupils, states, told, strict=True):
            prompts = condition_prompts(suite, pupil.task, config, (pupil.number, config.per_task))
            trained.append(NewAdapter(pupil.name, pupil.task, state, prompts, facts))
        target.add(trained)
        gate = {"teachers_below_target": float(below)}
        _measure(target, suite, config, gate if config.target else {})

    return Bank.cached(build_entry(root, "banks", key, write), spec)


def pupils_of(tasks: Sequence[str], config: TeacherConfig) -> list[Pupil]:
    """List `config.per_task` teachers to be for each task."""
    return [Pupil(*own) for own in product(tasks, range(config.per_task))]


def _with_default_trajectories(
    root: Path, base: Base, suite: Suite, config: TeacherConfig, spec: LoraSpec
) -> Bank | None:
    """Find the same teachers in the cached bank with trajectories by default, if there is one."""
    plain = replace(
        config,
        trajectories=TeacherConfig.trajectories,
        max_tokens=TeacherConfig.max_tokens,
    )
    folder = root / "banks" / bank_key(base.hash, suite, plain)
    if plain == config or not entry_is_whole(folder):
        return None
    say("its teachers are those of a cached bank: they only answer other prompts")
    return Bank.cached(folder, spec)


def _measure(
    target: BankWriter,
    suite: Suite,
    config: TeacherConfig,
    known: Mapping[str, float] | None = None,
) -> None:
    """Finish the bank of a suite (`per_task` adapters a task) with the accuracy and the answers of its teachers."""
    base, tasks = target.base, suite.split.tasks
    ids = [pupil.name for pupil in pupils_of(tasks, config)]
    # Teachers that passed a gate are measured as closely, since the gate picks the lucky.
    n_examples = min(GATE_EXAMPLES if config.target else 32, suite.available("evaluation"))
    by_task = [suite.examples(t, "evaluation", n_examples, "teacher accuracy") for t in tasks]
    examples = list(chain.from_iterable(repeat(own, config.per_task) for own in by_task))
    owners = list(chain.from_iterable(repeat(task, config.per_task) for task in tasks))
    accuracy_A = suite_accuracy(base, suite, owners, examples, (target.spec, target.load(ids)))
    few = [own[:BASE_EXAMPLES] for own in by_task]
    base_accuracy_A = suite_accuracy(base, suite, tasks, few)
    facts = {
        **(known or {}),
        "teacher_accuracy": accuracy_A.mean().item(),
        "worst_teacher_accuracy": accuracy_A.min().item(),
        "base_accuracy": base_accuracy_A.mean().item(),
    }
    accuracy = dict(zip(ids, accuracy_A.tolist(), strict=True))
    asked = {}
    for task in tasks:
        own = suite.examples(task, "train", config.trajectories, "trajectory", (0, config.per_task))
        asked[task] = [example_prompt(base.tokenizer, e) for e in own]
    target.finish(ids, asked, {"facts": facts, "accuracy": accuracy}, config.max_tokens)


def make_bank(base: Base, suite: Suite, config: SFTConfig, out: Path) -> Bank:
    """Train the adapters of the suite's tasks that are missing or torn in `out`, measure all, and open the bank.

    Raises UserError for a folder that holds something else, and for a loss that is not finite.
    """
    from llgbm.teachers.peft import _train_with_peft

    out = check_bank_address(out).path
    teachers = config.teachers
    spec = teachers.spec_of(base.model)
    target = BankWriter(out, base, spec, {**config.settings, "data": suite.fingerprint})
    runs = []
    for task in suite.split.tasks:
        runs += [Run(task, subset, config, suite, base) for subset in range(config.subsets)]
    for run in runs:
        _check_run(run)
    with target.opened():
        open_runs = [run for run in runs if target.missing(run.adapter_ids)]
        if open_runs:
            done = len(runs) - len(open_runs)
            say(f"{done} of {len(runs)} runs are done; {len(open_runs)} to go")
            target.reopen()
            train = _train_with_peft if config.method == "peft" else _train_batched
            train(target, open_runs)
        if not target.is_finished:
            _measure(target, suite, teachers)
    return Bank.open(out, base)


def _check_run(run: Run) -> None:
    """Raise UserError, before anything is trained, for a run whose dataset has too few rows or no fit name."""
    for adapter_id in run.adapter_ids:
        check_name(adapter_id, "the adapter")
    rows = run.suite.available("train")
    if run.config.subsets > rows:
        raise UserError(
            f"{run.config.subsets} runs a dataset read rows that do not overlap, and the smallest dataset has {rows} "
            "rows to train on: use fewer subsets or more rows"
        )
    _ = run.prompts


def _train_batched(target: BankWriter, runs: Sequence[Run]) -> None:
    """Groups of runs at once. A group that was killed is trained again, those before it stay."""
    at_once = runs[0].config.at_once or _that_fit(target, runs[0])
    groups = [runs[i : i + at_once] for i in range(0, len(runs), at_once)]
    for group in progress(groups, f"groups of {at_once} runs", total=len(groups)):
        batch = train_teachers(
            target.base, target.spec, group[0].config.teachers, _together(group, target.base)
        )
        states = batch.to_state_dicts()
        target.add([run.adapter(state) for run, state in zip(group, states, strict=True)])


def _together(runs: Sequence[Run], base: Base) -> Callable[[int], EncodedPairs]:
    sources = [run.examples_at() for run in runs]
    return lambda step: encode_examples(base, list(chain.from_iterable(at(step) for at in sources)))


def _that_fit(target: BankWriter, run: Run) -> int:
    """Count the runs that fit into free memory at once. Raises UserError for none."""
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
    key = content_hash("multitask", MULTITASK_VERSION, TEACHERS_VERSION, base.hash, suite, recipe)

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
