"""Read the command line of the main job into frozen options, and make the study that they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from llgbm.runtime import UserError
from llgbm.teachers.table import STREAMS
from llgbm.terms.names import NAMED
from llgbm.terms.registry import find_term
from llgbm.terms.term import THROUGH_BASE
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
from tuning.studies.terms import TermWeights, read_weights
from tuning.studies.terms import read_options as read_term_options

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
    lambdas, terms = _weights(arguments)
    return StudyOptions(
        model_sizes=tuple(world.size for world in worlds) or arguments.model_size,
        own_worlds=worlds,
        **lambdas,
        terms=terms,
        term_options=read_term_options(arguments.term_option or ()),
        learning_rates=arguments.learning_rate,
        mixup=arguments.mixup,
        n_tasks=arguments.n_tasks,
        n_teachers=arguments.n_teachers,
        n_trajectories=arguments.n_trajectories,
        generators=arguments.generator,
        seeds=arguments.seeds,
        world_seeds=arguments.world_seed,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        n_probes=arguments.n_probes,
        adapters_per_task=arguments.adapters_per_task,
        trajectories=arguments.trajectories,
        trajectory_tokens=arguments.trajectory_tokens,
        activation_checkpointing=arguments.activation_checkpointing or None,
        probe_chunk=arguments.probe_chunk,
        delta_probes=arguments.delta_probes,
        conditions=arguments.condition,
        prompt_tokens=arguments.prompt_tokens,
        n_prompts_min=arguments.n_prompts_min,
        encoder=arguments.encoder,
        smoke=arguments.smoke,
    )


def _weights(
    arguments: StudyArguments,
) -> tuple[dict[str, tuple[float, ...] | None], TermWeights | None]:
    """Return λ_w and λ_d, and the weights of the other terms. Raises UserError for a weight that is given twice."""
    lambdas = {field: getattr(arguments, field) for field in NAMED.values()}
    if arguments.term is None:
        return lambdas, None
    terms = read_weights(arguments.term)
    for name, field in NAMED.items():
        if name not in terms:
            continue
        if lambdas[field] is not None:
            raise UserError(
                f"the weight of the loss term {name} is given twice: leave {_spelled(field)} out"
            )
        lambdas[field] = terms.pop(name)
    return lambdas, terms


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
        raise UserError(f"--num-samples is {arguments.num_samples}: give at least 1")
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
    if run.retry_lost and (run.fresh or run.retry_failed):
        raise UserError(
            "--retry-lost runs trials again whose artifacts are gone: leave out --fresh and --retry-failed, or leave "
            "out --retry-lost"
        )
    if run.retry_failed and options.study.num_samples is not None:
        raise UserError("--retry-failed draws no new points: leave out --num-samples")
    _one_of("policy for --keep-artifacts", stores.keep_artifacts, KEEP_ARTIFACTS)
    _one_of("choice for --stream-bank", run.stream_bank, STREAMS)
    if run.address and run.stream_bank == "on":
        raise UserError(
            "--stream-bank on reads a file of this machine, which those of --address do not have: leave one out"
        )
    if stores.keep_best is not None and stores.keep_artifacts != "best":
        raise UserError("--keep-best is for --keep-artifacts best: add that, or leave it out")
    if stores.keep_best is not None and stores.keep_best < 1:
        raise UserError(f"--keep-best is {stores.keep_best}; it must be at least 1")


ABOUT_TRAJECTORIES = ("trajectories", "trajectory_tokens")
ABOUT_DELTA = (
    "delta_probes",
    "activation_checkpointing",
    "probe_chunk",
    "n_probes",
    "n_trajectories",
    *ABOUT_TRAJECTORIES,
)


def check_used(options: Options, study: Study) -> None:
    """Raise UserError for an option that changes nothing in this study."""
    arguments = options.study
    about_delta = [name for name in ABOUT_DELTA if name in arguments.given]
    if about_delta and not _reads_base(study):
        raise UserError(
            f"{_spelled(about_delta[0])} is about the delta loss, which no trial of this study has (λ_d is 0 "
            "everywhere, as is every other term that reads probes): leave it out, or give --lambda-delta values above 0"
        )
    _check_term_options(options, study)
    _check_trajectories(options, study)
    probes = [trial.config.n_probes for trial in (*study.trials, *_base_of(study))]
    if arguments.probe_chunk is not None and arguments.probe_chunk >= max(probes):
        raise UserError(
            f"--probe-chunk {arguments.probe_chunk} splits nothing, since a trial has {max(probes)} probes: give less"
        )
    if arguments.scheduler != "none" and len(study.trials) == 1:
        raise UserError(
            f"{arguments.scheduler} compares trials, and this study has one: leave --scheduler out"
        )
    if options.run.retry_oom and not _reads_base(study):
        raise UserError(
            "--retry-oom saves memory in the delta loss, or in another term that reads probes, which no trial of this "
            "study has: leave it out"
        )
    if options.run.retry_lost and study.space is not None:
        raise UserError(
            "--retry-lost is for studies that list their trials, since Optuna keeps the results of a search: leave it "
            "out, or use --fresh"
        )
    if options.stores.optuna_storage is not None and study.space is None:
        raise UserError("--optuna-storage is for a search: add --search random or optuna")
    if arguments.study is not None and ".py" in arguments.study:
        _check_own_study(options, study)


def _base_of(study: Study) -> tuple:
    return (study.space.base,) if study.space else ()


def _terms_of(study: Study) -> set[str]:
    """Return the names of the terms that any trial has a weight for."""
    searched = study.space.weights if study.space else {}
    found = {name for name, (_, high) in searched.items() if high > 0}
    return found.union(*(trial.config.weights for trial in study.trials))


def _reads_base(study: Study) -> bool:
    return any(find_term(name).reads & THROUGH_BASE for name in _terms_of(study))


def _check_trajectories(options: Options, study: Study) -> None:
    """Raise UserError for options of trajectories where no trial has any, or where the bank has its own."""
    given = [name for name in ABOUT_TRAJECTORIES if name in options.study.given]
    if not given:
        return
    trials = (*study.trials, *_base_of(study))
    if all(trial.config.delta_probes != "trajectory" for trial in trials):
        raise UserError(
            f"{_spelled(given[0])} is about trajectories, which are the probes of no trial of this study: leave it out"
        )
    if options.study.bank is not None:
        raise UserError(
            f"{_spelled(given[0])} is about teachers that are trained here; those of --bank have their trajectories"
        )


def _check_term_options(options: Options, study: Study) -> None:
    for text in options.study.term_option or ():
        term = text.partition("=")[0].rpartition(".")[0]
        if term not in _terms_of(study):
            raise UserError(
                f"--term-option {text} is of a loss term that no trial of this study has: leave it out, or add "
                f"--term {term}=1"
            )


USED_BY_OWN_STUDIES = (
    *("lambda_weight", "lambda_delta", "term", "learning_rate", "mixup", "seeds", "steps"),
    *("batch_size", "n_probes", "adapters_per_task", "trajectories", "trajectory_tokens"),
    *("condition", "prompt_tokens", "n_prompts_min", "n_tasks", "n_teachers", "n_trajectories"),
)


def _check_own_study(options: Options, study: Study) -> None:
    """Raise UserError if a study from a file stays the same when the value of a given option is another one."""
    for name in USED_BY_OWN_STUDIES:
        value = getattr(options.study, name)
        if value is None:
            continue
        other = _another(value)
        try:
            changed = study_of(replace(options, study=replace(options.study, **{name: other})))
        except UserError:
            continue  # The file looks at the option, or it would not have refused this value.
        if changed == study:
            raise UserError(
                f"{_spelled(name)} changes nothing in study {study.name}, whose file does not use it: leave it out"
            )


def _another(value: Any) -> Any:
    """Return a value of an option that differs from the given one."""
    if isinstance(value, int):
        return value + 1
    if isinstance(value[0], str):
        return tuple(f"{text.partition('=')[0]}=7.125" for text in value)
    return tuple(2 * one + 1 for one in value)
