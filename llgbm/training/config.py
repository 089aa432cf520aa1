"""Configuration of a trial.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from llgbm.generator import generator_code, needs_tokens, settled
from llgbm.generator.conditioning import Conditioning
from llgbm.generator.networks import GeneratorConfig
from llgbm.losses import DELTA_LOSSES, check_lambdas
from llgbm.models.load import OWN_PREFIX, SIZES, family_size
from llgbm.runtime import UserError, content_hash
from llgbm.terms.names import NAMED
from llgbm.terms.registry import Objective, make_term, split_weights, used_options

DELTA_PROBES = ("trajectory", "generic", "domain")
PRECISIONS = ("no", "fp16", "bf16")
# Counts of a configuration, and the least that each may be.
COUNTS = {
    "steps": 1,
    "batch_size": 1,
    "n_prompts": 1,
    "n_prompts_min": 0,
    "prompt_tokens": 0,
    "n_probes": 1,
    "gradient_accumulation": 1,
    "eval_every": 1,
    "probe_chunk": 0,
    "patience": 0,
    "n_tasks": 0,
    "n_teachers": 0,
    "n_trajectories": 0,
}
DELTA_READINGS = ("per_probe", "mean")
# Options of terms that a configuration has fields for.
OPTION_FIELDS = {"delta.loss": "delta_loss", "delta.reading": "delta_reading"}


@dataclass(frozen=True)
class TrainingConfig:
    """Configuration of a trial: everything that its numbers depend on, apart from the data.

    `use_small_model` picks the smaller or the larger size of `model_family` (`embedded`: nano, micro; `qwen2.5`: 0.5B,
    1.5B) where no `model_size` is given. A user's own base is a size called `base-…`.

    `activation_checkpointing` and `probe_chunk` (probes per pass, 0 for all) trade time for memory and change no
    gradient.

    Of each sample `n_prompts` prompts are read, or where `n_prompts_min` is above 0 a number drawn from there up. The
    `condition` of a task is its `prompts`, its `description` or `both`: a vector of each text, or with `prompt_tokens`
    the states of at most so many tokens of it.

    `mixup` is the number of mixtures of two teachers that are trained on, for each teacher (`llgbm.training.mixup`).

    Above 0, `n_tasks`, `n_teachers` and `n_trajectories` limit the training tasks, the teachers of each, and the
    trajectories of a teacher, where a world has more (`llgbm.training.subset`).

    `terms` holds the weights of loss terms by name, `term_options` their options as `<term>.<option>`. The weights of
    the terms `weight` and `delta` are kept in `lambda_weight` and `lambda_delta`. `plugin_code` follows from terms and
    generator: what they are of other packages.
    """

    lambda_weight: float = 0.3
    lambda_delta: float = 1.0
    seed: int = 0
    use_small_model: bool = field(default=True, compare=False)
    model_family: str = field(default="embedded", compare=False)
    model_size: str | None = None
    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    n_prompts: int = 16
    n_probes: int = 2
    delta_probes: str = "trajectory"
    delta_loss: str = "cosine_norm"
    delta_reading: str = "per_probe"
    gradient_accumulation: int = 1
    mixed_precision: str = "no"
    activation_checkpointing: bool = False
    probe_chunk: int = 0
    eval_every: int = 100
    patience: int = 0
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    terms: Mapping[str, float] = field(default_factory=dict, hash=False)
    term_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    plugin_code: Mapping[str, str] = field(default_factory=dict, hash=False)
    n_prompts_min: int = 0
    condition: str = Conditioning.kind
    prompt_tokens: int = Conditioning.tokens
    mixup: float = 0.0
    n_tasks: int = 0
    n_teachers: int = 0
    n_trajectories: int = 0

    def __post_init__(self) -> None:
        self._settle_terms()
        object.__setattr__(self, "generator", settled(self.generator))
        if self.model_size is None:
            object.__setattr__(
                self, "model_size", family_size(self.model_family, self.use_small_model)
            )
        if not str(self.model_size).startswith(OWN_PREFIX):
            _one_of("model size", str(self.model_size), tuple(SIZES))
        _one_of("delta probes", self.delta_probes, DELTA_PROBES)
        _one_of("delta reading", self.delta_reading, DELTA_READINGS)
        _one_of("delta loss", self.delta_loss, tuple(DELTA_LOSSES))
        _one_of("mixed precision", self.mixed_precision, PRECISIONS)
        for name, least in COUNTS.items():
            value = getattr(self, name)
            if not (_is_number(value) and float(value).is_integer() and value >= least):
                raise UserError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}"
                )
            object.__setattr__(self, name, int(value))  # 600.0 is 600
        self._check_conditions()
        if self.n_trajectories and self.delta_probes != "trajectory":
            raise UserError(
                f"n_trajectories limits trajectories, and {self.delta_probes} probes are none: leave it out"
            )
        if self.steps % self.gradient_accumulation:
            raise UserError(
                f"{self.steps} steps end within an accumulation of {self.gradient_accumulation}: "
                "make steps a multiple of it"
            )
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate:g}; it must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay is {self.weight_decay:g}; it must be at least 0")
        self._settle_mixup()

    def _settle_mixup(self) -> None:
        value = self.mixup
        if not _is_number(value) or not 0 <= value < math.inf:
            raise UserError(f"mixup is {value!r}; it must be a finite number of at least 0")
        object.__setattr__(self, "mixup", float(value))
        for term in self.objective.terms if value else ():
            if "examples" in term.reads:
                raise UserError(
                    f"the loss term {term.name} reads labelled examples, which mixtures do not have: "
                    "leave it or mixup out"
                )

    def _check_conditions(self) -> None:
        """Raise UserError for settings of conditions that contradict each other, or that change nothing."""
        how = self.conditioning
        if self.n_prompts_min and not how.has_prompts:
            raise UserError(
                "n_prompts_min varies the number of prompts, and a condition of descriptions has none: leave it out"
            )
        if self.mixup and not how.has_prompts:
            raise UserError(
                "mixup takes half of the prompts of each task, and a condition of descriptions has none: leave it out"
            )
        if self.n_prompts_min and self.n_prompts_min >= self.n_prompts:
            raise UserError(
                f"n_prompts_min is {self.n_prompts_min} and n_prompts {self.n_prompts}: nothing varies, give less"
            )
        if not how.tokens and needs_tokens(self.generator.name):
            raise UserError(
                f"the generator {self.generator.name} reads states of tokens: give prompt_tokens (--prompt-tokens)"
            )

    @property
    def conditioning(self) -> Conditioning:
        """Return what the generator reads of a task."""
        return Conditioning(self.condition, self.prompt_tokens)

    @property
    def prompts_drawn(self) -> tuple[int, int]:
        """Return the least and the greatest number of prompts of a sample; a description stands for one."""
        if not self.conditioning.has_prompts:
            return 1, 1
        return self.n_prompts_min or self.n_prompts, self.n_prompts

    @property
    def condition_rows(self) -> tuple[int, ...]:
        """Return the sizes of a condition before its width: prompts, and tokens where their states are read."""
        tokens = (self.prompt_tokens,) if self.prompt_tokens else ()
        return self.prompts_drawn[1], *tokens

    def _settle_terms(self) -> None:
        """Bring weights and options of terms into the one form that equal trainings have."""
        named, others = split_weights(self.terms)
        options = dict(self.term_options)
        for name, value in named.items():
            object.__setattr__(self, NAMED[name], value)
        for key in OPTION_FIELDS.keys() & options.keys():
            object.__setattr__(self, OPTION_FIELDS[key], options.pop(key))
        check_lambdas(self.lambda_weight, self.lambda_delta, alone=not others)
        object.__setattr__(self, "terms", others)
        object.__setattr__(self, "term_options", used_options(self.weights, options))
        code = {name: make_term(name, options).identity for name in self.weights}
        code["generator"] = generator_code(self.generator.name)
        object.__setattr__(self, "plugin_code", {name: own for name, own in code.items() if own})

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of every loss term that has one above 0."""
        named = {name: getattr(self, own) for name, own in NAMED.items()}
        return {name: value for name, value in {**named, **self.terms}.items() if value > 0}

    @property
    def objective(self) -> Objective:
        """Return the loss: the sum of weight x term."""
        fields_of_terms = {key: getattr(self, name) for key, name in OPTION_FIELDS.items()}
        return Objective.of(self.weights, {**fields_of_terms, **self.term_options})

    @property
    def hash(self) -> str:
        return content_hash(self)

    def as_dict(self) -> dict[str, Any]:
        """Convert to a dictionary, nested configurations too."""
        return asdict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")
