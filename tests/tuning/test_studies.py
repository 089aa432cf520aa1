"""Named studies, studies from files, and what is said where one is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.generator import GENERATORS
from llgbm.losses import DELTA_LOSSES
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from llgbm.training.config import DELTA_PROBES, DELTA_READINGS
from tuning.arguments import check_together, check_used, parse_arguments, study_of
from tuning.run_ablation import main
from tuning.studies import (
    MULTITASK,
    STUDIES,
    Study,
    StudyOptions,
    Variant,
    crossed,
    make_trials,
    phase_4_5,
)
from tuning.studies.from_file import make_study
from tuning.studies.options import StudyArguments
from tuning.studies.spec import TRAINING

DOCS = ROOT / "docs" / "studies.md"


def study(*arguments: str) -> Study:
    return study_of(parse_arguments(arguments))


@pytest.mark.parametrize(
    ("name", "configurations", "worlds"),
    [
        ("phase_4_5", 3, 1),
        ("lambda_grid", 4 * 4 - 1, 1),
        ("model_size", 3, 2),
        ("generators", 3 * len(GENERATORS), 1),
        ("objectives", 8, len(DELTA_PROBES)),
        ("curves", 1 + 4 + 2 + 3, 1),
        ("composition", 3 * 2, 1),
        ("dnd", 5, 2),
    ],
)
def test_named_studies_are_what_they_say(name: str, configurations: int, worlds: int) -> None:
    made = study("--study", name)
    assert len({trial.name for trial in made.trials}) == configurations
    assert len(made.worlds) == worlds
    sizes = {trial.world.size for trial in made.trials}
    assert len(made.trials) == configurations * len(sizes) * 3
    assert made.name == name and made.note
    assert all(trial.note for trial in made.trials)
    assert all(trial.config.delta_probes == trial.world.delta_probes for trial in made.trials)
    assert all(trial.config.model_size == trial.world.size for trial in made.trials)


def test_objectives_try_every_loss_reading_and_probe_set() -> None:
    configs = [trial.config for trial in study("--study", "objectives").trials]
    tried = {
        (name, getattr(config, name))
        for config in configs
        for name in ("delta_loss", "delta_reading", "delta_probes")
    }
    expected = {
        "delta_loss": DELTA_LOSSES,
        "delta_reading": DELTA_READINGS,
        "delta_probes": DELTA_PROBES,
    }
    assert tried == {(name, value) for name, values in expected.items() for value in values}


def test_the_default_study_is_the_ablation_of_the_default_configuration() -> None:
    made = study()
    assert [(trial.name, trial.config.seed) for trial in made.trials[::3]] == [
        ("multitask", 0),
        ("delta-only", 0),
        ("weight-only", 0),
    ]
    shorter = TrainingConfig(model_size="nano", steps=400, learning_rate=3e-3)
    assert made.trials[0].config == shorter == TRAINING
    assert study("--smoke").trials[0].config.steps <= 60 and len(study("--smoke").trials) == 3


def test_mixtures_are_compared_with_none() -> None:
    made = study("--study", "composition", "--seeds", "0")
    assert [(trial.name, trial.config.mixup) for trial in made.trials] == [
        *(("delta-only", 0), ("delta-only, mixup=1", 1), ("kl", 0), ("kl, mixup=1", 1)),
        *(("multitask", 0), ("multitask, mixup=1", 1)),
    ]
    plain = {trial.id for trial in study("--study", "terms").trials}
    assert made.trials[0].id in plain and made.trials[1].id not in plain
    swept = study("--study", "composition", "--mixup", "0.5", "2", "--term", "kl=1", "--seeds", "0")
    assert [trial.name for trial in swept.trials] == ["kl=1, mixup=0.5", "kl=1, mixup=2"]
    everywhere = study("--mixup", "0.5", "--seeds", "0")
    assert {trial.config.mixup for trial in everywhere.trials} == {0.5}
    assert [t.name for t in everywhere.trials] == ["multitask", "delta-only", "weight-only"]
    searched = study("--search", "random", "--mixup", "0.5")
    assert searched.space is not None and searched.space.base.config.mixup == 0.5


def test_curves_change_one_amount_at_a_time() -> None:
    made = {t.name: t for t in study("--study", "curves", "--seeds", "0").trials}
    assert list(made) == [
        "delta-only",
        *(f"delta-only, tasks={n}" for n in (24, 48, 72, 108)),
        *(f"delta-only, trajectories={n}" for n in (1, 4)),
        *(f"delta-only, steps={n}" for n in (100, 200, 800)),
    ]
    whole = study("--study", "terms", "--seeds", "0").trials[0]
    assert made["delta-only"].id == whole.id
    fewer = made["delta-only, tasks=24"].config
    assert fewer == replace(whole.config, n_tasks=24)
    asked = study(
        *("--study", "curves", "--n-tasks", "12", "--n-trajectories", "2", "--term", "kl=1"),
        *("--seeds", "0", "--steps", "50", "--generator", "retrieval"),
    )
    assert [t.name for t in asked.trials] == ["kl=1", "kl=1, tasks=12", "kl=1, trajectories=2"]
    assert {t.config.generator.name for t in asked.trials} == {"retrieval"}
    shared = study("--study", "curves", "--delta-probes", "domain", "--seeds", "0")
    assert not any("trajectories" in t.name for t in shared.trials) and len(shared.trials) == 8
    toy = study("--study", "curves", "--smoke")
    assert [t.name for t in toy.trials] == ["delta-only", "delta-only, trajectories=1"]


def test_teachers_a_task_are_of_the_embedded_base_too() -> None:
    plain = study("--seeds", "0").trials
    several = study("--adapters-per-task", "4", "--seeds", "0").trials
    assert [replace(t.world.teachers, per_task=1) for t in several] == [
        t.world.teachers for t in plain
    ]
    assert {t.world.teachers.per_task for t in several} == {4}
    assert not {t.id for t in several} & {t.id for t in plain}
    same = study("--adapters-per-task", "1", "--seeds", "0").trials
    assert [t.id for t in same] == [t.id for t in plain]
    made = study("--adapters-per-task", "4", "--study", "curves", "--seeds", "0").trials
    assert [t.config.n_teachers for t in made if "teachers" in t.name] == [1, 2]
    with pytest.raises(UserError, match="at least one teacher a task"):
        study("--adapters-per-task", "0")


def test_all_that_a_world_has_is_the_trial_without_a_limit() -> None:
    def ids(*arguments: str) -> list[str]:
        return [
            t.id for t in study("--lambda-weight", "0", "--lambda-delta", "1", *arguments).trials
        ]

    whole = ids()
    assert ids("--n-tasks", "121") == ids("--n-tasks", "0") == ids("--n-teachers", "1") == whole
    assert ids("--n-trajectories", "16") == whole != ids("--n-trajectories", "4")
    swept = study("--n-tasks", "24", "0", "--lambda-weight", "1", "--seeds", "0")
    assert [t.name.partition(", ")[2] for t in swept.trials] == ["tasks=24", "all tasks"]


def test_the_published_method_stands_beside_its_halves() -> None:
    made = {t.name: t.config for t in study("--study", "dnd", "--seeds", "0").trials}
    published = made["DnD's decoder, importance"]
    assert published.generator.name == "hyperconv_tokens" and published.prompt_tokens == 32
    assert published.weights == made["importance"].weights == {"importance": 1.0}
    halves = (made["DnD's decoder, kl"], made["importance"])
    assert [c.generator.name for c in halves] == ["hyperconv_tokens", "default"]
    assert halves[0].weights == made["kl"].weights == {"kl": 1.0}
    assert made["delta-only"] == study("--study", "terms", "--seeds", "0").trials[0].config


@pytest.mark.parametrize(
    "option", ["--generator heads", "--prompt-tokens 8", "--term kl=1", "--lambda-delta 1"]
)
def test_the_published_method_takes_no_other_parts(option: str) -> None:
    with pytest.raises(UserError, match="of its own: leave these options out"):
        study("--study", "dnd", *option.split())


axis = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True).map(tuple)


@pytest.mark.whole
@given(
    weights=axis,
    deltas=axis,
    rates=axis,
    seeds=axis,
    sizes=st.sampled_from([("nano",), ("nano", "micro")]),
)
@settings(deadline=None, max_examples=40)
def test_options_are_crossed(
    weights: tuple[int, ...],
    deltas: tuple[int, ...],
    rates: tuple[int, ...],
    seeds: tuple[int, ...],
    sizes: tuple[str, ...],
) -> None:
    options = StudyOptions(
        model_sizes=sizes,
        lambda_weight=tuple(map(float, weights)),
        lambda_delta=tuple(map(float, deltas)),
        learning_rates=tuple(rate / 1000 + 1e-4 for rate in rates),
        seeds=seeds,
    )
    pairs = {(w, d) for w in weights for d in deltas} - {(0, 0)}
    if not pairs:
        with pytest.raises(UserError, match="both 0"):
            phase_4_5(options)
        return
    made = phase_4_5(options)
    found = {
        (
            t.world.size,
            t.config.lambda_weight,
            t.config.lambda_delta,
            t.config.learning_rate,
            t.config.seed,
        )
        for t in made.trials
    }
    assert found == {
        (z, w, d, r, s)
        for z in sizes
        for w, d in pairs
        for r in options.learning_rates or ()
        for s in seeds
    }
    assert len(made.trials) == len(found)
    assert len({trial.name for trial in made.trials}) == len(pairs) * len(rates)
    assert made.id == phase_4_5(options).id != phase_4_5(replace(options, steps=7)).id


def test_notes_and_names_do_not_change_what_a_trial_is() -> None:
    trial = study().trials[0]
    assert replace(trial, note="another reason").id == trial.id
    space = study("--search", "random").space
    assert space is not None
    renamed = Study("optuna_lambda", space=replace(space, base=replace(space.base, note="another")))
    assert renamed.id == study("--search", "random").id != study("--search", "optuna").id


def test_options_of_a_search_are_ranges() -> None:
    made = study(
        "--search", "optuna", "--lambda-weight", "0", "--lambda-delta", "5", "0.1", "--steps", "150"
    )
    assert made.space is not None
    assert set(made.space.ranges) == {"lambda_delta", "learning_rate"}
    assert made.space.ranges["lambda_delta"] == (0.1, 5)
    trials = made.space.trials({"lambda_delta": 0.123456789, "learning_rate": 1e-3})
    assert [trial.config.seed for trial in trials] == [0, 1]
    assert trials[0].name == "w=0 d=0.123457 lr=0.001"
    expected = {**asdict(trials[1].config), "seed": 0}
    assert asdict(trials[0].config) == expected
    assert (
        trials[0].config.lambda_weight,
        trials[0].config.lambda_delta,
        trials[0].config.steps,
    ) == (0, 0.123457, 150)
    assert study("--search", "random", "--metric", "val/delta_cosine").space.objectives == (
        "val/delta_cosine",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--search", "magic"], "grid, random, optuna"),
        (["--study", "optuna_lambda", "--search", "grid"], "is a space"),
        (["--study", "phase_4_5", "--search", "random"], "no space"),
        (["--num-samples", "5"], "--num-samples is for a search"),
        (["--search", "random", "--num-samples", "0"], "at least 1"),
        (["--search", "random", "--objectives", "heldout/accuracy"], "heldout/accuracy"),
        (["--search", "random", "--lambda-delta", "1", "2", "3"], "two numbers"),
        (["--search", "random", "--lambda-delta", "0", "2"], "log scale"),
        (["--search", "random", "--model-size", "nano", "micro"], "one model size"),
        (["--search", "random", "--mixup", "0", "1"], "one mixup"),
        (["--n-tasks", "122"], r"n_tasks is 122, and the world has 121"),
        (["--n-teachers", "2"], r"n_teachers is 2, and the world has 1"),
        (["--n-trajectories", "17"], r"n_trajectories is 17, and the world has 16"),
        (["--n-tasks", "1"], r"one teacher has no spread"),
        (["--n-tasks", "-1"], "n_tasks is -1; it must be a whole number"),
        (["--n-trajectories", "4", "--delta-probes", "domain"], "n_trajectories limits"),
        (["--search", "random", "--n-tasks", "4", "8"], "one number of tasks"),
        (
            ["--mixup", "100"],
            "mixup asks for 12100 mixtures of 121 training adapters, which have 7260",
        ),
        (["--search", "random", "--mixup", "100"], "mixup asks for 12100 mixtures"),
        (["--mixup", "0.001"], "mixup asks for 0 mixtures"),
        (["--mixup", "2", "--n-tasks", "3"], "mixup asks for 6 mixtures of 3 training adapters"),
        (["--mixup", "1", "0.5", "0.499"], "mixup 0.5 and 0.499 are both 60 mixtures"),
        (["--mixup", "-1"], "mixup is -1.0; it must be a finite number of at least 0"),
        (["--study", "labels", "--mixup", "1"], "which mixtures do not have"),
        (["--scheduler", "hyperband"], "none, asha"),
        (["--generator", "magic"], "unknown generator 'magic'"),
        (["--study", "objectives", "--lambda-delta", "0"], "above 0"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--batch-size", "0"], "batch_size"),
        (["--study", "model_size", "--model-size", "nano", "nano"], "twice"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        study(*arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lambda-delta", "0", "--probe-chunk", "1"], "--probe-chunk is about the delta loss"),
        (["--lambda-delta", "0", "--activation-checkpointing"], "--activation-checkpointing is"),
        (["--lambda-delta", "0", "--delta-probes", "domain"], "--delta-probes is about"),
        (["--search", "random", "--lambda-delta", "0", "--probe-chunk", "1"], "--probe-chunk is"),
        (["--probe-chunk", "64"], "splits nothing"),
        (["--keep-best", "2"], "--keep-best is for --keep-artifacts best"),
        (
            ["--stream-bank", "often"],
            "unknown choice for --stream-bank 'often'; there are: auto, on, off",
        ),
        (["--stream-bank", "on", "--address", "auto"], "reads a file of this machine"),
        (["--keep-artifacts", "best", "--keep-best", "0"], "at least 1"),
        (["--keep-artifacts", "some"], "all, best, none"),
        (["--retry-failed", "--search", "random", "--num-samples", "3"], "no new points"),
        (["--lambda-delta", "1", "--seeds", "0", "--scheduler", "asha"], "compares trials"),
        (["--optuna-storage", "sqlite:///x"], "--optuna-storage is for a search"),
        (["--study", "{file}", "--steps", "7"], "--steps changes nothing in study own"),
        (["--study", "{file}", "--mixup", "1"], "--mixup changes nothing in study own"),
        (["--study", "{file}", "--seeds", "0", "1", "2"], None),
    ],
)
def test_an_option_that_does_nothing_is_refused(
    arguments: list[str], words: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        GOOD + "def f(o):\n    return replace(phase_4_5(StudyOptions(seeds=o.seeds)), name='own')"
    )
    options = parse_arguments([word.format(file=f"{file}:f") for word in arguments])
    if words is None:
        check_used(options, study_of(options))
        return
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        check_together(options)
        check_used(options, study_of(options))
    assert "\n" not in str(refused.value)


def test_what_makes_a_study_is_recorded_and_read_back() -> None:
    options = parse_arguments(
        "--smoke --seeds 0 1 --lambda-delta 1 --scheduler asha --cache x --dry-run".split()
    )
    record = json.loads(json.dumps(options.study.record()))
    assert StudyArguments.from_record(record) == options.study
    assert not {"cache", "dry_run"} & set(record)
    assert options.study.given == ["smoke", "lambda_delta", "seeds", "scheduler"]


def test_a_variant_changes_fields_that_there_are() -> None:
    with pytest.raises(UserError, match="lamda_weight"):
        make_trials(StudyOptions(), [Variant("typo", {"lamda_weight": 1.0})])
    joined = crossed([MULTITASK], [Variant("more", {"lambda_delta": 2.0}, "Why not?")])[0]
    assert joined.name == "multitask, more"
    assert joined.changes == {"lambda_weight": 0.3, "lambda_delta": 2.0}
    assert joined.why.endswith("Why not?")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The file that docs/studies.md shows."""
    code = DOCS.read_text().partition("```python\n")[2].partition("```")[0]
    file = tmp_path / code.partition("# ")[2].partition("\n")[0]
    file.write_text(code)
    return file


def test_the_documented_file_is_a_study(example: Path) -> None:
    options = StudyOptions(seeds=(0, 1))
    rates = make_study(f"{example}:rates", options)
    assert len(rates.trials) == 3 * 2 * 2
    fast = next(trial for trial in rates.trials if trial.name == "weight-only, fast, decayed")
    assert (fast.config.learning_rate, fast.config.weight_decay, fast.config.lambda_delta) == (
        4e-3,
        0.1,
        0,
    )
    assert "held by more decay?" in fast.note
    grid = make_study(f"{example}:small_grid", options)
    assert (len(grid.trials), grid.metric, grid.name) == (4, "val/delta_cosine", "small_grid")


def test_a_study_file_is_found_again_from_another_folder(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(example.parent)
    parsed = parse_arguments(["--study", f"{example.name}:rates"])
    monkeypatch.chdir("/")
    assert study_of(parsed).name == "rates"


def test_the_table_of_the_documentation_has_every_study() -> None:
    assert re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE) == list(STUDIES)


GOOD = "from dataclasses import replace\nfrom tuning.studies import *\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(options:\n    pass", ["line 1", "SyntaxError"]),
        ("import nowhere_at_all", ["line 1", "nowhere_at_all"]),
        ("import sys\nsys.exit(3)", ["line 2", "SystemExit"]),
        ("def g(options):\n    return None\n", ["has no function f", "it has: g"]),
        ("f = 3", ["has no function f", "none"]),
        ("def f(options):\n    return 1 / 0", ["line 2", "ZeroDivisionError"]),
        ("def f():\n    return None", ["TypeError", "argument"]),
        ("def f(options):\n    return [1, 2]", ["returned a list", "Study"]),
        (
            GOOD
            + "def f(options):\n    t = phase_4_5(options).trials\n    return Study('x', t + t[:1])",
            ["line 5", "twice", "multitask"],
        ),
        (
            GOOD + "def f(options):\n    return replace(phase_4_5(options), metric='val/loss')",
            ["line 4", "'val/loss'", "val/accuracy"],
        ),
        (
            GOOD + "def f(options):\n    return Study('x', list(phase_4_5(options).trials))",
            ["tuple of TrialSpec"],
        ),
        (GOOD + "def f(options):\n    return Study('x')", ["no trial"]),
        (
            GOOD + "def f(options):\n    return replace(phase_4_5(options), name=' ')",
            ["line 4", "the name of a study is ' '"],
        ),
        (
            GOOD
            + "def f(options):\n    return Study('x', make_trials(options, [Variant('a\\nb')]))",
            ["the name of a configuration is 'a\\nb'"],
        ),
        (
            GOOD
            + "def f(options):\n    return Study('x', make_trials(options, [Variant('x' * 201)]))",
            ["at most 200 letters"],
        ),
        (
            GOOD
            + "def f(options):\n    v = [Variant('a', {'n_tasks': n}) for n in (0, 4)]\n"
            + "    return Study('x', make_trials(options, v))",
            ["line 5", "two configurations of the name 'a'"],
        ),
        (GOOD + "def f(options):\n    return Study('x', space=3)", ["SearchSpace"]),
        (
            GOOD + "def f(options):\n    return phase_4_5(replace(options, lambda_weight=(-1.0,)))",
            ["lambda_weight is -1"],
        ),
    ],
)
def test_a_wrong_study_file_is_one_sentence(
    text: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    assert main(["--study", "mine.py:f", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    )
    assert all(word in captured.err for word in words), captured.err
    assert not list(tmp_path.rglob("*.db"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.py:f", "no study file"),
        ("mine.py", "names no function"),
        ("mine.py:1", "names no function"),
        ("x", "lambda_grid"),
    ],
)
def test_a_study_that_is_nowhere_is_one_sentence(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        make_study(name, StudyOptions())
