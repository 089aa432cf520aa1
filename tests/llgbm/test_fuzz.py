"""Whatever users bring, a reader returns or raises UserError: no traceback, nothing written, nothing lost."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rows
from mutations import Mutator, folder_state

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, load_adapter, save_adapter
from llgbm.lora.external import AdapterReader
from llgbm.models.folder import check_weights, read_config
from llgbm.models.load import Base, weightless_model
from llgbm.runtime import UserError, is_folder, split_revision
from llgbm.tasks.extraction import extract
from llgbm.tasks.files import FileSuite, datasets_in
from llgbm.tasks.forms import RowRules
from llgbm.tasks.prompts import read_prompts
from llgbm.teachers.given import prompts_of
from llgbm.teachers.imported import _check_base, find_adapters
from tuning.studies import StudyOptions
from tuning.studies.from_file import make_study

# How many of each kind are tried, in `make test` and in `make soak`; more where reading is quick.
QUICK = {"datasets": 250, "prompts": 470, "studies": 20, "adapters": 160, "bases": 100}
SOAK = {"datasets": 30_000, "prompts": 40_000, "studies": 2_000, "adapters": 20_000, "bases": 8_000}
STUDY = """from tuning.studies import Study, StudyOptions, Variant, crossed, lambda_variants, make_trials

RATES = [
    Variant("slow", {"learning_rate": 5e-4}, "Does a slower rate need more steps?"),
    Variant("fast, decayed", {"learning_rate": 4e-3, "weight_decay": 0.1}, "Is it held by more decay?"),
]


def mine(options: StudyOptions) -> Study:
    variants = crossed(lambda_variants(options), RATES)
    return Study("rates", make_trials(options, variants), note="Which rate?")
"""


@dataclass(frozen=True)
class Target:
    """Kind of input: how one is written into a folder, and what reads it."""

    write: Callable[[Mutator, Path], None]
    read: Callable[[Path], Any]


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def write_dataset(mutator: Mutator, folder: Path) -> None:
    forms: list[Any] = [
        rows("river", 12),
        [
            {"instruction": f"Add {i}.", "input": "3", "output": "7", "history": [["a", "b"]]}
            for i in range(9)
        ],
        [
            {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "x"}]}
            for i in range(9)
        ],
        [
            {
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": "#### 3"},
                ]
            }
            for i in range(9)
        ],
    ]
    content = mutator.rng.choice(forms)
    name = mutator.rng.choice(("x.json", "x_train.json", "x.jsonl", "x_test.jsonl"))
    if mutator.rng.random() < 0.5:
        (folder / name).write_bytes(mutator.document(content))
        return
    lines = [json.dumps(row).encode() for row in content]
    place = mutator.rng.randrange(len(lines))
    lines[place] = mutator.document(content[place])
    whole = b"\n".join(lines)
    (folder / name).write_bytes(
        whole if mutator.rng.random() < 0.7 else mutator.some(mutator.bytes, whole)
    )


def read_datasets(folder: Path) -> None:
    for rules in (RowRules(), RowRules(skip_bad=True)):
        for name in datasets_in(folder):
            try:
                suite = FileSuite.open(folder, [name], rules=rules)
            except UserError:
                continue
            dataset = suite.datasets[name]
            for row in (row for own in dataset.rows.values() for row in own):
                row.example.prompt.encode()
                extract(dataset.kind, row.example.prompt, row.example.answer)
            assert suite.probe_prompts and suite.nonsense_prompts


def write_prompts(mutator: Mutator, folder: Path) -> None:
    question = "Which conducts?\nA: wood\nB: copper"
    texts = (
        "one\ntwo\n",
        f"{question}\n\n{question} 2\n",
        f"{question}\n",
        '"one"\n{"prompt": "x"}\n',
    )
    text = mutator.rng.choice(texts)
    messages = {"messages": said("user", "x")}
    lists = [["one", question], {"prompts": ["one"]}, rows("river", 2), [messages]]
    name = mutator.rng.choice(("prompts.txt", "prompts.json", "prompts.jsonl"))
    if mutator.rng.random() < 0.5:
        (folder / name).write_bytes(mutator.some(mutator.bytes, text.encode()))
    else:
        (folder / name).write_bytes(mutator.document(mutator.rng.choice(lists)))


def read_prompts_in(folder: Path) -> None:
    (file,) = folder.iterdir()
    found = read_prompts(file)
    assert found and all(prompt.strip() for prompt in found)
    "".join(found).encode()


def write_study(mutator: Mutator, folder: Path) -> None:
    lines = STUDY.splitlines()
    kind = mutator.rng.random()
    if kind < 0.3:
        (folder / "mine.py").write_bytes(mutator.some(mutator.bytes, STUDY.encode()))
        return
    words = (
        "0",
        "None",
        "'x'",
        "(0,)",
        "[]",
        "NAMES",
        "mine",
        "1/0",
        "-1",
        "float('nan')",
        "raise",
        "return",
        "1e999",
    )
    for _ in range(mutator.rng.randint(1, 3)):
        place = mutator.rng.randrange(len(lines))
        parts = lines[place].split(" ")
        parts[mutator.rng.randrange(len(parts))] = mutator.rng.choice(words)
        lines[place] = " ".join(parts) if mutator.rng.random() < 0.8 else ""
    (folder / "mine.py").write_text("\n".join(lines))


def read_study(folder: Path) -> None:
    study = make_study(f"{folder / 'mine.py'}:mine", StudyOptions())
    assert study.id and all(trial.id for trial in study.trials)


class Adapters:
    """Adapters of the tiny base, read as `evaluate` and `bank import` read them."""

    def __init__(self, base: Base, spec: LoraSpec, batch: LoraBatch, folder: Path) -> None:
        config = adapter_config(spec, base.path)
        save_adapter(folder, batch.to_state_dicts()[0], config)
        more = {
            "rank_pattern": {},
            "alpha_pattern": {},
            "layers_to_transform": None,
            "use_rslora": False,
        }
        self.config = {**config, **more, "modules_to_save": None, "exclude_modules": None}
        self.weights = (folder / "adapter_model.safetensors").read_bytes()
        self.prompts = {"train": ["count : a b =>", "count : c =>"], "evaluation": ["count : d =>"]}
        self.base, self.spec, self.reader = base, spec, AdapterReader(base.model)

    def write(self, mutator: Mutator, folder: Path) -> None:
        files = {
            "adapter_config.json": json.dumps(self.config).encode(),
            "adapter_model.safetensors": self.weights,
            "prompts.json": json.dumps(self.prompts).encode(),
        }
        changed = mutator.rng.choice(list(files))
        if changed == "adapter_config.json":
            files[changed] = mutator.document(self.config)
        elif changed == "prompts.json":
            files[changed] = mutator.document(self.prompts)
        else:
            files[changed] = mutator.tensors(self.weights)
        own = folder / "task"
        own.mkdir()
        for name, content in files.items():
            (own / name).write_bytes(content)

    def read(self, folder: Path) -> None:
        own = folder / "task"
        for read in (self._plainly, self._as_others, self._into_a_bank):
            try:
                read(own)
            except UserError:
                continue

    def _plainly(self, own: Path) -> None:
        load_adapter(own, self.spec)

    def _as_others(self, own: Path) -> None:
        plain = self.reader.read(own)
        assert math.isfinite(plain.spec.alpha) and plain.spec.alpha > 0
        assert all(torch.isfinite(value).all() for value in plain.state.values())

    def _into_a_bank(self, own: Path) -> None:
        for external in find_adapters(str(own), "task"):
            _check_base(external, {self.base.path})
            prompts = prompts_of(external.folder, external.task, {})
            assert prompts["train"] and prompts["evaluation"]


class Bases:
    """Folders of a base: config, weights and their index, checked as they are before loading."""

    def __init__(self, base: Base) -> None:
        assert base.folder is not None
        self.config = json.loads((base.folder / "config.json").read_text())
        header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        told = json.dumps(header).encode()
        self.weights = len(told).to_bytes(8, "little") + told + bytes(8)
        self.index = {"metadata": {"total_size": 8}, "weight_map": {"a": "part.safetensors"}}

    def write(self, mutator: Mutator, folder: Path) -> None:
        changed = mutator.rng.random()
        config, weights = json.dumps(self.config).encode(), self.weights
        index = json.dumps(self.index).encode()
        if changed < 0.7:
            config = mutator.document(self.config)
        elif changed < 0.85:
            weights = mutator.tensors(weights)
        else:
            index = mutator.document(self.index)
        (folder / "config.json").write_bytes(config)
        name = "model.safetensors" if changed < 0.75 else "part.safetensors"
        (folder / name).write_bytes(weights)
        (folder / "model.safetensors.index.json").write_bytes(index)

    def read(self, folder: Path) -> None:
        for read in (read_config, check_weights, lambda own: weightless_model(str(own))):
            try:
                read(folder)
            except UserError:
                continue


@pytest.fixture(scope="module")
def adapters(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Adapters:
    kept = tmp_path_factory.mktemp("kept") / "adapter"
    return Adapters(tiny_base, tiny_spec, tiny_adapters, kept)


@pytest.fixture(scope="module")
def targets(tiny_base: Base, adapters: Adapters) -> dict[str, Target]:
    bases = Bases(tiny_base)
    return {
        "datasets": Target(write_dataset, read_datasets),
        "prompts": Target(write_prompts, read_prompts_in),
        "studies": Target(write_study, read_study),
        "adapters": Target(adapters.write, adapters.read),
        "bases": Target(bases.write, bases.read),
    }


def try_one(target: Target, seed: int, folder: Path) -> None:
    """Write one changed input, read it, and hold that the folder is as it was. Raises whatever is no UserError."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    target.write(Mutator(seed), folder)
    before = folder_state(folder)
    with redirect_stderr(StringIO()):
        try:
            target.read(folder)
        except UserError as error:
            assert "\n" not in str(error).strip(), "one sentence is one line"
    assert folder_state(folder) == before


def run(target: Target, seeds: range, folder: Path) -> None:
    for seed in seeds:
        try:
            try_one(target, seed, folder)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("name", QUICK)
def test_a_thousand_changed_inputs_are_read_or_refused(
    name: str, targets: dict[str, Target], tmp_path: Path
) -> None:
    run(targets[name], range(QUICK[name]), tmp_path)


def test_the_numbers_are_a_thousand_and_a_hundred_thousand() -> None:
    assert sum(QUICK.values()) >= 1_000 and sum(SOAK.values()) >= 100_000


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", QUICK)
def test_a_hundred_thousand_changed_inputs_are_read_or_refused(
    name: str, targets: dict[str, Target], tmp_path: Path
) -> None:
    started = time.perf_counter()
    run(targets[name], range(QUICK[name], QUICK[name] + SOAK[name]), tmp_path)
    print(f"{SOAK[name]} {name} in {time.perf_counter() - started:.0f} s")


ODD_CONFIGS = [
    {"exclude_modules": 1.5},
    {"exclude_modules": "("},
    {"target_modules": "("},
    {"target_modules": "a{9999999999}"},
    {"layers_to_transform": "x"},
    {"layers_to_transform": [None]},
    {"rank_pattern": {"(": 2}},
    {"rank_pattern": {"q_proj": None}},
    {"alpha_pattern": {"q_proj": "many"}},
    {"alpha_pattern": {"q_proj": math.inf}},
    {"lora_alpha": math.inf},
    {"lora_alpha": math.nan},
    {"r": 10**30},
]


@pytest.mark.parametrize("change", ODD_CONFIGS, ids=str)
def test_an_adapter_of_an_odd_config_is_refused_by_name(
    change: dict[str, Any], adapters: Adapters, tmp_path: Path
) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(adapters.weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**adapters.config, **change}))
    with pytest.raises(UserError, match=str(tmp_path)):
        adapters.reader.read(tmp_path)


def test_a_study_file_is_left_alone_and_may_end_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "mine.py").write_text(STUDY)
    read_study(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    (tmp_path / "ends.py").write_text("import sys\ndef mine(options):\n    sys.exit(3)\n")
    with pytest.raises(UserError, match="line 3: SystemExit: 3"):
        make_study(f"{tmp_path / 'ends.py'}:mine", StudyOptions())


def test_a_name_that_no_file_can_have_is_no_folder(tmp_path: Path) -> None:
    for name in ("x" * 5000, "~nobody-of-this-name/x", "a\0b"):
        assert not is_folder(name) and split_revision(f"{name}@main") == (name, "main")
    told = {"weight_map": {"a": "x" * 5000}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="fetch it again"):
        check_weights(tmp_path)


def test_a_prompt_of_nothing_but_separators_is_none(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('["one", "\\u2028", "\\ufeff "]')
    assert read_prompts(tmp_path / "prompts.json") == ["one"]
