"""Random and Optuna search: what Optuna is told, what a killed driver leaves, what a scheduler may stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from faults import Sweep, kill_driver
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from llgbm.runtime import UserError, stream_seed
from llgbm.world import World
from tuning.arguments import parse_arguments, study_of
from tuning.search.points import (
    RETRY_OF,
    STOPPED,
    PointQueue,
    describe_best,
    find_search,
    open_search,
    optuna_url,
)
from tuning.studies import STUDIES, Study, StudyOptions
from tuning.studies.spec import SearchSpace, TrialSpec
from tuning.sweep.ray_tune import QueueSearcher
from tuning.tracking.costs import past_runs
from tuning.tracking.runs import measured

BOTH = ("val/accuracy", "val/delta_cosine")
SPACE = STUDIES["optuna_lambda"](StudyOptions()).space
assert SPACE is not None


def score(spec: TrialSpec) -> dict[str, Any]:
    """A landscape with its top at λ_w 0.3, λ_d 1 and rate 2e-3, and seeds that differ."""
    config = spec.config
    far = np.log10([config.lambda_weight / 0.3, config.lambda_delta, config.learning_rate / 2e-3])
    noise = stream_seed(spec.id) % 1000 / 1e5
    values = (1 - float(far @ far) / 4 - noise, 1 - abs(float(far[1])) / 3 - noise)
    return {"step": config.steps, "finished": True, **dict(zip(BOTH, values, strict=True))}


def fresh(space: SearchSpace, n_points: int, study: optuna.Study | None = None) -> PointQueue:
    directions = ["maximize"] * len(space.objectives)
    return PointQueue(
        space, study or optuna.create_study(directions=directions, study_name="s"), n_points
    )


def finish(
    search: PointQueue, result: Callable[[TrialSpec], dict[str, Any] | None] = score
) -> list[TrialSpec]:
    """Run what is asked for, one by one."""
    ran = []
    while (spec := search.ask()) is not None:
        ran.append(spec)
        search.tell(spec, result(spec))
    return ran


def params_of(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize(
    ("sampler", "objectives"), [("optuna", BOTH[:1]), ("random", BOTH[:1]), ("optuna", BOTH)]
)
def test_the_points_are_those_of_optunas_own_loop_over_means(
    sampler: str, objectives: tuple[str, ...]
) -> None:
    space = replace(SPACE, sampler=sampler, objectives=objectives, seeds=(0, 1, 2))
    search = fresh(space, 9)
    assert len(finish(search)) == 27

    def objective(trial: optuna.Trial) -> list[float]:
        point = {
            name: trial.suggest_float(name, *ends, log=True) for name, ends in space.ranges.items()
        }
        found = [score(spec) for spec in space.trials(point)]
        return [float(np.mean([result[name] for result in found])) for name in objectives]

    theirs = optuna.create_study(directions=["maximize"] * len(objectives))
    for number in range(9):
        seed = stream_seed("s", number) % 2**32
        kinds = {"random": optuna.samplers.RandomSampler, "optuna": optuna.samplers.TPESampler}
        more = {"n_startup_trials": 5, "constant_liar": True} if sampler == "optuna" else {}
        theirs.sampler = kinds[sampler](seed=seed, **more)
        theirs.optimize(objective, n_trials=1)
    assert params_of(search.study) == params_of(theirs)
    np.testing.assert_allclose(
        [t.values for t in search.study.trials], [t.values for t in theirs.trials], rtol=1e-12
    )


@given(
    kills=st.lists(st.booleans(), min_size=12, max_size=40),
    concurrent=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
@pytest.mark.whole
def test_a_driver_killed_anywhere_loses_and_doubles_no_point(
    kills: list[bool], concurrent: int, data: st.DataObject
) -> None:
    """What runs when a driver dies is lost, what has ended is known to MLflow; Optuna's storage is all that stays."""
    study = optuna.create_study(direction="maximize", study_name="s")
    done: dict[str, dict[str, Any]] = {}
    kill_at = iter(kills)
    search, running = fresh(SPACE, 4, study), []
    while True:
        while len(running) < concurrent and (spec := search.ask()) is not None:
            running.append(spec)
        if not running:
            break
        if next(kill_at, False):
            search, running = PointQueue(SPACE, study, 4, dict(done)), []
            continue
        spec = running.pop(data.draw(st.integers(0, len(running) - 1)))
        assert spec.id not in done
        done[spec.id] = score(spec)
        search.tell(spec, done[spec.id])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    assert len(done) == 4 * len(SPACE.seeds)
    assert {spec.id for spec in search.trials()} == set(done)
    if concurrent == 1:
        undisturbed = fresh(SPACE, 4)
        finish(undisturbed)
        assert params_of(study) == params_of(undisturbed.study)


def test_a_later_run_goes_on_and_runs_nothing_again(tmp_path: Path) -> None:
    study = replace(STUDIES["optuna_lambda"](StudyOptions()), space=SPACE)
    url = optuna_url(None, tmp_path)
    assert find_search(study, url) is None and not list(tmp_path.iterdir())
    first = PointQueue(SPACE, open_search(study, url), 3)
    assert len(finish(first)) == 6
    again = PointQueue(SPACE, open_search(study, url), 3)
    assert finish(again) == []
    more = PointQueue(SPACE, open_search(study, url), 5)
    assert len(finish(more)) == 4
    straight = fresh(
        SPACE, 5, optuna.create_study(direction="maximize", study_name=more.study.study_name)
    )
    finish(straight)
    assert params_of(more.study) == params_of(straight.study)
    other = replace(study, space=replace(SPACE, seeds=(5,)))
    assert find_search(other, url) is None and len(open_search(other, url).trials) == 0
    assert open_search(study, url, fresh=True).trials == []
    assert find_search(study, url).trials == []


def test_trials_that_ended_before_are_told_without_being_run() -> None:
    straight = fresh(SPACE, 3)
    known = {spec.id: score(spec) for spec in finish(straight)}
    search = PointQueue(SPACE, optuna.create_study(direction="maximize", study_name="s"), 3, known)
    assert search.ask() is None
    assert [t.values for t in search.study.trials] == [t.values for t in straight.study.trials]


def test_a_failed_seed_fails_its_point_and_no_other() -> None:
    search = fresh(SPACE, 3)

    def result(spec: TrialSpec) -> dict[str, Any]:
        fails = spec.config.seed == 0 and len(search.study.trials) == 1
        return {"step": 0, "failed": "the loss is nan"} if fails else score(spec)

    ran = finish(search, result)
    assert len(ran) == 6
    assert [t.state for t in search.study.trials] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    assert search.retry_failed() == 1
    retried = finish(search)
    assert [spec.id for spec in retried] == [ran[0].id]
    last = search.study.trials[-1]
    assert (last.state, last.user_attrs[RETRY_OF]) == (TrialState.COMPLETE, 0)
    assert last.params == search.study.trials[0].params
    assert len(search.trials()) == 6


@pytest.mark.parametrize("objectives", [BOTH[:1], BOTH])
def test_a_stopped_seed_counts_with_what_it_reached(objectives: tuple[str, ...]) -> None:
    search = fresh(replace(SPACE, objectives=objectives), 3)

    def result(spec: TrialSpec) -> dict[str, Any]:
        stopped = spec.config.seed == 1 and len(search.study.trials) == 2
        return {**score(spec), **({"step": 200, "finished": False} if stopped else {})}

    finish(search, result)
    point = search.study.trials[1]
    means = [
        np.mean([score(spec)[name] for spec in search.space.trials(point.params)])
        for name in objectives
    ]
    np.testing.assert_allclose(point.values, means, rtol=1e-12)
    assert point.user_attrs[STOPPED] == 200
    assert point.state == (TrialState.PRUNED if len(objectives) == 1 else TrialState.COMPLETE)
    said = describe_best(search.space, search.study)
    assert "best of 2 points" in said
    assert search.space.trials(point.params)[0].name not in said


def test_points_that_another_scheduler_stopped_are_run_to_their_end() -> None:
    search = fresh(SPACE, 3)
    ran = finish(search, lambda spec: {**score(spec), "step": 200, "finished": False})
    again = fresh(SPACE, 3, search.study)
    again.results.update(search.results)
    assert again.reopen_stopped() == 0 and again.is_done()
    whole = fresh(SPACE, 3, search.study)
    assert whole.reopen_stopped() == 3
    assert {spec.id for spec in finish(whole)} == {spec.id for spec in ran}
    states = [trial.state for trial in search.study.trials]
    assert states == [TrialState.PRUNED] * 3 + [TrialState.COMPLETE] * 3
    assert len(whole.trials()) == len(ran) and "best of 3 points" in whole.describe()
    assert fresh(SPACE, 3, search.study).reopen_stopped() == 0


def test_optunas_front_is_what_is_called_best() -> None:
    search = fresh(replace(SPACE, objectives=BOTH), 12)
    finish(search)
    front = {search.space.trials(t.params)[0].name for t in search.study.best_trials}
    said = describe_best(search.space, search.study)
    assert all(
        (search.space.trials(t.params)[0].name in said) == (t in search.study.best_trials)
        for t in search.study.trials
    )
    assert 1 <= len(front) <= 5


def test_optuna_comes_nearer_to_a_planted_top_than_random_does() -> None:
    def reached(sampler: str, repetition: int) -> float:
        space = replace(SPACE, sampler=sampler, seeds=(repetition,))
        study = optuna.create_study(direction="maximize", study_name=f"{repetition}")
        finish(fresh(space, 25, study))
        return study.best_value

    best = {
        sampler: np.mean([reached(sampler, n) for n in range(4)])
        for sampler in ("optuna", "random")
    }
    assert best["optuna"] > best["random"]


def test_half_a_point_is_no_point() -> None:
    study = optuna.create_study(direction="maximize", study_name="s")
    half = study.ask()
    half.suggest_float("lambda_weight", 0.03, 3.0, log=True)
    search = PointQueue(SPACE, study, 2)
    finish(search)
    straight = fresh(SPACE, 2)
    finish(straight)
    assert [t.state for t in study.trials] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    assert params_of(study)[1:] == params_of(straight.study)


def test_a_storage_that_fails_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = STUDIES["optuna_lambda"](StudyOptions(seeds=(0,)))
    url = optuna_url(None, tmp_path)
    search = PointQueue(study.space, open_search(study, url), 3, url=url)
    searcher = QueueSearcher(search)
    first, second = (searcher.suggest(name)["trial"] for name in "ab")
    database = tmp_path / "mlruns" / "optuna.db"
    search.study._storage.remove_session()
    database.rename(tmp_path / "away.db")
    database.mkdir()
    searcher.on_trial_complete("a", score(first))
    assert "told of a point later" in caplog.text
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("b", score(second))
    with pytest.raises(UserError, match="optuna.db cannot be used"):
        searcher.suggest("c")
    database.rmdir()
    (tmp_path / "away.db").rename(database)
    third = searcher.suggest("c")["trial"]
    searcher.on_trial_complete("c", score(third))
    assert searcher.suggest("d") == searcher.FINISHED
    assert [t.state for t in search.study.trials] == [TrialState.COMPLETE] * 3


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "cannot be used"),
        ("foo://bar", "foo"),
        ("sqlite:///{here}/text.db", "not a database"),
        ("sqlite:///{here}/text.db/below/optuna.db", "text.db"),
        ("postgresql://127.0.0.1:9/x", "cannot be used"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_sentence(
    url: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "text.db").write_text(
        "no database at all, and long enough to be looked at as one" * 20
    )
    with pytest.raises(UserError, match=words) as refused:
        open_search(STUDIES["optuna_lambda"](StudyOptions()), url.format(here=tmp_path))
    assert "\n" not in str(refused.value) and "--optuna-storage" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"objectives": ("heldout/accuracy",)}, "heldout/accuracy"),
        ({"objectives": ("val/accuracy", "val/accuracy")}, "none twice"),
        ({"sampler": "magic"}, "magic"),
        ({"lambda_delta": (0.0, 1.0)}, "log scale"),
        ({"lambda_delta": (2.0, 1.0)}, "in order"),
        ({"lambda_delta": (0.1, float("inf"))}, "finite"),
        (
            {"lambda_weight": (0, 0), "lambda_delta": (1, 1), "learning_rate": (1e-3, 1e-3)},
            "nothing to search",
        ),
    ],
)
def test_a_space_that_is_none_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(SPACE, **changes)


def test_a_fixed_field_is_no_parameter() -> None:
    space = replace(SPACE, lambda_weight=(0.3, 0.3))
    search = fresh(space, 2)
    assert {spec.config.lambda_weight for spec in finish(search)} == {0.3}
    assert {frozenset(params) for params in params_of(search.study)} == {
        frozenset(("lambda_delta", "learning_rate"))
    }


@pytest.mark.whole
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_search_is_told_what_its_trials_reached_and_asha_stops_the_worse(
    killed: bool, tmp_path: Path, cache: Path, world: World
) -> None:
    """Real Ray, MLflow and storage; killed when the second point was asked for and resumed, it ends the same."""
    what = ("--search", "random", "--num-samples", "7", "--seeds", "0", "--scheduler", "asha")
    sweep = Sweep(tmp_path, cache, *what, "--metric", "val/delta_cosine")
    sweep.how += ["--max-concurrent", "1"]
    study = study_of(parse_arguments(sweep.what))
    url = optuna_url(None, tmp_path)
    if killed:
        process = sweep.start()
        while len(states := [trial.state for trial in points(study, url)]) < 2:
            assert process.poll() is None, sweep.log()
            time.sleep(0.2)
        assert states == [TrialState.COMPLETE, TrialState.RUNNING]
        kill_driver(process)
    assert sweep.finish() == 0, sweep.log()

    found, runs = find_search(study, url), sweep.trials()
    assert found is not None and study.space is not None
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    stopped = {trial_id for trial_id, run in runs.items() if STOPPED in run.data.tags}
    for point in found.trials:
        (trial,) = study.space.trials(point.params)
        assert point.state == (TrialState.PRUNED if trial.id in stopped else TrialState.COMPLETE)
        assert point.values == [runs[trial.id].data.metrics["val/delta_cosine"]]
        assert ("heldout/accuracy" in measured(runs[trial.id])) == (trial.id not in stopped)
    assert len(found.trials) == len(runs) == 7
    assert 1 <= len(stopped) <= 6
    known = {run.trial_id: run.last_result for run in past_runs(None, tmp_path, "llgbm")}
    directly = PointQueue(
        study.space,
        optuna.create_study(direction="maximize", study_name=found.study_name),
        7,
        known,
    )
    assert directly.ask() is None
    assert params_of(directly.study) == params_of(found)
    if killed:
        _check_run_to_the_end(sweep, study, url, stopped)


def _check_run_to_the_end(sweep: Sweep, study: Study, url: str, stopped: set[str]) -> None:
    """Without a scheduler the same search goes on with what ASHA stopped, in the same runs."""
    before = {trial_id: run.info.run_id for trial_id, run in sweep.trials().items()}
    without = sweep.what.index("--scheduler")
    command = [*sweep.what[:without], *sweep.what[without + 2 :]]
    again = Sweep(sweep.folder, Path(), *command)
    again.how = sweep.how
    assert study_of(parse_arguments(command)).id == study.id
    assert again.finish("--debug", anew=True) == 0, again.log()
    runs, found = again.trials(), find_search(study, url)
    assert found is not None
    assert {trial_id: run.info.run_id for trial_id, run in runs.items()} == before
    for run in runs.values():
        assert STOPPED not in run.data.tags and "heldout/accuracy" in measured(run)
        steps = [m.step for m in again.client().get_metric_history(run.info.run_id, "loss/total")]
        assert steps == list(range(1, len(steps) + 1))
    reopened = [trial for trial in found.trials if RETRY_OF in trial.user_attrs]
    assert {trial.state for trial in reopened} == {TrialState.COMPLETE}
    assert len(reopened) == len(stopped)


def points(study: Study, url: str) -> list[optuna.trial.FrozenTrial]:
    """What a search has drawn so far; a storage that is being made counts as empty."""
    try:
        found = find_search(study, url)
        return found.trials if found else []
    except UserError:
        return []
