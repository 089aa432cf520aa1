"""Load studies by name: built-in ones, and a user's own from `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from llgbm.runtime import UserError, content_hash
from tuning.studies.builtin import STUDIES, StudyOptions
from tuning.studies.spec import Study

Maker = Callable[[StudyOptions], Study]


def make_study(name: str, options: StudyOptions) -> Study:
    """Return a study by name or from a file. Raises UserError for an unknown name and for any fault of the file."""
    if ".py" in name:
        return _study_from_file(name, options)
    if name not in STUDIES:
        raise UserError(
            f"unknown study {name!r}; there are: {', '.join(STUDIES)}, or your own as path/to/file.py:function"
        )
    return STUDIES[name](options)


def whole_name(name: str) -> str:
    """Return the name with the path of a study file made absolute."""
    path, colon, function = name.rpartition(":")
    if not path.endswith(".py"):
        return name
    return f"{Path(path).expanduser().resolve()}{colon}{function}"


def _study_from_file(name: str, options: StudyOptions) -> Study:
    path, _, function = name.rpartition(":")
    if not path or not function.isidentifier():
        raise UserError(f"{name} names no function of a file: write path/to/file.py:function")
    file = Path(path).expanduser().resolve()
    make = _function(_load(file), function, file)
    study = _called(make, options, file)
    if not isinstance(study, Study):
        raise UserError(
            f"{function} of {file} returned a {type(study).__name__}: it must return a Study of tuning.studies"
        )
    return study


class _Loader(SourceFileLoader):
    """Loader that leaves no compiled file beside a user's."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Keep nothing."""


def _load(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"there is no study file {file}: name one as path/to/file.py:function")
    name = f"llgbm_study_{content_hash(file)}"
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    if spec is None or spec.loader is None:
        raise UserError(f"the study file {file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _explained(error, file) from error
    return module


def _function(module: ModuleType, name: str, file: Path) -> Maker:
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    raise UserError(f"{file} has no function {name}; it has: {', '.join(own) or 'none'}")


def _called(make: Maker, options: StudyOptions, file: Path) -> Study:
    try:
        return make(options)
    except (Exception, SystemExit) as error:
        raise _explained(error, file) from error


def _explained(error: BaseException, file: Path) -> UserError:
    """Return one sentence: the fault and its line in the file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(file)
    ]
    reason = str(error)
    if isinstance(error, SyntaxError):
        reason = error.msg
        if error.filename == str(file) and error.lineno:
            lines = [error.lineno]
    where = "".join(f", line {line}" for line in lines[-1:])
    if not isinstance(error, UserError):
        reason = f"{type(error).__name__}: {reason}"
    return UserError(f"the study file {file}{where}: {reason.partition(chr(10))[0]}")
