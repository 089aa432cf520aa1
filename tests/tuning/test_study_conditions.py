"""Options of studies about what a generator reads of a task, and commands that ask one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llgbm.__main__ import main as package_main
from llgbm.client import fetch_adapter
from llgbm.estimate import WorldSketch
from llgbm.generator import GeneratorConfig
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditioning import Conditioning
from llgbm.lora.adapters import load_adapter
from llgbm.runtime import UserError
from llgbm.training import Trial
from llgbm.world import World, gather_data
from tuning.arguments import check_used, parse_arguments, study_of
from tuning.registry.served import GeneratorModel
from tuning.studies import Study
from tuning.sweep.artifacts import asked_of, bundle_facts
from tuning.tracking.costs import kind_of


def made(command: str) -> Study:
    options = parse_arguments(command.split())
    study = study_of(options)
    check_used(options, study)
    return study


@pytest.mark.parametrize(
    ("command", "names", "found"),
    [
        ("--condition prompts both", ["prompts", "both"], [("prompts", 0, 0), ("both", 0, 0)]),
        ("--condition description", [""], [("description", 0, 0)]),
        ("--prompt-tokens 0 24", ["vectors", "tokens=24"], [("prompts", 0, 0), ("prompts", 24, 0)]),
        (
            "--n-prompts-min 0 2",
            ["prompts fixed", "prompts≥2"],
            [("prompts", 0, 0), ("prompts", 0, 2)],
        ),
    ],
)
def test_conditions_are_compared_in_one_study(
    command: str, names: list[str], found: list[tuple[str, int, int]]
) -> None:
    study = made(f"{command} --seeds 0 --lambda-delta 1 --lambda-weight 0")
    configs = [trial.config for trial in study.trials]
    assert [(c.condition, c.prompt_tokens, c.n_prompts_min) for c in configs] == found
    assert [trial.world.conditioning for trial in study.trials] == [c.conditioning for c in configs]
    assert all(trial.name.endswith(name) for trial, name in zip(study.trials, names, strict=True))
    # Trials at the defaults are those of a study without the option.
    plain = made("--seeds 0 --lambda-delta 1 --lambda-weight 0").trials[0]
    defaults = [
        trial.id for trial, how in zip(study.trials, found, strict=True) if how == ("prompts", 0, 0)
    ]
    assert defaults == [plain.id] * len(defaults)
    assert len({trial.id for trial in (plain, *study.trials)}) == len(study.trials) + 1 - len(
        defaults
    )


@pytest.mark.parametrize("study", ["terms", "labels", "objectives", "lambda_grid", "generators"])
def test_every_study_takes_them(study: str) -> None:
    for trial in made(f"--study {study} --seeds 0 --condition both --prompt-tokens 8").trials:
        assert trial.config.conditioning == trial.world.conditioning == Conditioning("both", 8)


def test_a_search_takes_one_kind() -> None:
    space = made("--search random --condition description").space
    assert space is not None and space.base.config.condition == "description"
    with pytest.raises(UserError, match="one kind of condition"):
        made("--search random --condition description both")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "--condition answers",
            "unknown condition 'answers'; there are: prompts, description, both",
        ),
        ("--prompt-tokens -1", "prompt_tokens is -1"),
        ("--n-prompts-min 16", "nothing varies"),
        ("--n-prompts-min 2 --condition description", "has none: leave it out"),
        ("--generator hyperconv_tokens", "reads states of tokens: give prompt_tokens"),
        (
            "--base base --data data --tasks river stone cloud --held-out tiger --condition both",
            "the suite files has no description of the task",
        ),
    ],
)
def test_what_changes_nothing_or_cannot_be_is_a_users_mistake(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "data" / "formats")
    with pytest.raises(UserError, match=said):
        made(command)


def test_datasets_are_described_in_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(Path(__file__).parents[1] / "data" / "formats", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    command = "--base base --data data --tasks river stone cloud --held-out tiger --seeds 0 --condition both"
    table = tmp_path / "data" / "dataset_info.json"
    entries: dict[str, Any] = {
        name: {"description": f"count {name}s"} for name in ("stone", "tiger", "cloud")
    }
    plain = made(command.removesuffix(" --condition both")).trials[0].id
    table.write_text(json.dumps({**entries, "river_train": {"description": " count rivers "}}))
    world = made(command).trials[0].world
    assert world.suite.description("river") == "count rivers"
    assert made(command.removesuffix(" --condition both")).trials[0].id == plain
    table.write_text(json.dumps({**entries, "river": {"description": "count all rivers"}}))
    assert made(command).trials[0].id not in (plain, None)
    assert made(command).trials[0].world.hash != world.hash
    for wrong in ("[1]", '{"river": {"description": 3}}', "{"):
        table.write_text(wrong)
        with pytest.raises(UserError, match="no table of|is no text|cannot be read as JSON"):
            made(command)


def test_states_of_tokens_are_part_of_an_estimate() -> None:
    trials = made("--seeds 0 --prompt-tokens 0 16 --condition both --lambda-delta 1").trials
    vectors, tokens = (WorldSketch(t.world).estimate(t.config) for t in trials)
    assert "conditions" not in vectors.memory
    teachers = trials[1].world.teachers
    n_texts = 2 * teachers.condition_train + teachers.condition_evaluation
    n_teachers = teachers.per_task * len(trials[1].world.suite.split.tasks)
    assert tokens.memory["conditions"] == 4 * n_teachers * n_texts * 16 * 2 * 384
    attending = replace(trials[1].config, generator=GeneratorConfig(pooling="attention"))
    more = WorldSketch(trials[1].world).estimate(attending)
    assert more.step_flops > tokens.step_flops
    assert len({kind_of(trial.config) for trial in trials}) == 2


@pytest.fixture(params=[Conditioning("both", 6), Conditioning("description")], ids=str)
def told(
    request: pytest.FixtureRequest, world: World, cache: Path, config: Any, tmp_path: Path
) -> Any:
    """A generator as a sweep leaves it, fresh from initialisation, with its world."""
    how = request.param
    own = replace(world.config, encoder="base", condition=how.kind, prompt_tokens=how.tokens)
    found = replace(world, config=own, data=gather_data(cache, own, world.base, world.bank))
    config = replace(config, condition=how.kind, prompt_tokens=how.tokens)
    trial = made("--smoke --seeds 0").trials[0]
    (tmp_path / "bundle").mkdir()
    generator = Trial(config, found.data, found.lora_model).generator
    facts = bundle_facts(replace(trial, config=config, world=own), found)
    GeneratorBundle.save(tmp_path / "bundle", generator, config.generator, facts)
    return tmp_path / "bundle", found, generator


def test_a_saved_generator_writes_what_the_trial_evaluated(told: Any) -> None:
    import torch

    folder, world, generator = told
    bundle, row = GeneratorBundle.load(folder), world.data.rows["test"][0]
    asked = asked_of(world, row)
    wanted = generator.generate(world.data.conditions.evaluation_ANC[[row]]).to_state_dicts()[0]
    for key, value in bundle.generate(**asked).items():
        torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-4)
    assert bundle.lineage(**asked)["prompts"]["count"] == len(asked["prompts"])


def test_commands_ask_with_a_description(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    folder, world, _ = told
    reads_prompts = world.config.conditioning.has_prompts
    prompts, row = tmp_path / "prompts.txt", world.data.rows["test"][0]
    texts = world.bank.prompts(world.data.adapter_ids[row])["evaluation"]
    prompts.write_text("\n\n".join(texts))
    asked = ["--model", str(folder), "--out", str(tmp_path / "out")]
    with_prompts = ["--prompts", str(prompts)] if reads_prompts else []
    description = "give the last word in brackets"
    command = ["generate", *asked, *with_prompts, "--description", description]
    assert package_main(command) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == len(texts) * reads_prompts
    bundle = GeneratorBundle.load(folder)
    wanted = bundle.generate(texts if reads_prompts else (), description=description)
    for key, value in load_adapter(tmp_path / "out").items():
        torch.testing.assert_close(value, wanted[key])
    for wrong, said in (
        (asked, "nothing to generate from"),
        ([*asked, "--prompts", str(prompts)], "reads a description of the task"),
        ([*asked, *with_prompts, "--description", " "], "--description is empty"),
        ([*asked, "--description", "x", "--subsets", "2"], "subsets of --prompts: give both"),
        ([*asked, "--prompts", str(prompts), "--subsets", "1"], "at least 2 subsets"),
    ):
        assert package_main(["generate", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_served_generator_is_asked_with_all_of_it(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd
    import torch

    folder, world, _ = told
    served = GeneratorModel()
    served.bundle = GeneratorBundle.load(folder)

    def answer(url: str, body: Any, *rest: Any) -> bytes:
        frame = pd.DataFrame(**body["dataframe_split"])
        rows = served.predict(None, frame).to_dict("records")
        return json.dumps({"predictions": rows}).encode()

    monkeypatch.setattr("llgbm.client.post_json", answer)
    texts = world.bank.prompts(world.data.adapter_ids[0])["evaluation"]
    asked: dict[str, Any] = {"description": "reverse the words", "prompts": []}
    if world.config.conditioning.has_prompts:
        asked |= {"subsets": 3, "prompts": texts}
    fetch_adapter("http://127.0.0.1:1", folder=tmp_path / "out", **asked)
    for key, value in load_adapter(tmp_path / "out").items():
        torch.testing.assert_close(value, served.bundle.generate(**asked)[key])
