"""Helpers for the running process: content hashes, device, seeds, memory, logging, progress, user errors."""

from __future__ import annotations

import atexit
import codecs
import ctypes
import gc
import hashlib
import io
import json
import locale
import logging
import math
import os
import random
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")
logger = logging.getLogger("llgbm")
# Secrets in text.
MASK = "***"
# What shells report of a program that a closed pipe ended.
UNREAD = 141
SHORTEST = 6  # letters of a secret that is looked for by its value
# A password may hold a slash that should have been encoded; in `host:5000/x@y` there is none.
LOGIN = re.compile(r"(?<=://)(?:[^\s/]*@|[\w.%+~-]+:(?!\d+/)[^\s\"'@]*@)")
NAMED = re.compile(
    r"(?<![\w-])(password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|sig|signature)"
    r"([\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+",
    re.IGNORECASE,
)
HEADER = re.compile(r"\b(Basic|Bearer)\s+[A-Za-z0-9+/=._~-]{8,}")
SECRET_VARIABLE = re.compile(r"PASSWORD|PASSWD|TOKEN$|SECRET|ACCESS_KEY$|API_KEY$|_PWD$")
# Hash by content: a dataclass by its type and the fields that differ from their defaults, so that a new field changes
# no id; a class from outside this project by its code too, a value with a `fingerprint` by that as well.
OURS = {"llgbm", "tuning", "dnd"}
LIBRARY = {"builtins", "abc", "typing", "collections", "enum"}
PLAIN = (str, bool, int, float, type(None))


class UserError(ValueError):
    """User mistake: reported as one sentence with exit status 2 and no traceback."""


def content_hash(*parts: Any, length: int = 16) -> str:
    """Hash values to `length` hexadecimal digits: numbers, texts, paths, lists, mappings and dataclasses.

    1 and 1.0 are one value, as are 0.0 and -0.0. A field with `compare=False`, such as the place of a file, is left
    out. Raises TypeError for other types.
    """
    return _digest([_canonical(part) for part in parts], length)


def stream_seed(*parts: Any) -> int:
    """Derive a 63-bit seed from its parts: every random stream has a name, and none depends on another."""
    return int(_digest(parts, 16), 16) >> 1


def _digest(content: Any, length: int) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _canonical(value: Any) -> Any:
    """Convert a value to one that JSON can hold, the same for equal content."""
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else float(value)
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if _is_named_by_itself(value) or (is_dataclass(value) and not isinstance(value, type)):
        return _canonical_object(value)
    raise TypeError(f"a {type(value).__name__} cannot be hashed by content")


def _is_named_by_itself(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(type(value), "fingerprint")


def _canonical_object(value: Any) -> dict[str, Any]:
    found = {"type": _class_identity(type(value))}
    if _is_named_by_itself(value):
        found["fingerprint"] = value.fingerprint
    if is_dataclass(value):
        for field in fields(value):
            own = getattr(value, field.name)
            # A fingerprint is kept at the default too: it says what the default does.
            if field.compare and (_is_named_by_itself(own) or not _is_default(field, own)):
                found[field.name] = _canonical(own)
    return found


def _is_default(field: Field[Any], value: Any) -> bool:
    if field.default is not MISSING:
        return bool(_canonical(value) == _canonical(field.default))
    if field.default_factory is not MISSING:
        return bool(_canonical(value) == _canonical(field.default_factory()))
    return False


def _class_identity(cls: type) -> Any:
    """Return the name of a class of this project; of another one the code of all that it adds, too."""
    others = [base for base in cls.__mro__ if _package(base) not in OURS | LIBRARY]
    if not others:
        return cls.__qualname__
    seen: set[int] = set()
    return [cls.__qualname__, *(dict(_members(base, seen)) for base in others)]


def _package(value: Any) -> str:
    return str(value.__module__).partition(".")[0]


def _members(cls: type, seen: set[int]) -> Iterator[tuple[str, Any]]:
    for name, member in sorted(vars(cls).items()):
        # Python and `dataclass` write the other methods with two underscores.
        if name.startswith("__") and name not in ("__init__", "__post_init__", "__call__"):
            continue
        function = _function_of(member)
        if function is not None and function.__code__.co_filename != "<string>":
            yield name, _function_identity(function, seen)
        elif isinstance(member, (*PLAIN, tuple, list, dict)):
            yield name, repr(member)


def _function_of(member: Any) -> FunctionType | None:
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, cached_property):
        member = member.func
    elif isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    return member if isinstance(member, FunctionType) else None


def _function_identity(function: FunctionType, seen: set[int]) -> Any:
    """Describe a function by its code, its defaults and what it uses of its own module, wherever it was loaded from."""
    if id(function) in seen:
        return function.__qualname__
    seen.add(id(function))
    used: dict[str, Any] = {}
    for name in sorted(_names(function.__code__)):
        member = function.__globals__.get(name)
        if isinstance(member, FunctionType) and member.__module__ == function.__module__:
            used[name] = _function_identity(member, seen)
        elif isinstance(member, (*PLAIN, tuple, list, dict)):
            used[name] = repr(member)
    return [_code(function.__code__, function.__doc__), repr(function.__defaults__), used]


def _names(code: CodeType) -> set[str]:
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*nested)


def _code(code: CodeType, doc: str | None) -> list[Any]:
    constants = [
        _code(constant, None) if isinstance(constant, CodeType) else _constant(constant)
        for constant in code.co_consts
        if constant is None or constant != doc
    ]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> str:
    """Name the device: the given one, or CUDA where torch sees it, else the CPU.

    Raises UserError for one that this machine or this torch does not have.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # neither an unknown device nor one without values
    except (RuntimeError, AssertionError) as error:  # the latter of a torch built without CUDA
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"the device {name!r} cannot be used ({reason}): name cpu, cuda or cuda:N"
        ) from error
    return name


def release_device_memory() -> None:
    """Return unused memory after a long pass: torch's device cache and the heap of the C library."""
    import torch

    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Parameters of glibc's `mallopt` by number: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD.
KEEPING = {-1: 2**30, -2: 2**26, -3: 2**30}


@cache
def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the process, where it can: a training step takes the same again.

    Asking the system for it and clearing its pages took a seventh of a step of all teachers. `release_device_memory`
    returns it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in KEEPING.items():
            mallopt(parameter, value)


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection, for work that is mostly importing: its passes over what libraries make take a fifth."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@cache
def freeze_gc() -> None:
    """Exempt everything loaded so far from garbage collection, once per process.

    With Ray, MLflow and transformers loaded a collection takes 0.3 s, and every long pass ends with one.
    """
    gc.collect()
    gc.freeze()


def free_memory(device: str) -> float:
    """Return the free bytes of the GPU's memory, or of this machine's."""
    import psutil
    import torch

    return (
        torch.cuda.mem_get_info(device)[0]
        if device.startswith("cuda")
        else psutil.virtual_memory().available
    )


def quiet_libraries() -> None:
    """Turn progress bars of libraries off where stderr is no terminal."""
    if sys.stderr.isatty():
        return
    # Read by transformers, too, when they are imported; commands that need none do not pay for them here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def begin_program() -> None:
    """Make this process a program: it speaks UTF-8, and its end does not look for garbage, which takes 2 s."""
    speak_utf8()
    atexit.register(gc.freeze)


def speak_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale has another encoding.

    Files are UTF-8 everywhere then. A letter that the terminal lacks, such as λ, is printed as a question mark.
    """
    encoding = codecs.lookup(locale.getpreferredencoding(False)).name
    if not sys.flags.utf8_mode and encoding != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:replace")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """Show a progress bar on a terminal; stay silent elsewhere."""
    return tqdm(items, desc=label, total=total, disable=None, leave=False, file=sys.stderr)


def progress_bar(label: str, total: int) -> tqdm:
    """Return a progress bar to be moved by hand; silent where there is no terminal."""
    return tqdm(desc=label, total=total, disable=None, leave=False, file=sys.stderr)


def is_folder(name: str | Path) -> bool:
    """Say if a name leads to a folder here; one that no file can have, such as a very long one, does not."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `name@revision`; a folder has no revision."""
    if is_folder(name):
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def exit_status(command: Callable[[], int], debug: bool, on_interrupt: str = "interrupted") -> int:
    """Run a program and return its exit status.

    That is 2 with one sentence for a UserError (and its traceback with `debug`), 130 for an interrupt, 141 where nobody
    reads the output any more (`… | head`), 1 with a traceback for any other error.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except UserError as error:
        if debug:
            say(traceback.format_exc())
        say(f"error: {error}")
        return 2
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return UNREAD
        say(traceback.format_exc())
        return 1
    except KeyboardInterrupt:
        say(on_interrupt)
        return 130


def _nobody_reads() -> bool:
    """Return True if the reader of stdout is gone; what is left to print then goes nowhere."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not any(state & (select.POLLERR | select.POLLHUP) for _, state in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def say(text: str) -> None:
    """Print a line to stderr; stdout is for results."""
    print(redact(text), file=sys.stderr, flush=True)


def redact(text: str) -> str:
    """Return text without the logins of addresses, named secrets and the secrets of the environment."""
    text = redact_forms(text)
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return text


def redact_forms(text: str) -> str:
    """Return text without what looks like a secret, in any environment: for text that is compared again later."""
    text = LOGIN.sub("", text)
    text = NAMED.sub(rf"\1\2{MASK}", text)
    return HEADER.sub(rf"\1 {MASK}", text)


_known: set[str] = set()


def keep_secret(value: str) -> None:
    """Remove this value from all text from now on."""
    if len(value) >= SHORTEST:
        _known.add(value)


def _secrets() -> list[str]:
    """Return known secrets and those of environment variables that are named like one, longest first."""
    named = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)}
    found = _known | {value for value in named if len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
