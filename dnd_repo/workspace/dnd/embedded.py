"""The embedded bank of LLGBM, for `--smoke`: the one place of `dnd` that needs `llgbm`."""

from __future__ import annotations

from pathlib import Path

from dnd.errors import DndError


def embedded_bank(cache: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """Build the smallest embedded bank, or find it in a cache: its folder of adapters, its base, its training tasks.

    Raises DndError where LLGBM is not installed or the cache cannot be written.
    """
    try:
        from llgbm.runtime import UserError
        from llgbm.teachers.build import build_bank
        from llgbm.world import WorldConfig, build_base, smoke_world
    except ImportError as error:
        raise DndError(
            "--smoke needs LLGBM: install the project at the repository's root, or name a --bank"
        ) from error
    config = smoke_world(WorldConfig())
    try:
        base = build_base(cache, config, "cpu")
        bank = build_bank(cache, base, config.suite, config.teachers)
    except UserError as error:
        raise DndError(str(error)) from error
    return bank.folder / "checkpoints", Path(base.path), tuple(config.suite.split.train)
