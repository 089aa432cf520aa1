"""The sentences of a report against the numbers that they are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_study import LAMBDAS, TASKS, log_trial, make_study

from tuning.report.__main__ import main
from tuning.report.record import StudyRecord
from tuning.report.words import caveats, headlines
from tuning.tracking.runs import ERROR_TAG, TrialResult
from tuning.tracking.trial import TrialTracker


def trials(
    config: str, *values: float, lambdas: tuple[float, float] | None = None
) -> list[TrialResult]:
    weight, delta = lambdas or LAMBDAS[config]
    params = {"model_size": "nano", "lambda_weight": str(weight), "lambda_delta": str(delta)}
    return [
        TrialResult(
            f"{config}{seed}",
            config,
            seed,
            "FINISHED",
            {"heldout/accuracy": value, "val/accuracy": value},
            params=params,
            run_id=f"run{config}{seed}",
        )
        for seed, value in enumerate(values)
    ]


def sentence(*groups: list[TrialResult], **changed: object) -> str:
    every = tuple(trial for group in groups for trial in group)
    (text,) = headlines(StudyRecord("study", every, {}, **changed))  # type: ignore[arg-type]
    return text


WEIGHTS = trials("weight-only", 0.50, 0.52, 0.48)


def test_nothing_is_said_of_supervision_where_none_was_run() -> None:
    other = trials("lr=1", 0.1, 0.2, 0.15, lambdas=(1.0, 0.0))
    text = sentence(WEIGHTS, other)
    assert "did not help" not in text and "no configuration with λ_d > 0 finished" in text


def test_it_did_not_help_needs_a_test_that_says_so() -> None:
    close = sentence(WEIGHTS, trials("multitask", 0.48, 0.55, 0.40))
    assert "did not help" not in close
    assert "whether behavioural supervision helps cannot be concluded" in close
    clear = sentence(WEIGHTS, trials("multitask", 0.20, 0.21, 0.19))
    assert "did not help here: multitask is lower than weight-only" in clear


def test_supervision_under_another_name_is_told_by_its_lambda() -> None:
    plain = trials("dnd", 0.20, 0.21, 0.19, lambdas=(1.0, 0.0))
    text = sentence(plain, trials("mine", 0.50, 0.52, 0.48, lambdas=(1.0, 0.5)))
    assert "helped here in mine" in text


def test_ties_are_told_as_ties() -> None:
    text = sentence(WEIGHTS, trials("multitask", 0.52, 0.50, 0.48))
    assert "**weight-only** and **multitask** share the highest" in text and "a tie" in text
    assert "has the highest" not in text


def test_one_lucky_seed_ranks_below_three() -> None:
    text = sentence(trials("multitask", 0.9), WEIGHTS, trials("delta-only", 0.3, 0.31, 0.32))
    assert text.startswith("**weight-only** has the highest")
    assert "not ranked for want of 3 seeds: multitask (0.900, 1 seed)" in text


def test_one_configuration_is_not_the_highest_of_anything() -> None:
    assert "the only configuration that finished" in sentence(WEIGHTS)


def test_forty_configurations_make_a_sentence_that_can_be_read() -> None:
    many = [
        trials(f"multitask w={i}", *(0.3 + i / 100 + s / 1000 for s in range(3)), lambdas=(i, 1.0))
        for i in range(1, 40)
    ]
    text = sentence(WEIGHTS, *many)
    assert len(text) < 2000 and "40 configurations" in text


def test_a_study_that_was_killed_says_how_far_it_came() -> None:
    killed = StudyRecord("study", tuple(WEIGHTS), {}, status="KILLED", planned=9)
    assert caveats(killed)[0] == "3 of 9 trials, study killed."
    assert "of 9" not in "".join(caveats(replace(killed, status="FINISHED", planned=3)))


@pytest.mark.whole
def test_the_cause_of_a_failure_is_on_the_screen_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = make_study(tmp_path, {"multitask": 0.2})
    assert tracker.target is not None
    log_trial(tracker, "weight-only", 0, dict.fromkeys(TASKS, 0.5), LAMBDAS["weight-only"])
    TrialTracker.open(tracker.target, "bad", "delta-only", {"seed": 7}, {}).close()
    tracker.finish_trial("bad", "FAILED", {ERROR_TAG: "the loss is not finite at step 3"})
    out = tmp_path / "out"
    assert main(["made0001", "--tracking-uri", tracker.tracking_uri, "--out", str(out)]) == 0
    wanted = "delta-only seed 7 (bad, FAILED: the loss is not finite at step 3)"
    assert wanted in capsys.readouterr().out
    assert (
        wanted in (out / "report.md").read_text() and wanted in (out / "results.json").read_text()
    )
