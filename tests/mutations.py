"""Change files at random as breakage and misunderstanding do: values of JSON, bytes, tensors' headers, lines."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\ufeff",
        "\ud800",
        "\udcff x",
        "\x00",
        "\u2028",
        "e\u0301",
        "\U0001d7d9",
        "x" * 30_000,
    ),
    *(
        "../x",
        "/",
        "~",
        "(",
        "[",
        "*",
        "(a+)+$",
        "a{9999999}",
        "%s",
        "{}",
        "None",
        "NaN",
        "default",
        "lm_head",
    ),
    *(
        "[A]",
        "A: x\nB: y",
        "q_proj",
        "all-linear",
        "models/x",
        "checkpoint-1",
        "true",
        "1e400",
        "pissa",
        "olora",
    ),
)
NUMBERS = (0, 1, -1, 2, 3, 1.5, -0.0, 1e308, 1e-320, 10**30, -(10**30), float("nan"), float("inf"))
OTHERS = (None, True, False, [], {}, [[]], [None], {"a": 1}, [1, "a"], {"": {}}, [[[[]]]])
MARKS = (
    codecs.BOM_UTF8,
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_LE,
    b"version https://git-lfs",
)


class Mutator:
    """Draws changes from one stream of random numbers."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def value(self) -> Any:
        """Draw a value that stands where another is expected."""
        return self.rng.choice(self.rng.choice((TEXTS, NUMBERS, OTHERS)))

    def some(self, change: Callable[[Any], Any], value: Any) -> Any:
        """Apply one to four changes, few more often than many."""
        for _ in range(min(4, int(self.rng.expovariate(0.9)) + 1)):
            value = change(value)
        return value

    def json(self, value: Any) -> Any:
        """Change one place in a value of JSON, however deep."""
        if isinstance(value, (dict, list)) and value and self.rng.random() < 0.85:
            return self._inside(value)
        return self._other(value)

    def _inside(self, value: Any) -> Any:
        copy = dict(value) if isinstance(value, dict) else list(value)
        keys = list(copy) if isinstance(copy, dict) else range(len(copy))
        place = self.rng.choice(list(keys))
        kind = self.rng.random()
        if kind < 0.12:
            del copy[place]
        elif kind < 0.2 and isinstance(copy, dict):
            copy[self.rng.choice((*TEXTS, *map(str, copy)))] = copy.pop(place)
        elif kind < 0.3 and isinstance(copy, list):
            copy.insert(place, self.rng.choice((copy[place], self.value())))
        elif kind < 0.36 and isinstance(copy, dict):
            copy[self.rng.choice(TEXTS)] = self.value()
        else:
            copy[place] = self.json(copy[place])
        return copy

    def _other(self, value: Any) -> Any:
        kind = self.rng.random()
        if kind < 0.1:
            return [value]
        if kind < 0.15:
            return {"value": value}
        if kind < 0.2:
            return str(value)
        if isinstance(value, str) and kind < 0.4:
            place = self.rng.randrange(len(value) + 1)
            return value[:place] + self.rng.choice(TEXTS) + value[place:]
        if isinstance(value, (int, float)) and kind < 0.4:
            return self.rng.choice(NUMBERS)
        return self.value()

    def bytes(self, content: bytes) -> bytes:
        """Change the content of a file: bits, cuts, marks, encodings, lines."""
        kind, rng = self.rng.randrange(9), self.rng
        place = rng.randrange(len(content) + 1)
        if kind == 0:
            return content[:place]
        if kind == 1:
            return content[:place] + rng.randbytes(rng.randint(1, 4)) + content[place:]
        if kind == 2 and place < len(content):
            return (
                content[:place]
                + bytes([content[place] ^ 1 << rng.randrange(8)])
                + content[place + 1 :]
            )
        if kind == 3:
            return rng.choice(MARKS) + content
        if kind == 4:
            return content.decode("utf-8", "replace").encode(
                rng.choice(("utf-16", "utf-32", "latin-1")), "replace"
            )
        if kind == 5:
            return content[:place] + content[rng.randrange(len(content) + 1) :]
        if kind == 6:
            return content.replace(
                *rng.choice(((b"\n", b"\r\n"), (b"\n", b"\n\n"), (b" ", b"\n"), (b'"', b"'")))
            )
        if kind == 7:
            return (
                content[:place]
                + rng.choice((b"[", b"{", b'"')) * rng.choice((1, 5000))
                + content[place:]
            )
        return (
            content[:place] + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + content[place:]
        )

    def tensors(self, content: bytes) -> bytes:
        """Change a safetensors file: its header (a length, then JSON), its values, or any byte."""
        length = int.from_bytes(content[:8], "little")
        header, values = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        kind = self.rng.random()
        if kind < 0.6:
            header = self.some(self.json, header)
        elif kind < 0.8:
            for _ in range(self.rng.randint(1, 3)):
                start = 4 * self.rng.randrange(len(values) // 4)
                values[start : start + 4] = self.rng.choice(
                    (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 4)
                )
        else:
            return self.some(self.bytes, content)
        told = json.dumps(header).encode()
        size = len(told) if self.rng.random() < 0.97 else self.rng.choice((0, 2**62, len(told) + 9))
        return size.to_bytes(8, "little") + told + bytes(values)

    def document(self, value: Any) -> bytes:
        """Dump a value of JSON that is changed, or whose bytes are."""
        if self.rng.random() < 0.75:
            return json.dumps(self.some(self.json, value)).encode()
        return self.some(self.bytes, json.dumps(value).encode())


def folder_state(folder: Path) -> dict[str, bytes | None]:
    """Return what lies in a folder: the content of each file, None for a folder."""
    found = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in found
    }
