"""Seeded mutations of files: valid ones become hostile ones, by what they are made of.

``mutate(random, path)`` changes one file and says how. JSON keeps its structure (values are
replaced by hostile ones of any type, keys dropped, doubled and renamed), so do the headers of
safetensors and GGUF files; every file may also be cut, flipped, or not be a file at all.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = (
    *("0", "1", "-1", "2", "3", "7", "99", "1.5", "-0.0", "1e400", "-1e400", "1e-400", "NaN"),
    *("Infinity", "2147483647", "2147483648", "1000000000", "1099511627776", "9007199254740993"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "9" * 6000),
)
STRINGS = (
    "",
    "x" * 5000,
    "../../../../etc/passwd",
    "/dev/zero",
    "..",
    "a/b",
    "a\0b",
    "(",
    "(a+)+$",
    "[",
    "null",
    "NaN",
    "1e9",
    "{{ 1 }}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "\N{ZERO WIDTH JOINER}\u202e",
    "bfloat16",
    "llama",
    "base",
)
RAW = (
    *NUMBERS,
    *map(json.dumps, STRINGS),
    '"\\ud83d"',
    *("null", "true", "false", "[]", "{}", "[[]]", "[{}]", "[null]", "[1,2,3]"),
    '{"a":{"b":[{}]}}',
    "[" * 50 + "]" * 50,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[0" + ",1" * 20_000 + "]",
)
_MARK = "\ue000{}\ue001"
_MARKED = re.compile(r'"\\ue000(\d+)\\ue001"')


# --------------------------------------------------------------------------------------- JSON


def hostile_json(random: Random, text: str) -> tuple[str, str]:
    """Return another JSON text, and what was done to it."""
    value = json.loads(text)
    raws: list[str] = []

    def raw(token: str) -> str:
        raws.append(token)
        return _MARK.format(len(raws) - 1)

    edits = []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        holder = {"": value}
        edits.append(_change(random, holder, raw))
        value = holder[""]
    out = json.dumps(value)
    out = _MARKED.sub(lambda match: raws[int(match[1])], out)
    return out, "; ".join(edits)


def _places(holder: dict, limit: int = 4000) -> list[tuple[Any, Any, str]]:
    """Return (container, key, path) of every value, outer ones first."""
    places: list[tuple[Any, Any, str]] = []
    queue: list[tuple[Any, str]] = [(holder, "")]
    while queue and len(places) < limit:
        node, path = queue.pop(0)
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            place = f"{path}.{key}" if path else str(key)
            places.append((node, key, place))
            if isinstance(child, (dict, list)):
                queue.append((child, place))
    return places


def _change(random: Random, holder: dict, raw: Callable[[str], str]) -> str:
    places = _places(holder)
    # Outer values decide more than the ten thousandth token of a vocabulary.
    node, key, place = places[min(random.randrange(len(places)), int(random.expovariate(1 / 25)))]
    old = node[key]
    what = random.randrange(10)
    if what == 0 and key != "":
        del node[key]
        return f"{place} removed"
    if what == 1 and isinstance(node, dict) and key != "":
        node[random.choice(STRINGS)] = node.pop(key)
        return f"{place} renamed"
    if what == 2:
        other, other_key, other_place = random.choice(places)
        node[key] = json.loads(json.dumps(other[other_key]))
        return f"{place} = {other_place}"
    if what == 3:
        node[key] = [old] if random.random() < 0.5 else {"a": old}
        return f"{place} wrapped"
    if what == 4 and isinstance(old, (int, float)) and not isinstance(old, bool):
        node[key] = random.choice(
            (old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old))
        )
        return f"{place}: {old} → {node[key]}"
    token = random.choice(RAW)
    node[key] = raw(token)
    return f"{place} = {token[:60]}"


def hostile_lines(random: Random, data: bytes) -> tuple[bytes, str]:
    """Return other JSON lines: one of them changed, doubled, removed or moved."""
    lines = data.splitlines(keepends=True)
    index = random.randrange(len(lines))
    what = random.randrange(8)
    if what == 0:
        lines.insert(index, lines[index])
        return b"".join(lines), f"line {index} twice"
    if what == 1:
        del lines[index]
        return b"".join(lines), f"line {index} removed"
    if what == 2:
        random.shuffle(lines)
        return b"".join(lines), "lines shuffled"
    text, edits = hostile_json(random, lines[index].decode())
    lines[index] = text.encode("utf-8", "surrogatepass") + b"\n"
    return b"".join(lines), f"line {index}: {edits}"


# --------------------------------------------------------------------------- binary containers


def hostile_safetensors(random: Random, data: bytes) -> tuple[bytes, str]:
    """Return a file with another header, its length right or wrong."""
    length = int.from_bytes(data[:8], "little")
    text, edits = hostile_json(random, data[8 : 8 + length].decode())
    header = text.encode()
    size = random.choice((len(header),) * 6 + (0, len(header) + 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", size) + header + data[8 + length :], f"header of {size}: {edits}"


_WORDS = [struct.pack("<Q", n) for n in (0, 1, 3, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)]
_WORDS += [struct.pack("<I", n) for n in (0, 1, 4, 5, 7, 8, 9, 12, 13, 255, 2**31, 2**32 - 1)]
_WORDS += [struct.pack("<f", x) for x in (float("nan"), float("inf"), -1.0, 0.0, 1e30)]
_WORDS += [b"\0", b"\xff", b"\xed\xa0\x80", b"../", b"x" * 40]
_KEYS = re.compile(rb"general\.|tokenizer\.|llama\.|phi2\.|blk\.\d+\.|token_embd|output")


def hostile_gguf(random: Random, data: bytes) -> tuple[bytes, str]:
    """Return a file with other numbers in its header: counts, types, lengths, places, values."""
    changed = bytearray(data)
    keys = [match.start() for match in _KEYS.finditer(data)]
    edits = []
    for _ in range(random.choice((1, 1, 2, 4))):
        near = random.choice(keys) + random.randrange(-12, 48)
        at = random.choice((near, near, near, random.randrange(4, 24), random.randrange(len(data))))
        word = random.choice(_WORDS)
        if random.random() < 0.2:
            changed[at:at] = word
            edits.append(f"{word!r} put in at {at}")
        else:
            changed[at : at + len(word)] = word
            edits.append(f"{word!r} at {at}")
    return bytes(changed), "; ".join(edits)


# --------------------------------------------------------------------------------------- text


def hostile_text(random: Random, data: bytes) -> tuple[bytes, str]:
    """Return another text: lines moved, values after ``:`` replaced, hostile words put in."""
    lines = data.decode().split("\n")
    index = random.randrange(len(lines))
    what = random.randrange(6)
    if what == 0:
        lines.insert(index, lines[index])
    elif what == 1:
        del lines[index]
    elif what == 2:
        lines[index] = "  " * random.randrange(4) + lines[index].lstrip()
    elif what == 3 and ":" in lines[index]:
        lines[index] = f"{lines[index].split(':')[0]}: {random.choice(RAW)}"
    else:
        word = random.choice((*STRINGS, *RAW))
        at = random.randrange(len(lines[index]) + 1)
        lines[index] = lines[index][:at] + word + lines[index][at:]
    shown = "".join(lines[index : index + 1])[:60]
    return "\n".join(lines).encode("utf-8", "surrogatepass"), f"line {index} is now {shown!r}"


def hostile_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Return other bytes: cut, flipped, removed or put in."""
    what = random.randrange(4)
    at = random.randrange(len(data) + 1)
    if what == 0:
        return data[:at], f"cut at {at}"
    if what == 1:
        more = random.randbytes(random.choice((1, 8, 100)))
        return data[:at] + more + data[at:], f"{len(more)} bytes put in at {at}"
    if what == 2:
        return data[:at] + data[at + random.choice((1, 8, 100)) :], f"taken out at {at}"
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 8))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed), "bits flipped"


def hostile_packed(random: Random, data: bytes) -> tuple[bytes, str]:
    """Return a packed file of other JSON lines, or of far more."""
    if random.random() < 0.05:
        return gzip.compress(b" " * (66 << 20), 1, mtime=0), "66 MB of spaces"
    changed, edits = hostile_lines(random, gzip.decompress(data))
    return gzip.compress(changed), edits


# -------------------------------------------------------------------------------------- files

_BY_SUFFIX: dict[str, Callable[[Random, bytes], tuple[bytes, str]]] = {
    ".jsonl": hostile_lines,
    ".safetensors": hostile_safetensors,
    ".gguf": hostile_gguf,
    ".yaml": hostile_text,
    ".jinja": hostile_text,
    ".txt": hostile_text,
    ".csv": hostile_text,
    ".gz": hostile_packed,
    ".arrow": hostile_bytes,
    ".parquet": hostile_bytes,
}


def _json_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    text, edits = hostile_json(random, data.decode())
    return text.encode("utf-8", "surrogatepass"), edits


def mutate(random: Random, path: Path) -> str:
    """Change the file at ``path`` and return what was done, for the failure message."""
    if random.random() < 0.05:
        return f"{path.name}: {_no_file(random, path)}"
    data = path.read_bytes()
    change = _BY_SUFFIX.get(path.suffix, _json_bytes)
    if random.random() < 0.15:
        change = hostile_bytes
    changed, edits = change(random, data)
    path.write_bytes(changed)
    return f"{path.name}: {edits}"


def _no_file(random: Random, path: Path) -> str:
    what = random.choice(("nothing", "empty", "a folder", "a FIFO", "a loop", "a link to nothing"))
    path.unlink()
    if what == "empty":
        path.touch()
    elif what == "a folder":
        path.mkdir()
    elif what == "a FIFO":
        os.mkfifo(path)
    elif what == "a loop":
        path.symlink_to(path.name)
    elif what == "a link to nothing":
        path.symlink_to("nowhere")
    return what
