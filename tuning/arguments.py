"""The command line of the main job, and the study that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llgbm.models.load import SIZES
from llgbm.runtime import UserError
from tuning.studies import STUDIES, Study, StudyOptions
from tuning.studies.from_file import make_study, whole_name
from tuning.studies.own_world import add_world_arguments, custom_worlds
from tuning.studies.spec import SAMPLERS, VAL_METRICS
from tuning.sweep.artifacts import KEEP_ARTIFACTS

SEARCHES = ("grid", *reversed(SAMPLERS))
SCHEDULERS = ("none", "asha")
POINTS = 20


def parse_arguments(
    arguments: Sequence[str] | None, description: str | None = None
) -> argparse.Namespace:
    """Read the command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_study(parser.add_argument_group("what is run"))
    add_world_arguments(parser)
    _add_search(
        parser.add_argument_group("search (how a study's trials are chosen, and stopped early)")
    )
    _add_execution(parser.add_argument_group("how it is run"))
    _add_stores(parser.add_argument_group("where things are kept"))
    parsed = parser.parse_args(arguments)
    parsed.study = parsed.study and whole_name(parsed.study)
    return parsed


def _add_study(what: Any) -> None:
    what.add_argument(
        "--study",
        metavar="NAME",
        help=f"{', '.join(STUDIES)}, or your own as path/to/file.py:function "
        "(default: phase_4_5, or optuna_lambda for a search)",
    )
    what.add_argument(
        "--model-size", nargs="+", metavar="SIZE", help=f"of {', '.join(SIZES)} (default: nano)"
    )
    what.add_argument(
        "--lambda-weight", nargs="+", type=float, metavar="λ", help="weights of the weight loss"
    )
    what.add_argument(
        "--lambda-delta", nargs="+", type=float, metavar="λ", help="weights of the delta loss"
    )
    what.add_argument(
        "--learning-rate",
        nargs="+",
        type=float,
        metavar="X",
        help="learning rates (default: 0.002)",
    )
    what.add_argument(
        "--generator", nargs="+", metavar="NAME", help="generators by name (default: default)"
    )
    what.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="seeds (default: 0 1 2; of a search: 0 1)"
    )
    what.add_argument(
        "--steps", type=int, metavar="N", help="training steps of each trial (default: 600)"
    )
    what.add_argument(
        "--batch-size", type=int, metavar="N", help="tasks in a training step (default: 16)"
    )
    what.add_argument(
        "--activation-checkpointing", action="store_true", help="less memory a step, for more time"
    )
    what.add_argument(
        "--probe-chunk",
        type=int,
        metavar="N",
        help="probes in one pass (default: all; less memory)",
    )
    what.add_argument(
        "--delta-probes", default="trajectory", help="trajectory (default), generic or domain"
    )
    what.add_argument(
        "--encoder",
        default="minilm",
        help="minilm (default), base, or a sentence-transformers folder",
    )
    what.add_argument(
        "--metric",
        metavar="NAME",
        help="what the best generator is chosen by and asha judges by, on validation tasks: "
        f"{' or '.join(VAL_METRICS)} (default: the study's, which is {VAL_METRICS[0]})",
    )
    what.add_argument(
        "--smoke",
        action="store_true",
        help="toy settings: shows that everything runs, nothing else",
    )


def _add_search(search: Any) -> None:
    search.add_argument(
        "--search",
        metavar="HOW",
        help="grid: the study's own list of trials; random or optuna (TPE): points drawn from its space, of which "
        "two numbers after --lambda-weight, --lambda-delta or --learning-rate are a range and one fixes the value "
        "(default: what the study is made for)",
    )
    search.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help=f"points of a search, earlier runs' included (default: {POINTS})",
    )
    search.add_argument(
        "--objectives",
        nargs="+",
        metavar="NAME",
        help=f"what a search maximises, as mean over a point's seeds: one or both of {', '.join(VAL_METRICS)} "
        "(default: the metric)",
    )
    search.add_argument(
        "--scheduler",
        default="none",
        metavar="NAME",
        help="none (default); or asha: stop the worse half of the trials at a quarter and at half of their steps",
    )


def _add_execution(how: Any) -> None:
    how.add_argument(
        "--resume",
        metavar="STUDY_ID",
        help="go on with a study that was interrupted or killed: its id, or `latest`; what finished is not run again",
    )
    how.add_argument(
        "--retry-failed", action="store_true", help="run the failed trials again, and no others"
    )
    how.add_argument(
        "--fresh", action="store_true", help="run all trials anew, those that finished before too"
    )
    how.add_argument(
        "--cpus-per-trial", type=float, metavar="X", help="CPUs of a trial (default: 1)"
    )
    how.add_argument(
        "--gpus-per-trial", type=float, metavar="X", help="GPUs of a trial, fractions allowed"
    )
    how.add_argument(
        "--max-concurrent", type=int, metavar="N", help="trials at once (default: what fits)"
    )
    how.add_argument(
        "--address", metavar="ADDRESS", help="a Ray cluster: auto, host:port or ray://host:port"
    )
    how.add_argument(
        "--estimate",
        action="store_true",
        help="print parameters, FLOPs and memory of the study's trials, from their shapes alone; run nothing",
    )
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="print the trials, what is there already and what it would cost; run nothing",
    )
    how.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_stores(where: Any) -> None:
    where.add_argument(
        "--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)"
    )
    where.add_argument("--experiment", default="llgbm", help="MLflow experiment (default: llgbm)")
    where.add_argument(
        "--cache", default=".llgbm", metavar="DIR", help="where worlds are kept (default: ./.llgbm)"
    )
    where.add_argument(
        "--storage-path",
        metavar="DIR",
        help="where unfinished trials keep their state, a folder or s3://… that all machines reach "
        "(default: CACHE/sweeps)",
    )
    where.add_argument(
        "--keep-checkpoints", action="store_true", help="keep the state of finished trials too"
    )
    where.add_argument(
        "--keep-artifacts",
        choices=KEEP_ARTIFACTS,
        default="all",
        help="whose generated adapters are kept: of all trials, of the best, or none (default: all)",
    )
    where.add_argument(
        "--keep-best",
        type=int,
        default=1,
        metavar="K",
        help="how many trials a size are the best, for --keep-artifacts best (default: 1)",
    )
    where.add_argument(
        "--optuna-storage",
        metavar="URL",
        help="where a search is kept (default: optuna.db beside the MLflow store)",
    )


def study_of(arguments: argparse.Namespace) -> Study:
    """The study that the arguments ask for. Raises UserError for a bad value."""
    _one_of("search", arguments.search, SEARCHES)
    _one_of("scheduler", arguments.scheduler, SCHEDULERS)
    name = arguments.study or ("optuna_lambda" if arguments.search in SAMPLERS else "phase_4_5")
    study = make_study(name, _options(arguments))
    if arguments.metric is not None:
        study = replace(study, metric=arguments.metric)
    return _searched(study, arguments) if _wants_search(study, arguments) else study


def points_of(arguments: argparse.Namespace) -> int:
    """How many points a search is to have in the end."""
    return POINTS if arguments.num_samples is None else arguments.num_samples


def _options(arguments: argparse.Namespace) -> StudyOptions:
    def several(values: list | None) -> tuple | None:
        return None if values is None else tuple(values)

    worlds = custom_worlds(arguments)
    return StudyOptions(
        model_sizes=tuple(world.size for world in worlds) or several(arguments.model_size),
        own_worlds=worlds,
        lambda_weight=several(arguments.lambda_weight),
        lambda_delta=several(arguments.lambda_delta),
        learning_rates=several(arguments.learning_rate),
        generators=several(arguments.generator),
        seeds=several(arguments.seeds),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        activation_checkpointing=arguments.activation_checkpointing or None,
        probe_chunk=arguments.probe_chunk,
        delta_probes=arguments.delta_probes,
        encoder=arguments.encoder,
        smoke=arguments.smoke,
    )


def _one_of(what: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise UserError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")


def _wants_search(study: Study, arguments: argparse.Namespace) -> bool:
    """Whether points are drawn from the study's space. Raises UserError where the study and the options disagree."""
    if study.space is not None:
        if arguments.search == "grid":
            raise UserError(
                f"study {study.name} is a space, not a grid of trials: use --search random or optuna"
            )
        return True
    if arguments.search in SAMPLERS:
        raise UserError(
            f"study {study.name} has no space to search: use optuna_lambda, or --search grid"
        )
    for option in ("num_samples", "objectives", "optuna_storage"):
        if getattr(arguments, option) is not None:
            raise UserError(
                f"--{option.replace('_', '-')} is for a search: add --search random or optuna"
            )
    return False


def _searched(study: Study, arguments: argparse.Namespace) -> Study:
    """The study with the sampler and objectives asked for."""
    assert study.space is not None
    if arguments.num_samples is not None and arguments.num_samples < 1:
        raise UserError(f"num-samples is {arguments.num_samples}; it must be at least 1")
    objectives = arguments.objectives or (None if arguments.metric is None else [arguments.metric])
    changes: dict[str, Any] = {} if objectives is None else {"objectives": tuple(objectives)}
    if arguments.search is not None:
        changes["sampler"] = arguments.search
    return replace(study, space=replace(study.space, **changes))
