"""Read the command line of the main job into frozen options, and make the study that they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from llgbm.runtime import UserError
from tuning.studies import Study, StudyOptions
from tuning.studies.from_file import make_study, whole_name
from tuning.studies.options import (
    GROUPS,
    KEEP_ARTIFACTS,
    SCHEDULERS,
    SEARCHES,
    Options,
    RunOptions,
    StoreOptions,
    StudyArguments,
    read_options,
)
from tuning.studies.own_world import custom_worlds
from tuning.studies.spec import SAMPLERS

PARTS = (StudyArguments, RunOptions, StoreOptions)


def parse_arguments(arguments: Sequence[str] | None, description: str | None = None) -> Options:
    """Read the command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTIONS]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for part in PARTS:
        hints = get_type_hints(part)
        for one in fields(part):
            _add_option(groups[one.metadata["group"]], one, hints[one.name])
    parsed = vars(parser.parse_args(arguments))
    parsed["study"] = parsed["study"] and whole_name(parsed["study"])
    return Options(
        read_options(StudyArguments, parsed),
        read_options(RunOptions, parsed),
        read_options(StoreOptions, parsed),
    )


def _add_option(group: Any, one: Field, hint: Any) -> None:
    """Add an option as its field's type says: a flag, one value, or several."""
    set_there = os.environ.get(one.metadata["variable"] or "")
    how: dict[str, Any] = {"help": one.metadata["help"], "default": set_there or one.default}
    if hint is bool:
        how["action"] = "store_true"
    else:
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
        how |= {"metavar": one.metadata["metavar"], "type": kinds[0]}
    if get_origin(how.get("type")) is tuple:
        how |= {"nargs": "+", "type": get_args(how["type"])[0]}
    group.add_argument(_spelled(one.name), **how)


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def study_of(options: Options) -> Study:
    """Make the study that the options ask for. Raises UserError for a bad value."""
    arguments = options.study
    _one_of("search", arguments.search, SEARCHES)
    _one_of("scheduler", arguments.scheduler, SCHEDULERS)
    default = "optuna_lambda" if arguments.search in SAMPLERS else "phase_4_5"
    study_options = _study_options(arguments, download=not options.run.is_preview)
    study = make_study(arguments.study or default, study_options)
    if arguments.metric is not None:
        study = replace(study, metric=arguments.metric)
    if not _wants_search(study, arguments):
        return study
    return _searched(study, arguments)


def _study_options(arguments: StudyArguments, download: bool) -> StudyOptions:
    worlds = custom_worlds(arguments, download)
    return StudyOptions(
        model_sizes=tuple(world.size for world in worlds) or arguments.model_size,
        own_worlds=worlds,
        lambda_weight=arguments.lambda_weight,
        lambda_delta=arguments.lambda_delta,
        learning_rates=arguments.learning_rate,
        generators=arguments.generator,
        seeds=arguments.seeds,
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


def _wants_search(study: Study, arguments: StudyArguments) -> bool:
    """Say if points are drawn from the study's space. Raises UserError if the options do not fit the study."""
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
    for option in ("num_samples", "objectives"):
        if getattr(arguments, option) is not None:
            raise UserError(f"{_spelled(option)} is for a search: add --search random or optuna")
    return False


def _searched(study: Study, arguments: StudyArguments) -> Study:
    """Give the study the sampler and the objectives asked for."""
    assert study.space is not None
    if arguments.n_points < 1:
        raise UserError(f"num-samples is {arguments.num_samples}; it must be at least 1")
    changes: dict[str, Any] = {}
    if arguments.metric is not None:
        changes["objectives"] = (arguments.metric,)
    if arguments.objectives is not None:
        changes["objectives"] = arguments.objectives
    if arguments.search is not None:
        changes["sampler"] = arguments.search
    return replace(study, space=replace(study.space, **changes))


def check_together(options: Options) -> None:
    """Raise UserError for options that contradict each other, or that do nothing beside each other."""
    run, stores = options.run, options.stores
    if run.fresh and (run.resume or run.retry_failed):
        raise UserError(
            "--fresh runs all trials anew: leave out --resume and --retry-failed, or leave out --fresh"
        )
    if run.retry_failed and options.study.num_samples is not None:
        raise UserError("--retry-failed draws no new points: leave out --num-samples")
    _one_of("policy for --keep-artifacts", stores.keep_artifacts, KEEP_ARTIFACTS)
    if stores.keep_best is not None and stores.keep_artifacts != "best":
        raise UserError("--keep-best is for --keep-artifacts best: add that, or leave it out")
    if stores.keep_best is not None and stores.keep_best < 1:
        raise UserError(f"--keep-best is {stores.keep_best}; it must be at least 1")


ABOUT_DELTA = ("delta_probes", "activation_checkpointing", "probe_chunk")


def check_used(options: Options, study: Study) -> None:
    """Raise UserError for an option that changes nothing in this study."""
    arguments = options.study
    about_delta = [name for name in ABOUT_DELTA if name in arguments.given]
    if about_delta and not _has_delta_loss(study):
        raise UserError(
            f"{_spelled(about_delta[0])} is about the delta loss, which no trial of this study has (λ_d is 0 "
            "everywhere): leave it out, or give --lambda-delta values above 0"
        )
    probes = [trial.config.n_probes for trial in (*study.trials, *_base_of(study))]
    if arguments.probe_chunk is not None and arguments.probe_chunk >= max(probes):
        raise UserError(
            f"--probe-chunk {arguments.probe_chunk} splits nothing, since a trial has {max(probes)} probes: give less"
        )
    if arguments.scheduler != "none" and len(study.trials) == 1:
        raise UserError(
            f"{arguments.scheduler} compares trials, and this study has one: leave --scheduler out"
        )
    if options.run.retry_oom and not _has_delta_loss(study):
        raise UserError(
            "--retry-oom saves memory in the delta loss, which no trial of this study has: leave it out"
        )
    if options.stores.optuna_storage is not None and study.space is None:
        raise UserError("--optuna-storage is for a search: add --search random or optuna")
    if arguments.study is not None and ".py" in arguments.study:
        _check_own_study(options, study)


def _base_of(study: Study) -> tuple:
    return (study.space.base,) if study.space else ()


def _has_delta_loss(study: Study) -> bool:
    if study.space and study.space.lambda_delta[1] > 0:
        return True
    return any(trial.config.lambda_delta > 0 for trial in study.trials)


def _check_own_study(options: Options, study: Study) -> None:
    """Raise UserError if a study from a file stays the same when the value of a given option is another one."""
    for name in ("lambda_weight", "lambda_delta", "learning_rate", "seeds", "steps", "batch_size"):
        value = getattr(options.study, name)
        if value is None:
            continue
        other: Any = value + 1 if isinstance(value, int) else tuple(2 * one + 1 for one in value)
        try:
            changed = study_of(replace(options, study=replace(options.study, **{name: other})))
        except UserError:
            continue  # The file looks at the option, or it would not have refused this value.
        if changed == study:
            raise UserError(
                f"{_spelled(name)} changes nothing in study {study.name}, whose file does not use it: leave it out"
            )
