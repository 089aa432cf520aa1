"""Worlds: base, bank, conditions and deltas of one model, built once and cached by content."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llgbm.dataset import (
    ExperimentData,
    LevelData,
    evaluation_examples,
    labelled_examples,
    rows_by_part,
)
from llgbm.delta import VERSION as DELTA_VERSION
from llgbm.delta import DeltaCache, DeltaTable, deltas_key
from llgbm.functional import FunctionalLoRA
from llgbm.generator.conditioning import (
    Conditioning,
    condition_pools,
    descriptions_hash,
    level_conditions,
)
from llgbm.generator.conditions import VERSION as CONDITIONS_VERSION
from llgbm.generator.conditions import (
    TextEncoder,
    build_conditions,
    conditions_key,
    encoder_hash,
    make_encoder,
)
from llgbm.models.ability import Ability, measure_ability
from llgbm.models.encoding import EncodedPairs, encode_pairs, example_prompt
from llgbm.models.load import Base, BaseSource, PublishedSize, base_hash, load_base, model_size
from llgbm.models.pretrain import MODEL_VERSION, PretrainConfig, make_tokenizer, new_model, pretrain
from llgbm.models.reading import Questions
from llgbm.models.scoring import encode_examples
from llgbm.probes import ProbeSet, create_domain_probes, create_generic_probes
from llgbm.runtime import UserError, content_hash, is_folder, pick_device, say, stream_seed
from llgbm.system.cache import build_entry, entry_is_whole
from llgbm.tasks.suite import Example, Suite
from llgbm.tasks.synthetic import VERSION as SUITE_VERSION
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.bank import Bank, BankSource
from llgbm.teachers.build import bank_key, build_bank, build_multitask
from llgbm.teachers.table import open_values
from llgbm.teachers.train import TEACHERS_VERSION, TeacherConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSIONS = {
    "suite": SUITE_VERSION,
    "models": MODEL_VERSION,
    "teachers": TEACHERS_VERSION,
    "delta": DELTA_VERSION,
    "conditions": CONDITIONS_VERSION,
}


NAMED_ENCODERS = ("minilm", "base")
EMBEDDED_TEACHERS = TeacherConfig(
    steps=60,
    examples=4,
    learning_rate=1e-2,
    betas=(0.8, 0.9),
    target=0.98,
    rounds=8,
    more_examples=4,
)
# Raise it when a world without a base of the user's is made in another way by default: a field at its default is no
# part of an id, so that other defaults alone would leave the ids of its trials as they were.
EMBEDDED_VERSION = 2
# Examples of each task that a base is measured on, after a round and within one.
ABILITY, TOLD, TOLD_OFTEN = "ability.json", 16, 8
# Weight of a task that a base can do, where one that it cannot do at all has 1 more.
PRACTISED_AT_LEAST = 0.05


@dataclass(frozen=True)
class WorldConfig:
    """Configuration of a world. `encoder_hash` follows from `encoder`, `descriptions_hash` from suite and `condition`,
    `made_by` from `base`: the version of the defaults of embedded worlds, 0 for a base of the user's.

    Without a `base` the embedded base of this `size` is pretrained for the suite; with one, `size` is its label.
    Without a `bank` the teachers are trained.
    """

    size: str = "nano"
    suite: Suite = SyntheticSuite()
    pretrain: PretrainConfig = PretrainConfig()
    teachers: TeacherConfig = EMBEDDED_TEACHERS
    encoder: str = field(default="minilm", compare=False)
    delta_probes: str = "trajectory"
    eval_examples: int = 24
    smoke: bool = False
    base: BaseSource | None = None
    bank: BankSource | None = None
    encoder_hash: str = ""
    condition: str = Conditioning.kind
    prompt_tokens: int = Conditioning.tokens
    descriptions_hash: str = ""
    made_by: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "made_by", EMBEDDED_VERSION if self.base is None else 0)
        # Workers have another working folder; and an encoder is known by its content, wherever it lies.
        if is_folder(self.encoder) and self.encoder not in NAMED_ENCODERS:
            object.__setattr__(self, "encoder", str(Path(self.encoder).expanduser().resolve()))
        object.__setattr__(self, "encoder_hash", encoder_hash(self.encoder))
        told = descriptions_hash(self.suite) if self.conditioning.has_description else ""
        object.__setattr__(self, "descriptions_hash", told)
        if self.base is None and isinstance(size := model_size(self.size), PublishedSize):
            raise UserError(
                f"the weights of {self.size} are not built here: name a folder of them, or {size.hub}"
            )

    @property
    def hash(self) -> str:
        return content_hash(self)

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.condition, self.prompt_tokens)

    @property
    def seed(self) -> int:
        """Seed of everything that is drawn to make the world: pretraining, teachers and split."""
        return self.teachers.seed

    @property
    def label(self) -> str:
        """Name of the world among others of a study: its size, and its seed unless that is 0."""
        return f"{self.size} world {self.seed}" if self.seed else self.size

    def with_seed(self, seed: int) -> WorldConfig:
        """Return the world of another seed. Raises UserError where nothing of it is drawn."""
        if self.bank is not None:
            raise UserError(
                "a world of given teachers has no seed: leave --world-seed or --bank out"
            )
        pretrain, teachers = replace(self.pretrain, seed=seed), replace(self.teachers, seed=seed)
        suite = self.suite.with_seed(seed)
        return replace(self, suite=suite, pretrain=pretrain, teachers=teachers)


@dataclass(frozen=True)
class World:
    """Built world: base, bank, data, and the base under adapters."""

    config: WorldConfig
    base: Base
    bank: Bank
    data: ExperimentData
    lora_model: FunctionalLoRA

    def to(self, device: str) -> World:
        """Move the world to a device: the base in place, the data as a copy where needed."""
        nn.Module.to(self.base.model, device)
        return replace(self, data=self.data.to(device))

    @property
    def ability(self) -> Ability | None:
        """Ability of the embedded base, as measured when it was pretrained; None for a base of the user's."""
        file = Path(self.base.path) / ABILITY
        if self.config.base is not None or not file.is_file():
            return None
        return Ability(**json.loads(file.read_text(encoding="utf-8")))

    @property
    def missed_gates(self) -> list[str]:
        """Say in one clause each which of the gates of its making the world missed."""
        missed = []
        target = self.config.pretrain.target
        if self.ability is not None and self.ability.worst[1] < target:
            task, share = self.ability.worst
            missed.append(f"the base, told {task}, is right in {share:.2f}, below {target:g}")
        if below := int(self.bank.facts.get("teachers_below_target", 0)):
            target = self.config.teachers.target
            missed.append(f"{below} of {len(self.bank.adapters)} teachers stayed below {target:g}")
        return missed

    @property
    def n_bytes(self) -> int:
        """Bytes of its large tensors: the base, the teachers' weights and deltas, and the conditions."""
        tables = (self.data.loss_deltas, self.data.shared_deltas, self.data.generic_deltas)
        deltas = chain.from_iterable((table.base_APQD, table.delta_APQD) for table in tables)
        held = (self.data.values_AV, *deltas, *vars(self.data.conditions).values())
        return sum(t.nbytes for t in (*self.base.model.parameters(), *held))


def base_key(config: WorldConfig) -> str:
    """Key of a pretrained base in the cache."""
    return content_hash(
        "base", MODEL_VERSION, model_size(config.size), config.suite, config.pretrain
    )


def describe_world(cache: Path, config: WorldConfig) -> dict[str, str]:
    """Say for each part of a world if it is cached or would be built; nothing is loaded or written."""
    if config.base is not None:
        base, found = config.base.path, config.base.hash
    else:
        folder = cache / "bases" / base_key(config)
        if not entry_is_whole(folder):
            return dict.fromkeys(("base", "teachers", "deltas", "conditions"), "would be built")
        base, found = "cached", base_hash(folder)
    rest = "found again by content where cached"
    if config.bank is not None:
        return {"base": base, "teachers": config.bank.path, "deltas": rest, "conditions": rest}
    bank_entry = cache / "banks" / bank_key(found, config.suite, config.teachers)
    bank = "cached" if entry_is_whole(bank_entry) else "would be built"
    rest = rest if bank == "cached" else "would be built"
    return {"base": base, "teachers": bank, "deltas": rest, "conditions": rest}


def build_base(cache: Path, config: WorldConfig, device: str) -> Base:
    """Load the base of a world, or pretrain it; the cache key holds size, suite, settings and version.

    Raises UserError for a suite that no base can be built for.
    """
    if config.base is not None:
        return config.base.load(device)
    size, vocabulary = model_size(config.size), config.suite.vocabulary

    def write(folder: Path) -> None:
        tokenizer = make_tokenizer(vocabulary)
        model = new_model(size, tokenizer, config.pretrain.seed)
        ability = _pretrain_until_good(model, tokenizer, config, device)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if ability is not None:
            (folder / ABILITY).write_text(json.dumps(asdict(ability), indent=1))

    return load_base(build_entry(cache, "bases", base_key(config), write), device)


def _pretrain_until_good(
    model: PreTrainedModel,
    tokenizer: Any,
    config: WorldConfig,
    device: str,
) -> Ability | None:
    """Pretrain in rounds until the base can do what it is told; return what it can do.

    Once it can do most, it practises most what it cannot do yet.
    """
    suite, rng = config.suite, random.Random(stream_seed("pretraining", config.pretrain.seed))
    told, ability = suite.told_examples(TOLD), None
    needs: dict[str, float] | None = None

    def measure(count: int = TOLD_OFTEN) -> Ability:
        nonlocal needs
        found = measure_ability(model, tokenizer, {t: own[:count] for t, own in told.items()})
        needs = {t: PRACTISED_AT_LEAST + 1 - share for t, share in found.by_task.items()}
        return found

    def next_batch(count: int, bare: bool) -> EncodedPairs:
        examples = [suite.pretraining_example(rng, bare, needs) for _ in range(count)]
        return encode_pairs(tokenizer, [(e.prompt, e.answer) for e in examples])

    for number in range(config.pretrain.rounds):
        own = config.pretrain.of_round(number)
        pretrain(model, own, next_batch, device, measure if told else lambda: None)
        if not told:
            break
        ability = measure(TOLD)
        say(f"base, round {number + 1}: {ability.describe()}")
        if ability.worst[1] >= config.pretrain.target:
            break
    return ability


def build_world(
    cache: Path, config: WorldConfig, device: str = "auto", stream: str = "auto"
) -> World:
    """Build whatever of a world is not in the cache; `stream` says when the bank is read from the disk (`open_values`).

    Raises UserError for an unwritable cache or an unknown size.
    """
    device = pick_device(device)
    base = build_base(cache, config, device)
    if config.bank is not None:
        bank = config.bank.open(base, config.suite)
    else:
        bank = build_bank(cache, base, config.suite, config.teachers)
    data = gather_data(cache, config, base, bank, stream)
    return World(config, base, bank, data, make_lora_model(base, bank))


def make_lora_model(base: Base, bank: Bank) -> FunctionalLoRA:
    """Wrap the base for adapters of the bank's rank, alpha and target modules."""
    return FunctionalLoRA(base.model, bank.spec.rank, bank.spec.alpha, bank.spec.target_modules)


def gather_data(
    cache: Path, config: WorldConfig, base: Base, bank: Bank, stream: str = "auto"
) -> ExperimentData:
    """Gather conditions, weights, deltas and evaluation examples of a bank, row for row."""
    values_AV, batch = open_values(cache, bank, stream)
    tasks = tuple(bank.adapters.values())
    suite, encoder = config.suite, make_encoder(config.encoder, base)
    sets = delta_probe_sets(suite, bank, base)
    sentences = build_conditions(cache, encoder, bank, suite.nonsense_prompts)

    def table(probe_set: ProbeSet) -> DeltaTable:
        return DeltaCache.build(cache, base, bank, probe_set, batch).table(base, probe_set)

    rows, families = rows_by_part(suite, bank), tuple(suite.task(task).family for task in tasks)
    tables = {name: table(sets[name]) for name in {"domain", "generic", config.delta_probes}}
    keys = {name: deltas_key(base, bank, sets[name]) for name in tables}
    pools = condition_pools(cache, encoder, bank, suite, config.conditioning, sentences)
    multitask_V = build_multitask(cache, base, suite, config.teachers, bank.spec)
    asked = evaluation_examples(suite, tasks, config.eval_examples)
    data = ExperimentData(
        adapter_ids=tuple(bank.adapters),
        tasks=tasks,
        families=families,
        rows=rows,
        values_AV=values_AV,
        multitask_V=multitask_V,
        conditions=pools,
        loss_deltas=tables[config.delta_probes],
        shared_deltas=tables["domain"],
        generic_deltas=tables["generic"],
        examples=encode_examples(base, asked),
        n_examples=config.eval_examples,
        levels=tuple(build_levels(cache, config, base, encoder)),
        encoder=encoder.name,
        hash=data_hash(config, base, bank, encoder, keys, multitask_V),
        questions=Questions.of(base.tokenizer, suite, tasks, asked),
        encoder_hash=encoder.hash,
        size=config.size,
        delta_probes=config.delta_probes,
        conditioning=config.conditioning,
        sentences=sentences,
        labelled=labelled_examples(base, suite, [tasks[i] for i in rows["train"]]),
        cache=cache,
    )
    return data.to(base.model.device)


def data_hash(
    config: WorldConfig,
    base: Base,
    bank: Bank,
    encoder: TextEncoder,
    deltas: Mapping[str, str],
    multitask_V: Tensor,
) -> str:
    """Hash what the numbers of a world's data depend on; `deltas` are the keys of its tables by name."""
    how = config.conditioning
    read = () if how == Conditioning() else (how, config.descriptions_hash)
    return content_hash(
        "data",
        (base.hash, bank.hash, config.suite, config.eval_examples),
        conditions_key(encoder, bank, config.suite.nonsense_prompts),
        deltas,
        hashlib.sha256(multitask_V.numpy().tobytes()).hexdigest(),
        *read,
    )


def build_levels(
    cache: Path, config: WorldConfig, base: Base, encoder: TextEncoder, sealed: bool = False
) -> Iterator[LevelData]:
    """Yield the data of the suite's levels of novelty: the open ones, or the sealed ones."""
    suite, n_prompts = config.suite, config.teachers.condition_evaluation
    for level in suite.levels:
        if level.is_sealed != sealed:
            continue
        examples: list[Example] = []
        for task in level.tasks:
            examples += suite.level_examples(level.name, task, "evaluation", config.eval_examples)
        conditions = level_conditions(
            cache, encoder, suite, level.name, n_prompts, config.conditioning
        )
        yield LevelData(level.name, level.tasks, conditions, encode_examples(base, examples))


def delta_probe_sets(suite: Suite, bank: Bank, base: Base) -> dict[str, ProbeSet]:
    """Return the probe sets that `--delta-probes` names; the suite's prompts are in the base's chat template."""
    domain = [example_prompt(base.tokenizer, e) for e in suite.probe_examples]
    return {
        "generic": create_generic_probes(),
        "domain": create_domain_probes(suite.name, domain),
        "trajectory": bank.trajectories(),
    }


def smoke_world(world: WorldConfig) -> WorldConfig:
    """Reduce a world to toy settings: accuracies of a first look on the built-in suite, a dry run of a user's own."""
    steps, examples = (30, 8) if world.base is None else (15, 4)
    return replace(
        world,
        smoke=True,
        suite=world.suite.toy() if world.base is None else world.suite,
        pretrain=replace(world.pretrain, steps=200, batch_size=32, target=0.0, rounds=1),
        teachers=replace(
            world.teachers,
            steps=min(steps, world.teachers.steps),
            target=0.0,
            rounds=1,
            examples=examples,
            condition_train=8,
            condition_evaluation=4,
            trajectories=4,
        ),
        eval_examples=examples,
    )
