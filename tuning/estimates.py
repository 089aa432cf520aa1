"""`--estimate`: what a study will cost, as a table; no base is built or loaded, no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from llgbm.banks import read_manifest
from llgbm.conditions import make_encoder
from llgbm.cost import BaseShape
from llgbm.delta import encode_probes
from llgbm.encoding import chat_prompt, encode_pairs
from llgbm.estimate import TrialEstimate, estimate_trial, human
from llgbm.lora import LoraSpec
from llgbm.models import DTYPES, Base, find_model, make_tokenizer, model_size, new_model, weightless_model
from llgbm.probes import create_generic_probes
from llgbm.training import TrainingConfig
from llgbm.world import WorldConfig
from tuning.space import TrialSpec
from tuning.studies import Study

MINILM_WIDTH = 384
EXAMPLES_LOOKED_AT = 4


def estimate_study(study: Study) -> str:
    """A line a configuration (parameters, FLOPs, memory of a trial), then the world and the sum, for people.

    Raises UserError for a base that is not on this machine, or of another kind than Qwen2 and Llama.
    """
    trials = list(study.trials) or ([study.space.base] if study.space else [])
    worlds = {world.hash: WorldSketch(world) for world in study.worlds}
    found = [(trial, worlds[trial.world.hash].estimate(trial.config)) for trial in trials]
    total = sum(estimate.flops for _, estimate in found)
    building = sum(world.teacher_flops for world in worlds.values())
    return "\n".join(
        (
            _table(found),
            f"training of {len(found)} trials: {human(total, 'FLOP')}; teachers of {len(worlds)} worlds: "
            f"{human(building, 'FLOP')}; evaluation and the making of a base are not counted",
            "memory is a trial's peak on its device, from formulas: leave a fifth of the device free",
        )
    )


def _table(found: list[tuple[TrialSpec, TrialEstimate]]) -> str:
    rows: dict[tuple[str, str], list[Any]] = {}
    for trial, estimate in found:
        key = (trial.name, str(trial.config.model_size))
        rows.setdefault(key, [*key, 0, *_cells(estimate)])[2] += 1
    memory = list(found[0][1].memory)
    headers = ["configuration", "base", "trials", "base params", "adapter", "generator", "FLOP a step", "FLOP a trial"]
    return tabulate(list(rows.values()), [*headers, *memory, "peak"], disable_numparse=True)


def _cells(estimate: TrialEstimate) -> list[str]:
    sizes = (estimate.base_parameters, estimate.adapter_values, estimate.generator_parameters)
    costs = (estimate.step_flops, estimate.flops)
    return [
        *(human(n) for n in (*sizes, *costs)),
        *(human(b, "B") for b in (*estimate.memory.values(), estimate.peak_bytes)),
    ]


class WorldSketch:
    """What of a world can be known without building it: a base without weights, a tokenizer, the length of texts."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.base, self.tokenizer = _base_without_weights(config)
        teachers, tasks = config.teachers, config.suite.split.tasks
        if config.bank is None:
            self.spec = LoraSpec.from_model(self.base, teachers.rank, teachers.alpha)
            self.n_teachers = teachers.per_task * len(tasks)
        else:
            found = read_manifest(Path(config.bank.path))
            self.spec = LoraSpec.from_model(self.base, found["rank"], found["alpha"], found["target_modules"])
            self.n_teachers = sum(entry["task"] in tasks for entry in found["adapters"].values())

    def estimate(self, config: TrainingConfig) -> TrialEstimate:
        """The cost of one training in this world."""
        return estimate_trial(
            config, self.base, self.spec, self.n_teachers, self.condition_width, self.probe_tokens(config)
        )

    @property
    def condition_width(self) -> int:
        name = self.config.encoder
        if name == "minilm":
            return MINILM_WIDTH
        if name == "base":
            return int(self.base.config.hidden_size)
        return make_encoder(name, Base(self.base, self.tokenizer, "", "")).width

    def probe_tokens(self, config: TrainingConfig) -> int:
        """Tokens of the longest probe; of trajectories, of the longest of a few examples a task."""
        if config.delta_probes == "trajectory":
            return self.example_tokens[0]
        if config.delta_probes == "generic":
            return encode_probes(self.tokenizer, create_generic_probes(), ["shared"]).ids_APT.shape[-1]
        asked = [chat_prompt(self.tokenizer, e.prompt, e.system) for e in self.config.suite.probe_examples]
        return max(len(ids) for ids in self.tokenizer(asked, add_special_tokens=False)["input_ids"])

    @property
    def example_tokens(self) -> tuple[int, int]:
        """Tokens of the longest example looked at, and of the longest answer."""
        suite = self.config.suite
        examples = [e for t in suite.split.tasks for e in suite.examples(t, "train", EXAMPLES_LOOKED_AT, "estimate")]
        pairs = [(chat_prompt(self.tokenizer, e.prompt, e.system), e.answer) for e in examples]
        targets = encode_pairs(self.tokenizer, pairs).targets_ST
        return targets.shape[1], int((targets >= 0).sum(1).max())

    @property
    def teacher_flops(self) -> float:
        """All steps of all teachers; none where the bank is there."""
        if self.config.bank is not None:
            return 0.0
        teachers, (tokens, answer) = self.config.teachers, self.example_tokens
        shape, texts = BaseShape.of(self.base, self.spec), self.n_teachers * teachers.examples
        passes = shape.forward_flops(texts, tokens) + shape.backward_flops(texts, tokens)
        return teachers.steps * (passes + shape.head_flops(texts * answer))


def _base_without_weights(config: WorldConfig) -> tuple[PreTrainedModel, Any]:
    if config.base is None:
        tokenizer = make_tokenizer(config.suite.vocabulary)
        with torch.device("meta"):
            return new_model(model_size(config.size), tokenizer, 0), tokenizer
    folder: Path = find_model(config.base.path, download=False)
    model = nn.Module.to(weightless_model(str(folder)), DTYPES[config.base.dtype])
    return model, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
