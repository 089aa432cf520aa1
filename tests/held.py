"""Keep what must not change in a table of JSON: compare with it, or write it anew on purpose."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "data"


def read_table(path: Path) -> dict[str, Any]:
    """Return the held values; none where there is no table yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def differences(held: Any, found: Any, place: str = "") -> Iterator[str]:
    """Yield one line for every value that is not the held one, with its place in the table."""
    if isinstance(held, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*held, *found]):
            yield from differences(
                held.get(key), found.get(key), f"{place} / {key}" if place else str(key)
            )
    elif held != found:
        yield f"{place}: held {held}, found {found}"


def compare_or_write(path: Path, found: Mapping[str, Any], description: str | None) -> int:
    """Print what differs from a table; write it if the command line says `--write`. Return the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="make what is found today the held table"
    )
    write = parser.parse_args().write
    changed = list(differences(read_table(path), found))
    print("\n".join(changed) or "everything is as it is held")
    if write:
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if changed and not write else 0
