"""One LoRA for all training tasks together: the baseline that adapts to no task and that a generator must beat.

It is trained by the teachers' recipe (rank, learning rate, decay, loss on the answer) on a mixture of the training
tasks, and knows a task from the prompt alone. Letters: V values of an adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llgbm.cache import build_entry
from llgbm.encoding import EncodedPairs
from llgbm.lora import LoraBatch, LoraSpec, adapter_config, load_adapter, write_adapter_files
from llgbm.models import Base
from llgbm.runtime import content_hash, stream_seed
from llgbm.suites import Example, Suite
from llgbm.teachers import VERSION as TEACHERS_VERSION
from llgbm.teachers import TeacherConfig, encode_examples, train_teachers

VERSION = 1
EXAMPLES_A_STEP = 32
STEPS_OVER_TEACHER = 4


def build_multitask(root: Path, base: Base, suite: Suite, config: TeacherConfig, spec: LoraSpec) -> Tensor:
    """Train the adapter, or find it: its values [V]. It has the rank, alpha and target modules of `spec`."""
    settings = adapter_config(spec, base.path)
    recipe = (config, spec.rank, spec.alpha, spec.target_modules, EXAMPLES_A_STEP, STEPS_OVER_TEACHER)
    key = content_hash("multitask", VERSION, TEACHERS_VERSION, base.hash, suite.fingerprint, recipe)

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
