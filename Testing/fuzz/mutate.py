"""Ways to damage a file: bytes, numbers in texts, values in JSON, all decided by the given `Random`."""

from __future__ import annotations

import copy
import json
import re
import struct
from random import Random
from typing import Any

NUMBERS = (
    *("0", "-1", "1", "2", "3", "nan", "-nan", "inf", "-inf", "1e308", "-1e308", "1e-320", "30000", "65536"),
    *("2147483647", "2147483648", "4294967295", "4294967296", "9223372036854775807", "-9223372036854775808"),
    *(
        "18446744073709551616",
        "1" + "0" * 400,
        "0x10",
        "1e400",
        "",
        " ",
        "x",
        "(",
        "none",
        "%d",
        "1,5",
        "0.5",
    ),
)
_FORMATS = ("<b", "<h", ">h", "<i", ">i", "<q", ">q", "<f", ">f", "<d", ">d")
_WORDS = (0, 1, -1, 2, 7, 8, 127, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, -0.0, 1e10)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "x", "\x00", "\x1b[2J", "../x", "/etc/passwd", "nul", "\ud800", "é" * 40, "1" * 5000),
    *([], {}, [[]], [1], [1, 2, 3], [0, 0, 0], [-1, 1, 1], [30000] * 3, [2**62] * 3, {"x": 1}, [None], ["a"]),
    *([1.5, "b", None], [float("nan")] * 3, {"0": []}, [{}]),
)


def in_bytes(rng: Random, data: bytes, limit: int | None = None, times: int = 4) -> bytes:
    """The bytes with up to `times` faults, within the first `limit` bytes when given."""
    out = bytearray(data)
    for _ in range(rng.randint(1, times)):
        end = max(1, min(len(out), limit or len(out)))
        at = rng.randrange(end)
        kind = rng.randrange(9)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind in (2, 3, 4):
            raw = number(rng)
            out[at : at + len(raw)] = raw
        elif kind == 5:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 6:
            del out[at : at + rng.choice((1, 2, 4, 16, 64))]
        elif kind == 7:
            stop = at + rng.choice((4, 16, 64))
            out[at:at] = out[at:stop] * rng.choice((1, 2, 50))
        elif rng.random() < 0.3:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def number(rng: Random) -> bytes:
    """A number that programs stumble over, in a random size and byte order."""
    form = rng.choice(_FORMATS)
    if form[1] in "fd":
        value = rng.choice(_FLOATS)
        return struct.pack(form, value if form[1] == "d" or abs(value) < 1e38 else float("inf"))
    size = struct.calcsize(form)
    value = rng.choice(_WORDS) if rng.random() < 0.8 else rng.randrange(1 << 16)
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little" if form[0] == "<" else "big")


def in_text(rng: Random, text: str, times: int = 3) -> str:
    """The text with numbers, words or lines exchanged, dropped, repeated or blown up."""
    for _ in range(rng.randint(1, times)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(9)
        if kind < 4:
            hits = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?", lines[at]))
            if hits:
                hit = rng.choice(hits)
                lines[at] = lines[at][: hit.start()] + rng.choice(NUMBERS) + lines[at][hit.end() :]
        elif kind == 4:
            del lines[at]
        elif kind == 5:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif kind == 6:
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice((*NUMBERS, "x" * 3000, "\x00", "=", ":=", "é"))
            lines[at] = " ".join(words)
        elif kind == 7:
            lines[at] += rng.choice((" 1", " 0 0 0", " " * 2000, "\r", " none", ":", "\t", " (1,2)"))
        else:
            lines.insert(at, rng.choice(("#" * 5000, "x: y", "x:=y", "= =", "")))
        text = "\n".join(lines)
    return text


def in_json(rng: Random, value: Any, times: int = 3) -> bytes:
    """The value as JSON after changes of values, keys and kinds; sometimes no longer JSON at all."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, times)):
        value = changed(rng, value)
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        return in_bytes(rng, text)
    if rng.random() < 0.02:
        depth = rng.choice((50, 5000, 200_000))
        return rng.choice(
            (b"[" * depth + b"]" * depth, b'{"a":' * depth, text[:-1] + b',"a":' + b"[" * depth)
        )
    return text


def changed(rng: Random, value: Any) -> Any:
    """The value with one place in it changed."""
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return rng.choice(JUNK)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", str(key) + "x", "0", "-1", "__class__", "é"))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif kind == 3:
        other, at = rng.choice(places)
        if at in other if isinstance(other, dict) else at < len(other):
            holder[key] = copy.deepcopy(other[at])
    else:
        holder[key] = copy.deepcopy(rng.choice(JUNK))
    return value


def _places(value: Any) -> Any:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
