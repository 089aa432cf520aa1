"""Define the options of the main job, each one field with its help text.

`StudyArguments` make a study: they are recorded with it, and `--resume` reads them back. `RunOptions` say how it is
run, `StoreOptions` where things are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from llgbm.generator.conditioning import CONDITIONS
from llgbm.models.load import SIZES
from llgbm.terms.registry import built_in_terms
from tuning.studies import spec
from tuning.studies.builtin import STUDIES
from tuning.studies.spec import SAMPLERS, VAL_METRICS

SEARCHES = ("grid", *reversed(SAMPLERS))
SCHEDULERS = ("none", "asha")
KEEP_ARTIFACTS = ("all", "best", "none")
POINTS = 20

# The groups of --help, in their order.
START = "start here"
COMPARED = "what is compared"
TRAINING = "how a trial is trained"
SEARCH = "how trials are chosen and stopped early"
BASE = "a base model of your own (default: the embedded one)"
DATA = "datasets of your own (default: the synthetic suite)"
AGAIN = "running a study again"
MACHINES = "machines and cost"
STORES = "where things are kept"
GROUPS = (START, COMPARED, TRAINING, SEARCH, BASE, DATA, AGAIN, MACHINES, STORES)


def _option(
    group: str,
    text: str,
    metavar: str | None = None,
    default: Any = None,
    variable: str | None = None,
) -> Any:
    """Make the field of an option; `variable` of the environment is its default where it is set."""
    how = {"group": group, "help": text, "metavar": metavar, "variable": variable}
    return field(default=default, metadata=how)


def _flag(group: str, text: str) -> Any:
    return _option(group, text, default=False)


@dataclass(frozen=True)
class StudyArguments:
    """Options that make a study. They are recorded with it, by the names of these fields."""

    smoke: bool = _flag(START, "small settings: a first look at everything in about a minute")
    study: str | None = _option(
        START,
        f"{', '.join(STUDIES)}, or your own as path/to/file.py:function "
        "(default: phase_4_5, or optuna_lambda for a search)",
        "NAME",
    )

    model_size: tuple[str, ...] | None = _option(
        COMPARED, f"of {', '.join(SIZES)} (default: nano)", "SIZE"
    )
    lambda_weight: tuple[float, ...] | None = _option(COMPARED, "weights of the weight loss", "λ")
    lambda_delta: tuple[float, ...] | None = _option(COMPARED, "weights of the delta loss", "λ")
    term: tuple[str, ...] | None = _option(
        COMPARED,
        "weights of loss terms, kl=1 delta=0.3,1 say, which are the whole loss then: "
        f"{', '.join(built_in_terms())}, or your own as package.module:Class (docs/terms.md)",
        "TERM=λ[,λ]",
    )
    term_option: tuple[str, ...] | None = _option(
        COMPARED, "options of loss terms, kl.temperature=2 say", "TERM.OPTION=X"
    )
    learning_rate: tuple[float, ...] | None = _option(
        COMPARED, f"learning rates (default: {spec.TRAINING.learning_rate})", "X"
    )
    mixup: tuple[float, ...] | None = _option(
        COMPARED,
        "mixtures of two teachers that are trained on, for each teacher (default: 0; of the study composition: 0 1)",
        "X",
    )
    n_tasks: tuple[int, ...] | None = _option(
        COMPARED, "training tasks that are drawn and trained on; 0 takes all (default: 0)", "N"
    )
    n_teachers: tuple[int, ...] | None = _option(
        COMPARED, "teachers of a task that are trained on; 0 takes all (default: 0)", "N"
    )
    n_trajectories: tuple[int, ...] | None = _option(
        COMPARED, "trajectories of a teacher that are trained on; 0 takes all (default: 0)", "N"
    )
    generator: tuple[str, ...] | None = _option(
        COMPARED,
        "generators by name, with options of their own where wanted: mixture,bases=32 default,pooling=attention "
        "(default: default)",
        "NAME[,OPTION=X]",
    )
    condition: tuple[str, ...] | None = _option(
        COMPARED,
        f"what a generator reads of a task, its prompts or its description in words: {', '.join(CONDITIONS)} "
        "(default: prompts)",
        "KIND",
    )
    prompt_tokens: tuple[int, ...] | None = _option(
        COMPARED,
        "states of the last N tokens of each prompt, where the encoder gives one vector a prompt with 0 (default: 0)",
        "N",
    )
    n_prompts_min: tuple[int, ...] | None = _option(
        COMPARED,
        "draw the number of prompts of a training sample, from N to 16; 0 always takes 16 (default: 0)",
        "N",
    )
    seeds: tuple[int, ...] | None = _option(COMPARED, "default: 0 1 2; of a search: 0 1", "N")
    world_seed: tuple[int, ...] | None = _option(
        COMPARED,
        "seeds of worlds: of base, teachers and split (default: 0; of the study worlds: 0 1 2)",
        "N",
    )
    metric: str | None = _option(
        COMPARED,
        "validation metric that chooses the best generator and that asha judges by: "
        f"{' or '.join(VAL_METRICS)} (default: the study's, which is {VAL_METRICS[0]})",
        "NAME",
    )

    steps: int | None = _option(
        TRAINING,
        f"training steps of each trial (default: {spec.TRAINING.steps}; with --smoke 60)",
        "N",
    )
    batch_size: int | None = _option(TRAINING, "tasks in a training step (default: 16)", "N")
    n_probes: int | None = _option(
        TRAINING, "probes of each task in a training step (default: 2)", "N"
    )
    trajectories: int | None = _option(
        TRAINING, "prompts of each task that its teacher answers, to be probes (default: 16)", "N"
    )
    trajectory_tokens: int | None = _option(
        TRAINING, "tokens at which such an answer is cut (default: 24)", "N"
    )
    delta_probes: str = _option(
        TRAINING, "trajectory (default), generic or domain", "KIND", "trajectory"
    )
    encoder: str = _option(
        TRAINING, "minilm (default), base, or a sentence-transformers folder", "NAME|DIR", "minilm"
    )
    activation_checkpointing: bool = _flag(
        TRAINING, "less memory in the delta loss, for more time; same gradients"
    )
    probe_chunk: int | None = _option(
        TRAINING, "probes in one pass (default: all); less memory, same gradients", "N"
    )

    search: str | None = _option(
        SEARCH,
        "grid: the study's own list of trials; random or optuna (TPE): points drawn from its space, of which two "
        "numbers after --lambda-weight, --lambda-delta, --learning-rate or in --term are a range, one fixes the value "
        "(default: what the study is made for)",
        "HOW",
    )
    num_samples: int | None = _option(
        SEARCH, f"points of a search, earlier runs' included (default: {POINTS})", "N"
    )
    objectives: tuple[str, ...] | None = _option(
        SEARCH,
        "what a search maximises, as mean over a point's seeds: one or both of "
        f"{', '.join(VAL_METRICS)} (default: the metric)",
        "NAME",
    )
    scheduler: str = _option(
        SEARCH,
        "none (default); or asha: stop the worse half of the trials at a quarter and at half of their steps",
        "NAME",
        "none",
    )

    base: str | None = _option(BASE, "a folder in the Hugging Face layout, or a hub id", "DIR|HUB")
    dtype: str = _option(BASE, "float32 (default), bfloat16 or float16", "TYPE", "float32")
    rank: int | None = _option(BASE, "LoRA rank (default: that of the size, else 8)", "N")
    alpha: float | None = _option(BASE, "LoRA alpha (default: twice the rank)", "X")
    target_modules: tuple[str, ...] | None = _option(
        BASE,
        "layers that are adapted, such as qkv_proj or c_attn (default: q_proj to down_proj)",
        "NAME",
    )
    teacher_steps: int | None = _option(BASE, "steps of each teacher (default: 150)", "N")
    teacher_rate: float | None = _option(BASE, "learning rate of teachers (default: 5e-4)", "X")
    adapters_per_task: int | None = _option(
        BASE, "teachers a task, of the embedded base too (default: 1; of datasets: 4 parts)", "N"
    )
    bank: str | None = _option(
        BASE, "trained teachers (`python -m llgbm teachers`, `bank import`)", "DIR"
    )

    suite: str | None = _option(
        DATA,
        "synthetic (default), or a suite that another package offers (docs/architecture.md)",
        "NAME",
    )
    data: str | None = _option(DATA, "folder of NAME_train.json, NAME_test.json, …", "DIR")
    tasks: tuple[str, ...] | None = _option(
        DATA, "datasets to train on, one of them to choose on", "NAME"
    )
    held_out: tuple[str, ...] | None = _option(DATA, "datasets that only the report sees", "NAME")
    validation: tuple[str, ...] | None = _option(
        DATA, "which of --tasks choose (default: one, named)", "NAME"
    )
    rows: int | None = _option(DATA, "rows used of each dataset (default: all)", "N")
    skip_bad_rows: bool = _flag(DATA, "leave bad rows out, and say so, instead of ending")
    longest_row: int | None = _option(
        DATA, "characters that a row may have; longer ones are bad rows (default: 20000)", "N"
    )

    @property
    def n_points(self) -> int:
        """Number of points of a search."""
        return POINTS if self.num_samples is None else self.num_samples

    @property
    def given(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        return [one.name for one in fields(self) if getattr(self, one.name) != one.default]

    def record(self) -> dict[str, Any]:
        """Return what is recorded with the study."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StudyArguments:
        """Read a record back; an option that it lacks is at its default."""
        return read_options(cls, record)


@dataclass(frozen=True)
class RunOptions:
    """Options that say how a study is run. No number depends on them."""

    dry_run: bool = _flag(START, "print the trials, their state and their cost; run nothing")
    resume: str | None = _option(
        AGAIN,
        "go on with an interrupted study: its id, or `latest`; finished and failed trials are left",
        "STUDY_ID",
    )
    retry_failed: bool = _flag(AGAIN, "run the failed trials again, and no others")
    retry_lost: bool = _flag(
        AGAIN,
        "run finished trials again whose artifacts are gone from the store, beside what has not finished",
    )
    retry_oom: bool = _flag(
        AGAIN,
        "try a trial that runs out of memory again with activation checkpointing, then with ever smaller probe chunks; "
        "same gradients",
    )
    fresh: bool = _flag(AGAIN, "run all trials anew, finished ones too")
    cpus_per_trial: float | None = _option(MACHINES, "CPUs of a trial (default: 1)", "X")
    gpus_per_trial: float | None = _option(MACHINES, "GPUs of a trial, fractions allowed", "X")
    max_concurrent: int | None = _option(MACHINES, "trials at once (default: what fits)", "N")
    address: str | None = _option(
        MACHINES, "a Ray cluster: auto, host:port or ray://host:port", "ADDRESS"
    )
    stream_bank: str = _option(
        MACHINES,
        "read teachers from the disk row by row: on, off, auto (default: where they would take half the memory)",
        "WHICH",
        "auto",
    )
    estimate: bool = _flag(
        MACHINES, "print parameters, FLOPs and memory of the trials, from shapes alone; run nothing"
    )
    debug: bool = _flag(MACHINES, "show tracebacks")

    @property
    def stream(self) -> str:
        """Return when a bank is read from the disk: never on a cluster, whose machines share no folder."""
        return "off" if self.address else self.stream_bank

    @property
    def is_preview(self) -> bool:
        return self.dry_run or self.estimate


@dataclass(frozen=True)
class StoreOptions:
    """Options that say where things are kept, and which."""

    cache: str = _option(STORES, "folder of worlds (default: ./.llgbm)", "DIR", ".llgbm")
    tracking_uri: str | None = _option(
        STORES,
        "an MLflow server (default: $MLFLOW_TRACKING_URI, else ./mlruns/mlflow.db)",
        "URI",
        variable="MLFLOW_TRACKING_URI",
    )
    experiment: str = _option(
        STORES,
        "MLflow experiment (default: $MLFLOW_EXPERIMENT_NAME, else llgbm)",
        "NAME",
        "llgbm",
        "MLFLOW_EXPERIMENT_NAME",
    )
    storage_path: str | None = _option(
        STORES,
        "where unfinished trials keep their state, a folder or s3://… that all machines reach (default: CACHE/sweeps)",
        "DIR",
    )
    optuna_storage: str | None = _option(
        STORES, "where a search is kept (default: optuna.db beside the MLflow store)", "URL"
    )
    keep_checkpoints: bool = _flag(STORES, "keep the state of finished trials too")
    keep_artifacts: str = _option(
        STORES,
        f"trials that keep their generated adapters: {', '.join(KEEP_ARTIFACTS)} (default: all)",
        "WHICH",
        "all",
    )
    keep_best: int | None = _option(
        STORES, "number of trials a size for --keep-artifacts best (default: 1)", "K"
    )

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache).expanduser().resolve()

    @property
    def storage(self) -> str:
        """Folder or address below which trials keep their state."""
        storage = self.storage_path or str(self.cache_folder / "sweeps")
        if "://" in storage:
            return storage
        return str(Path(storage).expanduser().resolve())


@dataclass(frozen=True)
class Options:
    """Whole command line."""

    study: StudyArguments = StudyArguments()
    run: RunOptions = RunOptions()
    stores: StoreOptions = StoreOptions()

    @property
    def optuna_url(self) -> str:
        """Return the storage of a search; its login is in the environment."""
        from tuning.search.points import optuna_url
        from tuning.tracking.store import without_login

        if self.stores.optuna_storage is not None:
            return without_login(self.stores.optuna_storage)
        return optuna_url(self.stores.tracking_uri, Path.cwd())


Part = TypeVar("Part", "StudyArguments", "RunOptions", "StoreOptions")


def read_options(part: type[Part], values: Mapping[str, Any]) -> Part:
    """Make options of the values that are theirs; a value that is missing is at its default."""
    own = {one.name: values[one.name] for one in fields(part) if one.name in values}
    lists = {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
    return part(**{**own, **lists})
