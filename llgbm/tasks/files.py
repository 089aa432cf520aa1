"""Datasets in files, whose rows `rows` and `forms` read. One dataset is one task.

A dataset `X` lies in `X_train.json` (or `X.json`) and `X_test.json` or `X_validation.json` (also `_valid`, `_val`,
`_dev`), or the same with `.jsonl`. Where there is one file only, half of its rows, at most 640, are kept from training.
What is kept from training is parted in two: rows whose prompts condition a generator at evaluation, and rows to score
on.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError, content_hash, say, stream_seed
from llgbm.system.cache import hash_files
from llgbm.system.documents import is_text, read_json
from llgbm.tasks.extraction import READING_VERSION, Kind, answer_kind
from llgbm.tasks.forms import RowRules
from llgbm.tasks.rows import NEEDED, SUFFIXES, Row, read_rows
from llgbm.tasks.suite import WHOLE, Example, Purpose, Split, Suite, Task

VERSION = 1
# Raised when the same files give other rows than before; what is drawn of them stays.
KEYS_VERSION = 3
INFO = "dataset_info.json"
MOST_KEPT, MOST_PROMPTS, FEWEST_ROWS = 640, 128, 8
# Parts of a dataset, with the endings of their files' names.
PARTS = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev"),
}


@dataclass(frozen=True)
class Dataset:
    """Rows of one dataset by purpose, and what reading it left out."""

    name: str
    kind: Kind
    rows: Mapping[Purpose, tuple[Row, ...]]
    notes: tuple[str, ...]


def datasets_in(folder: Path) -> list[str]:
    """Names of the datasets that lie in a folder. Raises UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one that the dataset files lie in")
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    stems = [p.stem for p in files if p.suffix in SUFFIXES and p.name != INFO]
    endings = tuple(f"_{ending}" for part in PARTS.values() for ending in part)
    return list(dict.fromkeys(s.rsplit("_", 1)[0] if s.endswith(endings) else s for s in stems))


def dataset_files(folder: Path, name: str) -> tuple[Path, Path | None]:
    """File to train on and the file to evaluate on, None where the first serves for both.

    Raises UserError for a dataset that is not there, naming those near it, and for a file in two formats.
    """
    known = datasets_in(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:5]
        raise UserError(f"no dataset {name!r} in {folder}; there are: {', '.join(near) or 'none'}")
    by_part = {
        part: _file(folder, [f"{name}_{ending}" for ending in PARTS[part]]) for part in PARTS
    }
    whole = [path for path in (by_part["train"], _file(folder, [name])) if path][:1]
    others = [path for part in ("test", "validation") if (path := by_part[part])]
    if len(others) == 2:
        _refuse_equal(*(read_rows(path, RowRules(skip_bad=True))[0] for path in others))
    files = [*whole, *(others if whole else reversed(others))]
    return files[0], files[1] if len(files) > 1 else None


def _file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the file of one of these names, whatever its format. Raises UserError for two."""
    places = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    found = [path for path in places if path.is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} holds {names}: {NEEDED}; take one of them away")
    return found[0] if found else None


def _refuse_equal(first: Sequence[Row], second: Sequence[Row]) -> None:
    """Raise UserError where more than half of the smaller file's questions stand in the other."""
    keys = [{row.key for row in rows} for rows in (first, second)]
    if 2 * len(keys[0] & keys[1]) > min(map(len, keys)) > 0:
        raise UserError(
            f"{first[0].file} and {second[0].file} hold the same questions: what is trained or chosen on one must not "
            "be reported on the other; take one of them away"
        )


def read_dataset(
    folder: Path, name: str, limit: int | None = None, rules: RowRules | None = None
) -> Dataset:
    """Read one dataset and part its rows by purpose, with at most `limit` rows in all.

    Rows that repeat an earlier question are left out. Raises UserError for bad rows, for two files with the same
    questions and for too few rows.
    """
    train_file, evaluation_file = dataset_files(folder, name)
    train, notes = read_rows(train_file, rules)
    kind = answer_kind(row.example.answer for row in train)
    kept: list[Row] = []
    if evaluation_file is not None:
        kept, more = read_rows(evaluation_file, rules)
        _refuse_equal(train, kept)
        notes += more
    seen: set[Any] = set()
    train, kept = (_distinct(rows, seen, notes) for rows in (train, kept))
    return Dataset(name, kind, _by_purpose(name, train, kept, limit), tuple(notes))


def _distinct(rows: Sequence[Row], seen: set[Any], notes: list[str]) -> list[Row]:
    """Rows whose question is not in `seen` yet; it is added there, and what is left out to `notes`."""
    kept: dict[Any, Row] = {}
    for row in rows:
        if row.key not in seen:
            kept.setdefault(row.key, row)
    seen.update(kept)
    if len(kept) < len(rows):
        notes.append(
            f"{len(rows) - len(kept)} rows of {rows[0].file} repeat an earlier question: left out"
        )
    return list(kept.values())


def _by_purpose(
    name: str, train: list[Row], kept: list[Row], limit: int | None
) -> dict[Purpose, tuple[Row, ...]]:
    """Rows to train on, to condition on and to score on; without rows `kept` from training, some of `train` are.

    A limit shortens each purpose and moves no row to another, so that runs with different limits do not leak.
    """
    rng = random.Random(stream_seed("rows of a file", name, VERSION))
    rng.shuffle(train)
    rng.shuffle(kept)
    if not kept:
        n_kept = min(len(train) // 2, MOST_KEPT)
        train, kept = train[n_kept:], train[:n_kept]
    n_prompts = min(MOST_PROMPTS, len(kept) // 2)
    whole: dict[Purpose, list[Row]] = {
        "train": train,
        "prompts": kept[:n_prompts],
        "evaluation": kept[n_prompts:],
    }
    if limit is not None and limit < 1:
        raise UserError(f"{limit} rows of each dataset are asked for; it must be at least 1")
    shares = dict.fromkeys(whole, limit) if limit is None else _shares(limit)
    rows = {purpose: tuple(found[: shares[purpose]]) for purpose, found in whole.items()}
    if len(rows["train"]) < FEWEST_ROWS // 2 or min(map(len, rows.values())) < FEWEST_ROWS // 4:
        raise UserError(
            f"dataset {name} has {' + '.join(str(len(r)) for r in rows.values())} rows to train on, condition on and "
            f"score on; it takes {FEWEST_ROWS} in all: use more rows or another dataset"
        )
    return rows


def _shares(limit: int) -> dict[Purpose, int | None]:
    """Half of the rows to train on, a quarter to condition on, a quarter to score on."""
    return {
        "train": limit - limit // 2,
        "prompts": limit // 4,
        "evaluation": limit // 2 - limit // 4,
    }


@dataclass(frozen=True)
class FileSuite(Suite):
    """Datasets in a folder, as a value: names by part, how rows are read, and a digest of the files' contents.

    Where the folder lies takes no part in comparisons, and nothing is read before examples are asked for.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    digest: str
    folder: Path = field(compare=False)
    limit: int | None = None
    rules: RowRules = RowRules()
    name: str = "files"

    @classmethod
    def open(
        cls,
        folder: Path,
        train: Sequence[str] = (),
        val: Sequence[str] = (),
        test: Sequence[str] = (),
        limit: int | None = None,
        rules: RowRules | None = None,
    ) -> FileSuite:
        """Read and check the datasets of a folder; say what was left out of them.

        Raises UserError for a missing dataset, bad rows, a dataset in two parts, and a question of a held-out dataset
        that stands in another part too.
        """
        names = [*train, *val, *test]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"dataset {twice} is named twice: it is trained on, chosen on or held out, one of these"
            )
        digest = _digest(folder, names)
        parts = (tuple(train), tuple(val), tuple(test))
        suite = cls(*parts, digest, folder.resolve(), limit, rules or RowRules())
        for note in chain.from_iterable(dataset.notes for dataset in suite.datasets.values()):
            say(note)
        suite.refuse_leaks()
        return suite

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        """All datasets by name. Raises UserError if a file changed since the suite was opened."""
        names = [*self.train, *self.val, *self.test]
        if _digest(self.folder, names) != self.digest:
            raise UserError(
                f"the dataset files in {self.folder} changed since this run was planned: start it again"
            )
        return {name: read_dataset(self.folder, name, self.limit, self.rules) for name in names}

    def refuse_leaks(self) -> None:
        """Raise UserError where a question stands in two parts of the split; all rows of the files are looked at."""
        seen: dict[Any, tuple[str, Row]] = {}
        for part in ("train", "val", "test"):
            for name in getattr(self, part):
                for row in _all_rows(self.folder, name, self.rules):
                    other, first = seen.setdefault(row.key, (part, row))
                    if other != part:
                        raise UserError(
                            f"{first.place} and {row.place} ask the same, and one of them is held out from the other: "
                            "take one away, or put both datasets into the same part"
                        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: a worker reads them again only if it needs them."""
        return {key: value for key, value in self.__dict__.items() if key != "datasets"}

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(Task(name, self.datasets[name].kind) for name in self.split.tasks)

    def description(self, task: str, level: str = "") -> str:
        """Return the `description` of the dataset's entry in `dataset_info.json`, "" without one."""
        return read_descriptions(self.folder).get(task, "")

    def answer_kind(self, task: str) -> Kind:
        return self.datasets[self.task(task).name].kind

    @property
    def split(self) -> Split:
        return Split(self.train, self.val, self.test)

    def examples(
        self, task: str, purpose: Purpose, count: int, stream: str, share: tuple[int, int] = WHOLE
    ) -> list[Example]:
        """Rows in an order of the stream's own; training rows come round again once all were given."""
        part, n_parts = share if purpose == "train" else WHOLE
        rows = self.datasets[self.task(task).name].rows[purpose][part::n_parts]
        if not rows or (count > len(rows) and purpose != "train"):
            raise UserError(
                f"{count} rows of {task} asked for ({purpose}), it has {len(rows)}: ask for fewer"
            )
        drawn: list[Row] = []
        while len(drawn) < count:
            rng = random.Random(stream_seed("rows", task, purpose, stream, len(drawn), VERSION))
            drawn += rng.sample(rows, len(rows))
        return [row.example for row in drawn[:count]]

    def available(self, purpose: Purpose) -> int:
        return min(len(dataset.rows[purpose]) for dataset in self.datasets.values())

    @cached_property
    def fingerprint(self) -> str:
        versions = (KEYS_VERSION, READING_VERSION)
        return content_hash("files", versions, self.split, self.digest, self.limit, self.rules)

    @cached_property
    def probe_examples(self) -> tuple[Example, ...]:
        """Eight training prompts, in turn from the datasets trained on."""
        names = [self.train[index % len(self.train)] for index in range(8)]
        drawn = {
            name: iter(self.examples(name, "train", 8, "domain probes")) for name in self.train
        }
        return tuple(replace(next(drawn[name]), answer="") for name in names)

    @property
    def probe_prompts(self) -> tuple[str, ...]:
        return tuple(example.prompt for example in self.probe_examples)

    @cached_property
    def nonsense_prompts(self) -> tuple[str, ...]:
        """Words of training prompts in no order."""
        rng = random.Random(stream_seed("nonsense prompts", self.digest))
        words = sorted(self._words())
        return tuple(" ".join(rng.choices(words, k=16)) for _ in range(32))

    def _words(self) -> set[str]:
        found: set[str] = set()
        for name in self.train:
            for example in self.examples(name, "train", 64, "words"):
                found.update(example.prompt.split())
        return found


def read_descriptions(folder: Path) -> dict[str, str]:
    """Descriptions of datasets by name, from `dataset_info.json`; of an entry `X_train` too. None without the file.

    Raises UserError for a file that is no table of entries, and for a description that is no text.
    """
    path = folder / INFO
    if not path.is_file():
        return {}
    needed = 'write {"NAME": {"description": "what is asked"}}'
    found = read_json(path, needed)
    if not isinstance(found, dict):
        raise UserError(f"{path} is no table of datasets: {needed}")
    texts: dict[str, str] = {}
    for name, entry in found.items():
        text = entry.get("description", "") if isinstance(entry, dict) else ""
        if not isinstance(text, str) or not is_text(text):
            raise UserError(f"the description of {name} in {path} is no text: {needed}")
        if text.strip():
            texts[name.removesuffix("_train")] = text.strip()
    return texts


def _all_rows(folder: Path, name: str, rules: RowRules) -> list[Row]:
    """Return the good rows of all files of a dataset."""
    skipping = replace(rules, skip_bad=True)
    found: list[Row] = []
    for path in filter(None, dataset_files(folder, name)):
        found += read_rows(path, skipping)[0]
    return found


def _digest(folder: Path, names: Sequence[str]) -> str:
    """Hash of what stands in the files of the datasets, by name."""
    files = {name: list(filter(None, dataset_files(folder, name))) for name in names}
    return content_hash([[name, hash_files(paths)] for name, paths in files.items()])


def plan_split(
    folder: Path,
    tasks: Sequence[str],
    held_out: Sequence[str],
    validation: Sequence[str] | None,
    rules: RowRules | None = None,
) -> Split:
    """Split datasets into those to train on, the one that chooses, and those to report.

    Without a choice of the user, the last of `tasks` that is answered as the first held-out dataset is chooses, or
    else the last one. Raises UserError where nothing is left to train on or nothing is held out.
    """
    if not held_out:
        raise UserError("no dataset is held out: name at least one with --held-out")
    if validation is None:
        kinds = {
            name: read_dataset(folder, name, rules=rules).kind for name in [*tasks, held_out[0]]
        }
        alike = [name for name in tasks if kinds[name] == kinds[held_out[0]]]
        validation = [(alike or list(tasks))[-1]] if tasks else []
        say(
            f"validation (early stopping, choice of the best): {', '.join(validation)}; --validation names others"
        )
    train = tuple(name for name in tasks if name not in validation)
    if not train or not validation:
        raise UserError(
            "too few datasets: --tasks needs at least two, one of which is for validation"
        )
    if both := set(held_out) & {*train, *validation}:
        raise UserError(
            f"dataset {sorted(both)[0]} is held out and trained or chosen on: name it once"
        )
    return Split(train, tuple(validation), tuple(held_out))
