"""Ids: a change to any input of a trial gives another, a change of nothing gives the same."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llgbm.generator import GeneratorConfig, MixtureConfig
from llgbm.generator.conditions import encoder_hash
from llgbm.models.load import Base, BaseSource, base_hash
from llgbm.models.pretrain import PretrainConfig
from llgbm.runtime import UserError, content_hash
from llgbm.tasks.files import FileSuite
from llgbm.tasks.suite import Example
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.bank import BankSource, bank_hash
from llgbm.teachers.train import SFTConfig, TeacherConfig
from llgbm.terms.registry import built_in_terms, make_term
from llgbm.training import TrainingConfig, train
from llgbm.world import EMBEDDED_VERSION, World, WorldConfig
from tuning.studies.spec import TrialSpec

BASE = BaseSource("here", "0" * 16)
BANK = BankSource("here", "1" * 16)
WORDS = ("left", "right")


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Other:
    size: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Any = Inner()
    rate: float = 0.5
    place: str = field(default="", compare=False)


class Mine(SyntheticSuite):
    """A user's suite, with other answers."""

    def examples(self, *arguments: Any, **more: Any) -> list[Example]:
        return [Example(e.prompt, WORDS[0]) for e in super().examples(*arguments, **more)]


class Theirs(SyntheticSuite):
    """A user's suite, with other answers."""

    def examples(self, *arguments: Any, **more: Any) -> list[Example]:
        return [Example(e.prompt, WORDS[1]) for e in super().examples(*arguments, **more)]


def trial(config: TrainingConfig | None = None, **world: Any) -> TrialSpec:
    return TrialSpec("a name", config or TrainingConfig(), WorldConfig(**world))


def test_one_number_has_one_id_however_it_is_written() -> None:
    assert content_hash(1) == content_hash(1.0) and content_hash(0.0) == content_hash(-0.0)
    assert content_hash(1) != content_hash("1") and content_hash(1.5) != content_hash(1)
    assert trial(TrainingConfig(lambda_weight=1)).id == trial(TrainingConfig(lambda_weight=1.0)).id
    assert trial(TrainingConfig(lambda_delta=0.0)).id == trial(TrainingConfig(lambda_delta=-0.0)).id


def test_types_count_at_any_depth_and_defaults_do_not() -> None:
    assert content_hash(Outer(Inner())) != content_hash(Outer(Other()))
    assert content_hash([Inner(2)]) != content_hash([Other(2)])

    @dataclass(frozen=True)
    class Grown(Outer):
        new: int = 3

    Grown.__qualname__ = Outer.__qualname__
    values = (Outer(rate=0.25), Grown(rate=0.25), Grown(rate=0.25, new=4))
    old, same, changed = (_own_fields(value) for value in values)
    assert old == same != changed
    assert content_hash(Outer(place="a")) == content_hash(Outer(place="b"))


def _own_fields(value: Any) -> dict[str, Any]:
    from llgbm.runtime import _canonical

    return {key: item for key, item in _canonical(value).items() if key != "type"}


def test_a_suite_of_the_users_has_an_id_of_its_own_by_what_it_does() -> None:
    ids = {trial(suite=suite).id for suite in (SyntheticSuite(), Mine(), Theirs())}
    assert len(ids) == 3
    assert trial(suite=Mine()).id == trial(suite=pickle.loads(pickle.dumps(Mine()))).id


def test_code_counts_where_names_are_equal() -> None:
    namesake = type(Mine.__name__, (SyntheticSuite,), dict(vars(Theirs)))
    assert trial(suite=Mine()).id != trial(suite=namesake()).id


def test_a_suite_with_another_fingerprint_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    before = trial().id
    changed = SyntheticSuite()
    changed.__dict__["fingerprint"] = "of other texts"
    assert trial(suite=changed).id != before


# Words and names that a field may hold beside its default.
NAMES = {
    "name": "hyperconv",
    "dtype": "bfloat16",
    "measure": "relative",
    "place": "attention",
    "loss": "mse",
    "pooling": "attention",
}


def changed(name: str, value: Any) -> Any:
    """Another value of a field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.75 * value or 0.125
    if isinstance(value, tuple):
        if name == "betas":
            return (0.75 * value[0], value[1])
        return (*value, 1 if name == "layers" else "more")
    if isinstance(value, str):
        return NAMES.get(name, f"{value}9")
    return 7  # where there was none


def changes_of(whole: Any) -> dict[str, Any]:
    """A dataclass with one field changed, by the name of the field; of dataclasses inside it, one of theirs."""
    found: dict[str, Any] = {}
    for one in fields(whole):
        own = getattr(whole, one.name)
        if not one.compare:
            continue
        if not is_dataclass(own):
            found[one.name] = replace(whole, **{one.name: changed(one.name, own)})
            continue
        for inner, value in changes_of(own).items():
            found[f"{one.name}.{inner}"] = replace(whole, **{one.name: value})
    return found


FILES = FileSuite(("river",), ("stone",), ("cloud",), "0" * 16, Path("here"))
GENERATORS = changes_of(GeneratorConfig())
GENERATORS["mixture"] = MixtureConfig()
GENERATORS["mixture.bases"] = MixtureConfig(bases=65)
SUITES = {**changes_of(SyntheticSuite()), "files": FILES}
SUITES |= {f"files.{name}": suite for name, suite in changes_of(FILES).items()}
PRETRAINED, TAUGHT = changes_of(PretrainConfig()), changes_of(TeacherConfig())
BASES, BANKS = changes_of(BASE), changes_of(BANK)

OTHER_TERMS = [name for name in built_in_terms() if name not in ("weight", "delta")]

# For every input of a trial, values that it may take beside its default.
CONFIGS: dict[str, list[Any]] = {
    "lambda_weight": [0.0, 0.31, 1.0],
    "lambda_delta": [0.0, 0.5, 2.0],
    "seed": [1, 7],
    "model_size": ["micro", "base-mine"],
    "steps": [596, 1200],
    "batch_size": [8, 17],
    "learning_rate": [1e-3, 2.1e-3],
    "weight_decay": [0.0, 0.1],
    "n_prompts": [8, 15],
    "n_probes": [1, 4],
    "delta_probes": ["generic", "domain"],
    "delta_loss": ["mse", "mse_raw", "cosine"],
    "delta_reading": ["mean"],
    "gradient_accumulation": [2, 4],
    "mixed_precision": ["bf16", "fp16"],
    "activation_checkpointing": [True],
    "probe_chunk": [1, 2],
    "eval_every": [50, 200],
    "patience": [1, 3],
    "n_prompts_min": [1, 4],
    "condition": ["both"],
    "prompt_tokens": [8, 16],
    "mixup": [0.5, 1.0],
    "n_tasks": [4, 24],
    "n_teachers": [1, 2],
    "n_trajectories": [1, 4],
    "generator": list(GENERATORS.values()),
    "terms": [*({name: 0.5} for name in OTHER_TERMS), {"kl": 0.25}, {"kl": 0.5, "l1": 0.5}],
}
# What a term is given alone has no effect without it, and its code follows from its name.
OF_TERMS = {"term_options", "plugin_code"}
# Not every suite has descriptions; tests/llgbm/test_conditions.py changes these.
OF_DESCRIPTIONS = {"condition", "descriptions_hash"}
WORLDS: dict[str, list[Any]] = {
    "size": ["micro"],
    "suite": [*SUITES.values(), Mine(), Theirs()],
    "pretrain": list(PRETRAINED.values()),
    "teachers": list(TAUGHT.values()),
    "encoder_hash": ["base"],
    "delta_probes": ["generic", "domain"],
    "eval_examples": [4, 25],
    "smoke": [True],
    "prompt_tokens": [8, 16],
    "base": [BASE, *BASES.values()],
    "bank": [BANK, *BANKS.values()],
}


def test_the_changes_below_are_to_every_input() -> None:
    assert set(CONFIGS) | OF_TERMS == {f.name for f in fields(TrainingConfig) if f.compare}
    assert {*WORLDS, *OF_DESCRIPTIONS, "made_by"} == {
        f.name for f in fields(WorldConfig) if f.compare
    }


def options_of_terms() -> list[TrainingConfig]:
    """A configuration for each option of each term, that option changed."""
    found = []
    for name in OTHER_TERMS:
        for option, term in changes_of(make_term(name, {})).items():
            given = {f"{name}.{option}": getattr(term, option)}
            found.append(TrainingConfig(terms={name: 0.5}, term_options=given))
    return found


def test_every_field_of_every_part_has_an_id_of_its_own() -> None:
    """Whatever dataclass a trial holds, and whatever new field it gets: a change to any one of them is seen."""
    specs = [trial(TrainingConfig(generator=generator)) for generator in GENERATORS.values()]
    specs += [trial(pretrain=one) for one in PRETRAINED.values()]
    specs += [trial(teachers=one) for one in (TeacherConfig(), *TAUGHT.values())]
    specs += [trial(suite=one, base=BASE) for one in SUITES.values()]
    specs += [trial(base=one) for one in (BASE, *BASES.values())]
    specs += [trial(base=BASE, bank=one) for one in (BANK, *BANKS.values())]
    specs += [trial(one) for one in options_of_terms()]
    assert len({spec.id for spec in (trial(), *specs)}) == len(specs) + 1
    assert len(TAUGHT) == len(fields(TeacherConfig)) and "rules.longest" in changes_of(FILES)
    moved = replace(FILES, folder=Path("elsewhere"))
    assert trial(suite=moved, base=BASE).id == trial(suite=FILES, base=BASE).id


def test_embedded_worlds_of_other_defaults_are_other_worlds_and_those_of_users_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A field at its default is no part of an id: new defaults alone would find the trials of the old ones."""
    before = trial().id, trial(base=BASE).id
    monkeypatch.setattr("llgbm.world.EMBEDDED_VERSION", EMBEDDED_VERSION + 1)
    assert trial().id != before[0] and trial(base=BASE).id == before[1]


def test_settings_of_a_bank_are_what_its_manifest_gives_back() -> None:
    """A bank is gone on with where the settings in its manifest are those that are asked for."""
    for teachers in TAUGHT.values():
        settings = SFTConfig(replace(teachers, per_task=4)).settings
        assert json.loads(json.dumps(settings)) == settings


def drawn(changes: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the fields, each with one of its values."""
    optional = {name: st.sampled_from(values) for name, values in changes.items()}
    return st.fixed_dictionaries({}, optional=optional)


def spelled(value: Any) -> Any:
    """The same value otherwise: a copy, a whole float for an integer and the other way round."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is int:
        return float(value)
    return pickle.loads(pickle.dumps(value))


def made(config: dict[str, Any], world: dict[str, Any]) -> TrialSpec:
    named = {("encoder" if name == "encoder_hash" else name): v for name, v in world.items()}
    if "lambda_weight" in config and config["lambda_weight"] == 0 == config.get("lambda_delta", 1):
        config = {**config, "lambda_delta": 3.0}
    if config.get("mixup") and "labels" in config.get("terms", {}):  # refused together
        config = {**config, "terms": {"kl": 0.77}}
    shared = {"generic": 10, "domain": 20}.get(config.get("delta_probes", ""))
    if shared and config.get("n_trajectories"):  # refused together
        count = int(config["n_trajectories"]) + shared
        config = {**config, "delta_probes": "trajectory", "n_trajectories": count}
    return TrialSpec("any", TrainingConfig(**config), WorldConfig(**named))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn(CONFIGS), drawn(WORLDS), drawn(CONFIGS), drawn(WORLDS))
def test_two_trials_have_one_id_exactly_if_all_their_inputs_are_equal(
    config: dict[str, Any], world: dict[str, Any], other: dict[str, Any], elsewhere: dict[str, Any]
) -> None:
    one, two = made(config, world), made(other, elsewhere)
    equal = one.config == two.config and one.world == two.world
    assert (one.id == two.id) == equal


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn(CONFIGS), drawn(WORLDS), st.data())
def test_any_one_change_is_seen_and_none_is_not(
    config: dict[str, Any], world: dict[str, Any], data: Any
) -> None:
    before = made(config, world)
    again = made(
        {name: spelled(value) for name, value in config.items()},
        {name: pickle.loads(pickle.dumps(value)) for name, value in world.items()},
    )
    assert again.id == before.id == pickle.loads(pickle.dumps(before)).id
    moved = {
        name: replace(value, path="elsewhere") if name in ("base", "bank") else value
        for name, value in world.items()
    }
    assert made(config, moved).id == before.id
    changes, given_ = data.draw(st.sampled_from([(CONFIGS, config), (WORLDS, world)]))
    name = data.draw(st.sampled_from(sorted(changes)))
    others = [value for value in changes[name] if value != given_.get(name)]
    if not others:
        return
    new = {**given_, name: data.draw(st.sampled_from(others))}
    after = made(new, world) if changes is CONFIGS else made(config, new)
    assert after.id != before.id


@pytest.fixture
def folder(tiny_base: Base, tmp_path: Path) -> Path:
    """A copy of the tiny base."""
    return Path(shutil.copytree(tiny_base.path, tmp_path / "base"))


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, **changes}))

    return change


@pytest.mark.parametrize(
    "change",
    [
        edit("tokenizer_config.json", eos_token="<|endoftext|>"),
        edit("generation_config.json", eos_token_id=[0, 1]),
        edit("special_tokens_map.json", eos_token="."),
        edit("added_tokens.json", new=7),
        edit("config.json", rope_theta=7.0),
        edit("tokenizer.json", version="2"),
        edit("model.safetensors.index.json", weight_map={}),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "tokenizer.model").write_bytes(b"pieces"),
    ],
)
def test_every_file_that_numbers_depend_on_is_part_of_a_bases_hash(
    folder: Path, change: Callable[[Path], object]
) -> None:
    before = base_hash(folder)
    (folder / "README.md").write_text("words")
    assert base_hash(folder) == before
    change(folder)
    assert base_hash(folder) != before


def test_weights_that_a_base_lacks_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    from llgbm.models.load import load_base

    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if ".layers.1.mlp." not in k}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"lack 3 weights of the model, such as model\.layers\.1\.mlp"
    ):
        load_base(folder)


def test_an_encoder_is_known_by_its_files_wherever_they_lie(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    assert encoder_hash(str(first)) == encoder_hash(str(second)) != encoder_hash("minilm")
    ids = {trial(encoder=str(folder)).id for folder in (first, second)}
    (second / "model.safetensors").write_bytes(b"changed")
    assert len(ids) == 1 and trial(encoder=str(second)).id not in ids


@pytest.mark.parametrize("name", ["alpha", "rank", "target_modules", "prompts", "trajectories"])
def test_everything_of_a_bank_is_part_of_its_hash(world: World, tmp_path: Path, name: str) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(world.bank.folder, bank)
    before = bank_hash(bank)
    manifest = json.loads((bank / "manifest.json").read_text())
    if name in manifest:
        manifest[name] = manifest[name][:1] if name == "target_modules" else manifest[name] + 1
        (bank / "manifest.json").write_text(json.dumps(manifest))
    elif name == "prompts":
        path = next(bank.rglob("prompts.json"))
        path.write_text(path.read_text().replace("[", '["another", ', 1))
    else:
        path = bank / "trajectories.json"
        told = json.loads(path.read_text())
        next(iter(told.values()))[0][1] += "!"
        path.write_text(json.dumps(told))
    assert bank_hash(bank) != before


def test_a_bank_that_was_built_is_named_by_its_weights(world: World) -> None:
    assert world.bank.hash == bank_hash(world.bank.folder)


@pytest.mark.parametrize("change", [{"model_size": "micro"}, {"delta_probes": "generic"}])
def test_data_of_another_size_or_of_other_probes_are_refused(
    world: World, config: TrainingConfig, change: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="its data are of"):
        train(replace(config, **change), world.data, world.lora_model)


def test_rows_of_files_are_part_of_an_id_and_their_folder_is_not(tmp_path: Path) -> None:
    from helpers import rows, write_rows

    suites = []
    for place, shift in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / place).mkdir()
        for topic in ("river", "stone", "cloud"):
            write_rows(tmp_path / place, topic, rows(topic, 32 + shift))
        suites.append(FileSuite.open(tmp_path / place, ["river"], ["stone"], ["cloud"]))
    one, same, another = (trial(suite=suite, base=BASE).id for suite in suites)
    assert one == same != another
