"""The report: what it says against its numbers, and that of a past study from its store alone."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_study import BASELINES, LAMBDAS, TASKS, log_trial, make_study

from tuning.report import (
    StudyRecord,
    collect_baselines,
    find_study,
    read_study,
    result_json,
    summary,
    write_report,
)
from tuning.report.__main__ import main
from tuning.report.amounts import lines_of, plot_amounts
from tuning.report.delta_map import DeltaMap
from tuning.report.groups import compare, group_trials
from tuning.report.plots import plot_heat_map
from tuning.report.seconds import accuracy_after, seconds_table
from tuning.tracking.runs import TrialResult, read_trials
from tuning.tracking.study import StudyTracker

VALUES = {
    "multitask": (0.60, 0.70, 0.65),
    "weight-only": (0.40, 0.52, 0.43),
    "delta-only": (0.61, 0.66, 0.68),
}
EFFECTS = {"multitask": 0.3, "delta-only": 0.31, "weight-only": 0.0}


def trial(config: str, seed: int, accuracy: float, status: str = "FINISHED") -> TrialResult:
    metrics = {
        "heldout/accuracy": accuracy,
        "heldout/delta_cosine": 0.9,
        "train/accuracy": 0.95,
        "time/seconds": 60.0,
    }
    metrics |= {"heldout/accuracy_shuffled_prompts": 0.0}
    curves = {
        "val/accuracy": [(10, accuracy / 2), (20, accuracy)],
        "loss/total": [(1, 2.0), (2, 1.0)],
    }
    params = {"model_size": "nano", "seed": str(seed)}
    return TrialResult(
        f"{config}{seed}", config, seed, status, metrics, curves, params, f"run{config}{seed}"
    )


def trials() -> list[TrialResult]:
    return [
        trial(config, seed, value)
        for config, values in VALUES.items()
        for seed, value in enumerate(values)
    ]


def record(every: list[TrialResult]) -> StudyRecord:
    return StudyRecord("study", tuple(every), BASELINES, deltas=(delta_map(),))


def delta_map() -> DeltaMap:
    rng = np.random.default_rng(0)
    names = tuple(f"{op}/{op}-{form}" for op in ("reverse", "copy") for form in ("stars", "dashes"))
    return DeltaMap(rng.normal(size=(4, 16)), rng.normal(size=(4, 16)), names, "multitask", "nano")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StudyTracker:
    """A store with one made study of three configurations, three seeds and twelve held-out tasks."""
    return make_study(tmp_path_factory.mktemp("made"), EFFECTS)


def row_of(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(f"| {name}"))


def test_the_table_holds_mean_and_sample_deviation() -> None:
    table = summary(record(trials()))
    for config, values in VALUES.items():
        assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in row_of(table, config)
    for name in BASELINES:
        assert row_of(table, name)


def test_the_interval_of_an_accuracy_lies_within_its_values() -> None:
    (group,) = group_trials(
        [trial("multitask", seed, value) for seed, value in enumerate((0.0, 0.1, 0.9))]
    )
    cell = group.cell("heldout/accuracy")
    assert cell is not None and cell.interval == (0.0, 1.0)
    low = [trial("weight-only", seed, 0.9 - value) for seed, value in enumerate((0.0, 0.1, 0.9))]
    (difference,) = compare(group_trials([*group.trials, *low]))
    assert difference.interval is not None and difference.interval[0] == -1.0
    changed = [
        replace(one, metrics={"heldout/delta_cosine": seed - 0.5})
        for seed, one in enumerate(group.trials)
    ]
    other = replace(group, trials=tuple(changed)).cell("heldout/delta_cosine")
    assert other is not None and other.interval is not None and other.interval[0] < -1


def test_a_failed_stopped_or_superseded_trial_is_said_and_not_counted() -> None:
    lost = trial("multitask", 3, 0.0, "FAILED")
    stopped = replace(trial("multitask", 4, 0.0), stopped_at=7)
    old = replace(trial("multitask", 5, 0.0), superseded=True)
    text = summary(record([*trials(), lost, stopped, old]))
    assert f"{np.mean(VALUES['multitask']):.3f}" in row_of(text, "multitask")
    assert "1 of 11 trials did not finish" in text and "multitask seed 3" in text
    assert "1 trial stopped early" in text and "seed 4 at step 7" in text
    assert "1 run begun anew" in text


def test_a_worse_method_is_called_worse() -> None:
    flipped = [trial("multitask", s, 0.2 + 0.01 * s) for s in range(3)]
    flipped += [trial("weight-only", s, 0.5 - 0.01 * s) for s in range(3)]
    top = summary(record(flipped)).splitlines()[0]
    assert top.index("weight-only") < top.index("multitask")
    assert "did not help" in top


def test_the_top_says_what_can_be_concluded_and_what_cannot(made: StudyTracker) -> None:
    top = summary(read_study(made.tracking_uri, made.parent_run_id)).splitlines()[0]
    assert re.search(
        r"^\*\*delta-only\*\* has the highest .* higher than weight-only \(difference \+0.3", top
    )
    assert "whether it differs from multitask cannot be concluded" in top
    assert "3 seeds × 12 tasks" in top


def test_one_seed_claims_no_spread() -> None:
    assert "±" not in row_of(summary(record([trial("multitask", 0, 0.5)])), "multitask")


def test_no_finished_trial_still_makes_a_report(tmp_path: Path) -> None:
    failed = record([trial("multitask", 0, float("nan"), "FAILED")])
    assert "nothing to conclude" in write_report(tmp_path, failed)
    assert "0 of 1 trial counted" in (tmp_path / "report.md").read_text()
    json.dumps(result_json(failed), allow_nan=False)


def test_baselines_are_found_again_in_the_parents_metrics() -> None:
    logged = {
        "baseline/ridge/accuracy": 0.4,
        "baseline/ridge/delta_cosine": 0.8,
        "world/nano/base_accuracy": 0.0,
    }
    assert collect_baselines(logged) == {"ridge": {"accuracy": 0.4, "delta_cosine": 0.8}}
    sized = {"baseline/best_single_nano/accuracy": 0.1, "baseline/best_single_micro/accuracy": 0.2}
    found = collect_baselines(sized, ["nano", "micro"])
    assert found == {
        "best_single (nano)": {"accuracy": 0.1},
        "best_single (micro)": {"accuracy": 0.2},
    }


@pytest.fixture(scope="module")
def written(made: StudyTracker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `python -m tuning.report` writes for the made study."""
    out = tmp_path_factory.mktemp("report")
    assert main(["made0001", "--tracking-uri", made.tracking_uri, "--out", str(out)]) == 0
    return out


def test_a_past_study_is_reported_from_its_store_alone(written: Path) -> None:
    text = (written / "report.md").read_text()
    wanted = (
        "Results",
        "Differences in heldout/accuracy",
        "Learning curves",
        "Held-out tasks",
        "Delta maps",
    )
    for title in (*wanted, "Memorisation", "Seconds and memory", "Baselines", "Trials"):
        assert f"\n## {title}\n" in text
    assert all(f"| {task} " in text for task in TASKS)
    assert "[0.97]" not in text and "*teacher*" in text
    with (written / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["lambda_delta"] for row in rows} == {"0.0", "1.0"}
    found = json.loads((written / "results.json").read_text())
    by_config = {row["configuration"]: [] for row in rows}
    for row in rows:
        by_config[row["configuration"]].append(float(row["heldout/accuracy"]))
    for group in found["configurations"]:
        assert group["metrics"]["heldout/accuracy"]["mean"] == pytest.approx(
            np.mean(by_config[group["config"]])
        )


def test_the_page_needs_nothing_beside_itself(written: Path) -> None:
    page = (written / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len([s for s in sources if s.startswith("data:image/png;base64,")]) == 4
    assert all(s.startswith(("data:", "#")) for s in sources)
    ids = set(re.findall(r'<h2 id="([^"]+)"', page))
    assert ids and {s[1:] for s in sources if s.startswith("#")} == ids
    assert "<script" not in page and "prefers-color-scheme: dark" in page


def test_names_from_a_store_cannot_break_the_page(tmp_path: Path) -> None:
    bad = [replace(t, config="a|b <script>alert(1)</script>") for t in trials()[:3]]
    write_report(tmp_path, record(bad))
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "a|b &lt;script&gt;" in page


def test_a_grid_of_lambdas_has_a_heat_map_and_three_points_have_none(tmp_path: Path) -> None:
    grid = [(w, d) for w in (0.0, 0.3, 1.0) for d in (0.0, 1.0) if w or d]
    every = [
        replace(trial(f"{w} {d}", 0, 0.5), params={"lambda_weight": str(w), "lambda_delta": str(d)})
        for w, d in grid
    ]
    assert plot_heat_map(tmp_path / "grid.png", group_trials(every))
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    three = [t for t in every if t.config in {f"{w} {d}" for w, d in LAMBDAS.values()}]
    assert len(three) == 3 and plot_heat_map(tmp_path / "three.png", group_trials(three)) == ""


def of_amount(config: str, seed: int, accuracy: float, **params: str) -> TrialResult:
    known = {"steps": "400", "seed": str(seed), "world_seed": str(seed), "terms.kl": "1.0"}
    return replace(trial(config, seed, accuracy), params={**known, **params})


def test_configurations_that_differ_in_one_amount_form_a_line(tmp_path: Path) -> None:
    every = [
        of_amount(f"tasks={count}" if count else "kl", seed, 0.01 * (count or 90) + 0.1 * seed,
                  n_tasks=str(count))
        for count in (0, 48, 24)
        for seed in ((1, 2) if count == 24 else (0, 1))
    ]  # fmt: skip
    every += [of_amount("steps=100", 0, 0.3, steps="100")]
    every += [of_amount("another loss", 0, 0.9, **{"terms.kl": "0.5"}, n_tasks="24")]
    groups = group_trials(every)
    (line,) = lines_of(groups, "n_tasks")
    assert [(amount, group.config) for amount, group in line.points] == [
        *((24, "tasks=24"), (48, "tasks=48"), (0, "kl")),
    ]
    (steps,) = lines_of(groups, "steps")
    assert [group.config for _, group in steps.points] == ["steps=100", "kl"]
    assert lines_of(groups, "n_teachers") == []
    assert plot_amounts(tmp_path / "amounts.png", groups).startswith("Held-out accuracy by amount")
    assert (tmp_path / "amounts.png").read_bytes().startswith(b"\x89PNG")
    assert plot_amounts(tmp_path / "none.png", group_trials(trials())) == ""
    write_report(tmp_path / "report", record(every))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Accuracy by amount" in text and "(amounts.png)" in text


def timed(config: str, seed: int, rate: float, *values: float) -> TrialResult:
    """A trial that is measured every 100 steps, and once more when it has ended."""
    curve = tuple((100 * place, value) for place, value in enumerate((*values, 0.99), 1))
    one = replace(trial(config, seed, 0.5), params={"steps": str(100 * len(values))})
    metrics = {**one.metrics, "time/steps_per_second": rate}
    return replace(one, metrics=metrics, curves={"val/accuracy": curve})


def test_configurations_are_compared_after_equal_seconds(tmp_path: Path) -> None:
    quick = [timed("quick", seed, 20.0, 0.2, 0.3 + 0.1 * seed) for seed in range(3)]
    slow = [timed("slow", seed, 5.0, 0.4, 0.6, 0.8) for seed in range(3)]
    slower = [timed("slower", seed, 15.0 if seed else 12.0, 0.1, 0.5) for seed in range(2)]
    never = [timed("never measured by then", 0, 4.0, 0.7)]
    groups = group_trials([*quick, *slow, *slower, *never])
    # The quick one takes 200 steps in 10 s, in which the slow one takes 50 and the slower one 120 or 150.
    found = {group.config: accuracy_after(group, 10.0) for group in groups}
    assert found["quick"] == pytest.approx({"0": 0.3, "1": 0.4, "2": 0.5})
    assert found["slow"] == found["never measured by then"] == {}
    assert found["slower"] == pytest.approx({"0": 0.18, "1": 0.3})
    table = seconds_table(groups)
    assert "val/accuracy after these" in table
    assert [cell.strip() for cell in row_of(table, "quick").split("|")[2:-1]] == [
        *("10.0", "10.0", "0.400 ± 0.100", "0.400 ± 0.100")
    ]
    assert [cell.strip() for cell in row_of(table, "slow ").split("|")[2:-1]] == [
        *("60.0", "10.0", "–", "0.800 ± 0.000")
    ]
    micro = [replace(t, params={**t.params, "model_size": "micro"}) for t in (*slow, *slower)]
    both = seconds_table(group_trials([*quick, *slow, *micro]))
    assert "nan" not in both and row_of(both, "slower (micro)").split("|")[3].strip() == "15.0"
    later = {group.config: accuracy_after(group, 30.0) for group in groups}
    assert later["slow"] == pytest.approx(dict.fromkeys("012", 0.5))
    assert later["never measured by then"] == pytest.approx({"0": 0.7})
    assert seconds_table(group_trials(quick)) == seconds_table(group_trials(trials())) == ""
    write_report(tmp_path, record([*quick, *slow]))
    text = (tmp_path / "report.md").read_text()
    assert "## At equal seconds" in text and "Seconds are steps times" in text


def test_a_study_is_found_by_id_run_or_as_the_latest(made: StudyTracker) -> None:
    for asked in ("made0001", made.parent_run_id, "latest"):
        assert find_study(made.tracking_uri, asked, "llgbm").info.run_id == made.parent_run_id


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_an_unknown_study_names_the_known_ones(
    made: StudyTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["nothing", "--tracking-uri", made.tracking_uri], capsys)
    assert "no study 'nothing'" in line and "made0001 (made)" in line
    line = refused(["latest", "--tracking-uri", made.tracking_uri, "--experiment", "other"], capsys)
    assert "no experiment 'other'" in line and "llgbm" in line


def test_a_store_that_is_not_there_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["latest", "--tracking-uri", f"sqlite:///{tmp_path}/none/mlflow.db"], capsys)
    assert "no MLflow store" in line and not (tmp_path / "none").exists()


def test_a_store_of_a_newer_schema_is_named_so(
    made: StudyTracker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(made.tracking_uri.removeprefix("sqlite:///"))) as old:
        with closing(sqlite3.connect(copy)) as new:
            old.backup(new)
            new.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
            new.commit()
    assert "cannot be used" in refused(["latest", "--tracking-uri", f"sqlite:///{copy}"], capsys)


def test_a_damaged_artifact_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = StudyTracker.open(None, tmp_path, "llgbm")
    tracker.begin("damaged", "damaged1", {}, {})
    run_id = log_trial(tracker, "multitask", 0, {task: 0.5 for task in TASKS}, (0.3, 1.0))
    (broken,) = tmp_path.rglob("per_task.json")
    broken.write_text("{")
    out = tmp_path / "out"
    assert main(["damaged1", "--tracking-uri", tracker.tracking_uri, "--out", str(out)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert "per_task.json" in line and run_id in line
    assert line in (out / "report.md").read_text()


@pytest.mark.whole
def test_a_study_shows_its_best_trial_and_each_configuration_has_a_summary(tmp_path: Path) -> None:
    from tuning.report.document import publish_report
    from tuning.report.summaries import SUFFIX
    from tuning.ui import SUMMARY_VIEW, prepare

    tracker = make_study(tmp_path, {"multitask": 0.1, "weight-only": 0.0})
    for _ in range(2):
        publish_report(tracker)
    client = tracker.client
    results = [
        one for one in read_trials(tracker.tracking_uri, tracker.parent_run_id) if one.is_complete
    ]
    parent = client.get_run(tracker.parent_run_id).data.metrics
    best = max(results, key=lambda one: one.metrics["val/accuracy"])
    assert parent["heldout/accuracy"] == best.metrics["heldout/accuracy"]
    beside = client.get_experiment_by_name("llgbm" + SUFFIX)
    assert beside is not None
    summaries = client.search_runs([beside.experiment_id])
    found = {run.data.tags["llgbm.config"]: run.data.metrics for run in summaries}
    assert len(summaries) == 2 and found.keys() == {"multitask", "weight-only"}
    for config, metrics in found.items():
        values = [one.metrics["heldout/accuracy"] for one in results if one.config == config]
        assert metrics["heldout/accuracy"] == pytest.approx(np.mean(values))
        assert metrics["heldout/accuracy/sd"] == pytest.approx(np.std(values, ddof=1))
        assert metrics["heldout/accuracy/n"] == 3
        assert metrics["mean/loss/total"] > 0
    views = {name: keys for name, _, keys in prepare(tracker.tracking_uri)}
    assert views["llgbm" + SUFFIX] == [SUMMARY_VIEW] and len(views["llgbm"]) == 3
    assert [run.info.run_id for run in tracker.studies()] == [tracker.parent_run_id]
