"""What a dry run says: what is finished, what the rest costs and on what that is based; and that it changes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from statistics import median

import pytest

from llgbm.training import TrainingConfig
from llgbm.world import World
from tuning.dry_run import Plan, describe_cost, duration
from tuning.run_ablation import main
from tuning.search.points import PointQueue, open_search, optuna_url
from tuning.studies import STUDIES, Study, StudyOptions, phase_4_5
from tuning.studies.spec import TrialSpec
from tuning.tracking.costs import Costs, kind_of, kind_of_result, past_runs
from tuning.tracking.runs import TrialResult


def past(
    config: TrainingConfig,
    rate: float,
    seconds: float,
    trial_id: str = "x",
    stopped: int | None = None,
) -> TrialResult:
    """A run as MLflow gives it back: parameters are texts."""
    flat = {key: str(value) for key, value in config.as_dict().items() if key != "generator"}
    params = {
        **flat,
        **{f"generator.{key}": str(value) for key, value in config.as_dict()["generator"].items()},
    }
    metrics = {"time/steps_per_second": rate, "time/seconds": seconds}
    return TrialResult(
        trial_id, "", config.seed, "FINISHED", metrics, params=params, stopped_at=stopped
    )


def folder_hash(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(
        b"".join(str(path).encode() + path.read_bytes() for path in files)
    ).hexdigest()


@pytest.mark.whole
def test_a_dry_run_beside_a_finished_study_knows_it_and_changes_nothing(
    finished: tuple[Path, str],
    cache: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished[0])
    before = folder_hash(finished[0] / "mlruns")
    assert main(["--dry-run", "--smoke", "--cache", str(cache), "--seeds", "0", "1"]) == 0
    out = capsys.readouterr().out
    study = phase_4_5(StudyOptions(smoke=True, seeds=(0, 1)))
    for trial in study.trials:
        line = next(line for line in out.splitlines() if line.startswith(trial.id))
        assert ("finished" in line) == (trial.config.seed == 0)
        assert ("to run" in line) == (trial.config.seed == 1)
        assert "no past run" not in line
    assert "6 trials, 3 finished already, 3 to run: about" in out
    assert "from 3 past runs" in out
    assert (
        main(["--dry-run", "--smoke", "--cache", str(cache), "--steps", "7", "--batch-size", "3"])
        == 0
    )
    assert "no past run of their kind" in capsys.readouterr().out
    assert (
        main(
            [
                "--dry-run",
                "--smoke",
                "--cache",
                str(cache),
                "--search",
                "optuna",
                "--num-samples",
                "2",
            ]
        )
        == 0
    )
    searched = capsys.readouterr().out
    assert "in the Optuna study: none yet" in searched
    assert "4 trials, 0 finished already, 4 to run, 4 of them still to be drawn: about" in searched
    assert folder_hash(finished[0] / "mlruns") == before


@pytest.mark.whole
def test_an_estimate_is_the_median_step_and_the_median_rest(finished: tuple[Path, str]) -> None:
    runs = past_runs(None, finished[0], "llgbm")
    assert len(runs) == 3 and past_runs(None, finished[0], "another") == []
    config = TrainingConfig(steps=600)
    known = [
        past(config, rate, 600 / rate + rest)
        for rate, rest in ((2.0, 10.0), (4.0, 30.0), (5.0, 20.0))
    ]
    other = [
        past(TrainingConfig(steps=600, lambda_delta=0), 100.0, 6.0),
        past(config, 1.0, 9e9, stopped=100),
    ]
    costs = Costs([*known, *other])
    for steps in (100, 600):
        expected = steps * median([1 / 2, 1 / 4, 1 / 5]) + median([10, 30, 20])
        assert costs.seconds(TrainingConfig(steps=steps, seed=5, lambda_weight=7)) == pytest.approx(
            expected
        )
    assert costs.basis(config) == 3
    assert costs.seconds(TrainingConfig(batch_size=3)) is None


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(),
        TrainingConfig(lambda_weight=0, lambda_delta=1, delta_probes="domain"),
        TrainingConfig(
            lambda_weight=1,
            lambda_delta=0,
            use_small_model=False,
            batch_size=3,
            n_probes=1,
            n_prompts=2,
        ),
    ],
)
def test_a_run_is_of_the_kind_of_its_configuration(config: TrainingConfig) -> None:
    assert kind_of_result(past(config, 1.0, 1.0)) == kind_of(config)


def test_the_total_is_the_sum_over_concurrency_but_no_less_than_the_longest() -> None:
    study = phase_4_5(StudyOptions(seeds=(0,)))
    costs = Costs([past(trial.config, 6.0, 130.0) for trial in study.trials])
    said = {n: describe_cost(Plan(study, study.trials, 0, []), costs, n) for n in (1, 2, 8)}
    assert "about 6 min at 1 at a time (6 min in all)" in said[1]
    assert "about 3 min at 2 at a time" in said[2]
    assert "about 2 min at 8 at a time" in said[8]
    partly = Costs(costs.runs[:1])
    assert "nothing for 2 trials of a kind that has no past run" in describe_cost(
        Plan(study, study.trials, 0, []), partly, 1
    )
    assert [duration(s) for s in (71.6, 840, 11520)] == ["72 s", "14 min", "3.2 h"]


def test_a_search_shows_what_is_drawn_and_costs_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study: Study = STUDIES["optuna_lambda"](StudyOptions())
    assert study.space is not None
    search = PointQueue(study.space, open_search(study, optuna_url(None, tmp_path)), 3)
    first: TrialSpec | None = search.ask()
    assert first is not None
    before = folder_hash(tmp_path)
    assert main(["--dry-run", "--search", "optuna", "--num-samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "in the Optuna study: 1 running" in out
    assert first.id in out
    assert "6 trials, 0 finished already, 6 to run, 4 of them still to be drawn" in out
    assert folder_hash(tmp_path) == before


def test_what_a_stopped_trial_reached_is_no_end() -> None:
    config = TrainingConfig(steps=600)
    assert (
        past(config, 1.0, 1.0).last_result["finished"]
        and past(config, 1.0, 1.0).last_result["step"] == 600
    )
    stopped = past(config, 1.0, 1.0, stopped=200).last_result
    assert (stopped["step"], stopped["finished"]) == (200, False)
