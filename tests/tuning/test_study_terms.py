"""Loss terms on the command line: grids, names, searches, plans, and options that fit nothing."""

from __future__ import annotations

import json

import pytest
from helpers import ROOT

from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from tuning.arguments import check_used, parse_arguments, study_of
from tuning.report.groups import Group, reference_of
from tuning.report.record import StudyRecord
from tuning.report.words import caveats
from tuning.studies import Study
from tuning.studies.options import Options
from tuning.sweep.worker import trial_params
from tuning.tracking.costs import kind_of, kind_of_result
from tuning.tracking.notes import trial_note
from tuning.tracking.runs import TrialResult, flat_params


def made(command: str) -> Study:
    options = parse_arguments(command.split())
    study = study_of(options)
    check_used(options, study)
    return study


def weights(study: Study) -> list[tuple[str, dict[str, float]]]:
    return [(trial.name, trial.config.weights) for trial in study.trials]


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("--term kl=1", [("kl=1", {"kl": 1})]),
        ("--term delta=0.5", [("delta-only w=0 d=0.5", {"delta": 0.5})]),
        (
            "--term kl=0,2 delta=1",
            [
                ("delta-only w=0 d=1", {"delta": 1}),
                ("delta=1 kl=2", {"delta": 1, "kl": 2}),
            ],
        ),
        (
            "--term kl=0,1 --lambda-weight 0.3",
            [
                ("weight-only w=0.3 d=0", {"weight": 0.3}),
                ("weight=0.3 kl=1", {"weight": 0.3, "kl": 1}),
            ],
        ),
        (
            "--term kl=0,1 answers=0,2",
            [
                ("answers=2", {"answers": 2}),
                ("kl=1", {"kl": 1}),
                ("answers=2 kl=1", {"kl": 1, "answers": 2}),
            ],
        ),
    ],
)
def test_weights_of_terms_make_a_grid(command: str, wanted: list) -> None:
    assert dict(weights(made(f"{command} --seeds 0"))) == dict(wanted)


def test_the_same_loss_has_one_id_however_it_is_written() -> None:
    same = ("--lambda-weight 0 --lambda-delta 1", "--term delta=1", "--term delta=1.0 kl=0")
    ids = {made(f"{command} --seeds 0").trials[0].id for command in same}
    held = json.loads((ROOT / "tests" / "data" / "ids.json").read_text())["studies"]
    alone = held["--study phase_4_5"]["trials"]["'delta-only' on nano, seed 0"]
    assert ids == {alone}, "that of delta-only without any mention of terms"


def test_options_go_to_the_trials_that_have_the_term() -> None:
    study = made("--term delta=1 kl=0,1 --term-option kl.temperature=2 --seeds 0")
    assert [trial.config.term_options for trial in study.trials] == [{}, {"kl.temperature": 2.0}]


def test_the_study_of_terms_compares_four_losses() -> None:
    study = made("--study terms")
    assert [w for _, w in weights(study)][::3] == [
        {"delta": 1.0},
        {"kl": 1.0},
        {"delta": 1.0, "kl": 1.0},
        {"weight": 1.0},
    ]
    assert len(study.trials) == 12 and all(trial.note for trial in study.trials)


def test_behaviour_is_compared_with_true_labels() -> None:
    found = weights(made("--study labels --seeds 0"))
    assert found[-1] == ("true labels", {"labels": 1.0})
    assert [name for name, _ in found[:-1]] == ["delta-only", "kl", "delta + kl"]
    chosen = weights(made("--study labels --term kl=1 answers=1 --seeds 0"))
    assert [name for name, _ in chosen] == ["answers=1 kl=1", "true labels"]


def test_a_search_draws_weights_of_terms() -> None:
    space = made("--search random --term kl=0.1,10 answers=0.5 --lambda-weight 0").space
    assert space is not None
    assert space.ranges["terms.kl"] == (0.1, 10) and "terms.answers" not in space.ranges
    point = {"terms.kl": 3.0, "lambda_delta": 1.0, "learning_rate": 0.001}
    trials = space.trials(point)
    assert trials[0].config.weights == {"delta": 1.0, "answers": 0.5, "kl": 3.0}
    assert trials[0].name == "w=0 d=1 lr=0.001 answers=0.5 kl=3"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--term kl", "written name=1"),
        ("--term kl=one", "'one', no number"),
        ("--term kl=-1", "at least 0"),
        ("--term kl=nan", "finite"),
        ("--term kl=1 kl=2", "given twice"),
        ("--term l7=1", "unknown loss term 'l7'"),
        ("--term delta=1 --lambda-delta 1", "leave --lambda-delta out"),
        ("--term kl=0", "no loss to train on"),
        ("--term kl=1 --term-option temperature=2", "unknown loss term"),
        ("--term kl=1 --term-option kl.heat=2", "has no option 'heat'"),
        ("--term kl=1 --term-option kl.temperature=-2", "must be above 0"),
        ("--term kl=1 --term-option answers.x=2", "answers has no option"),
        ("--term delta=1 --term-option kl.temperature=2", "no trial of this study has"),
        ("--term weight=1 --probe-chunk 1", "is about the delta loss"),
        ("--search random --term kl=0,1", "log scale"),
    ],
)
def test_what_makes_no_loss_is_a_users_mistake(command: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(command)


def test_settings_of_probes_serve_any_term_that_reads_them() -> None:
    made("--term kl=1 --probe-chunk 1 --activation-checkpointing")
    made("--search random --term kl=0.1,1 --lambda-delta 0 --probe-chunk 1")


def test_probes_of_a_step_and_trajectories_are_options() -> None:
    study = made("--term kl=1 --trajectories 64 --trajectory-tokens 32 --n-probes 4 --seeds 0")
    teachers = study.trials[0].world.teachers
    assert (teachers.trajectories, teachers.max_tokens) == (64, 32)
    assert study.trials[0].config.n_probes == 4
    plain = made("--term kl=1 --trajectories 16 --trajectory-tokens 24 --n-probes 2 --seeds 0")
    assert plain.trials[0].id == made("--term kl=1 --seeds 0").trials[0].id


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--term weight=1 --trajectories 64", "is about the delta loss"),
        ("--term kl=1 --delta-probes generic --trajectories 64", "is about trajectories"),
        ("--term kl=1 --trajectories 0", "one trajectory"),
        ("--term kl=1 --trajectory-tokens 0", "one token"),
        ("--term kl=1 --n-probes 0", "n_probes is 0"),
    ],
)
def test_trajectories_that_nothing_uses_are_refused(command: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(command)


def result_of(command: str) -> TrialResult:
    trial = made(f"{command} --seeds 0").trials[0]
    params = dict(flat_params(trial_params(trial)))
    return TrialResult("id", trial.name, 0, "FINISHED", {"heldout/accuracy": 0.5}, params=params)


def group_of(command: str) -> Group:
    result = result_of(command)
    return Group(result.config, "nano", result.config, (result,))


@pytest.mark.parametrize(
    ("command", "supervised"),
    [
        ("--term kl=1", True),
        ("--term answers=1 weight=1", True),
        ("--term weight=1", False),
        ("--lambda-weight 1 --lambda-delta 1", True),
    ],
)
def test_a_report_knows_what_a_run_was_supervised_by(command: str, supervised: bool) -> None:
    group = group_of(command)
    assert group.is_supervised is supervised and not group.uses_labels
    assert (group.lambdas is None) is ("kl" in command or "answers" in command)


def test_the_reference_is_what_matches_weights_alone() -> None:
    terms = ("labels=1", "kl=1", "delta=1", "weight=1")
    groups = [group_of(f"--term {term}") for term in terms]
    assert reference_of(groups, "nano") is groups[3]
    assert reference_of(groups[:2], "nano") is groups[1]


def test_a_run_on_true_labels_is_titled_a_reference() -> None:
    study = made("--term labels=0,1 kl=1 --seeds 0")
    assert [trial.name for trial in study.trials] == ["kl=1", "kl=1 labels=1 (true labels)"]
    assert "a reference" in study.trials[1].note
    assert "True labels are used" in trial_note(study.trials[1])
    group = group_of("--term labels=1 delta=1")
    assert group.uses_labels and not group.is_supervised
    said = caveats(StudyRecord("study", group.trials, {}))
    assert any("trained on true labels: a reference" in line for line in said)


@pytest.mark.parametrize(
    "command", ["--term kl=1", "--term delta=1", "--term weight=1", "--term weight=1 kl=1"]
)
def test_time_is_estimated_from_runs_with_the_same_losses(command: str) -> None:
    config = made(f"{command} --seeds 0").trials[0].config
    assert kind_of(config) == kind_of_result(result_of(command))
    assert kind_of(config) != kind_of(TrainingConfig())


def test_a_note_says_what_the_loss_is() -> None:
    note = trial_note(made("--term kl=1 delta=0.5 --seeds 0").trials[0])
    assert "delta = 0.5 (" in note and "kl = 1 (KL divergence" in note and "terms.kl" in note


def test_a_study_from_a_file_that_ignores_terms_is_told(tmp_path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from tuning.studies import Study, Variant, make_trials\n"
        "def f(options):\n    return Study('f', make_trials(options, [Variant('plain')]))\n"
    )
    with pytest.raises(UserError, match="--term changes nothing"):
        made(f"--study {file}:f --term kl=1")
    assert Options().study.term is None
