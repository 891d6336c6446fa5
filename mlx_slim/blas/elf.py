"""Take the prefix off the exported names of a shared library.

Invariant: code and data keep their place; only names change. ``scipy_cblas_sgemm`` holds
``cblas_sgemm`` six bytes further on, so a symbol is renamed by moving its name's offset, and the
lookup table is written anew, in the old one's room. Relocations name symbols by index, so calls
inside the library follow the new names. ELF, 64 bit, little endian (x86-64 and aarch64).
"""

from __future__ import annotations

import struct

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_SONAME, _DT_GNU_HASH = 4, 5, 6, 14, 0x6FFFFEF5
_SYMBOL_BYTES = 24
_MAGIC = b"\x7fELF\x02\x01"


class ElfError(ValueError):
    """The file is no shared library of the kind this module can rewrite."""


def sysv_hash(name: bytes) -> int:
    """Return the hash of a symbol name that ``DT_HASH`` tables use (System V gABI, figure 5-13)."""
    value = 0
    for byte in name:
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high
    return value


def _segments(data: bytearray) -> list[tuple[int, int, int, int]]:
    """Return (type, file offset, address, bytes in the file) of every program header."""
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    return [(kind, place, address, length) for kind, _, place, address, _, length in headers]


def _gnu_symbols(data: bytearray, at: int) -> tuple[int, int]:
    """Return the number of dynamic symbols and the bytes that a ``DT_GNU_HASH`` table takes."""
    buckets, first, bloom, _ = struct.unpack_from("<4I", data, at)
    start = at + 16 + 8 * bloom
    last = max(struct.unpack_from(f"<{buckets}I", data, start))
    chains = start + 4 * buckets
    while not struct.unpack_from("<I", data, chains + 4 * (last - first))[0] & 1:
        last += 1
    return last + 1, chains + 4 * (last + 1 - first) - at


def _hash_table(names: list[bytes], room: int) -> bytes:
    """Return a ``DT_HASH`` table over ``names`` in at most ``room`` bytes; index 0 is no symbol."""
    buckets = min(len(names), room // 4 - 2 - len(names))
    if buckets < 1:
        raise ElfError(f"the lookup table has no room for {len(names)} symbols")
    heads, chain = [0] * buckets, [0] * len(names)
    for index, name in enumerate(names[1:], 1):
        slot = sysv_hash(name) % buckets
        chain[index], heads[slot] = heads[slot], index
    return struct.pack(f"<{2 + buckets + len(names)}I", buckets, len(names), *heads, *chain)


def without_prefix(library: bytes, prefix: bytes) -> bytes:
    """Return ``library`` with ``prefix`` taken off every dynamic symbol that begins with it.

    Its SONAME loses everything up to and including ``prefix`` as well (``libscipy_openblas.so``
    becomes ``openblas.so``), so that the loader does not take it for the original.

    Raises:
        ElfError: If the file is not ELF64 little endian, or its tables cannot be rewritten.
    """
    data = bytearray(library)
    if data[:6] != _MAGIC:
        raise ElfError("not a 64-bit little-endian ELF file")
    try:
        return _rewrite(data, prefix)
    except (struct.error, LookupError, StopIteration, ValueError) as error:
        raise ElfError(f"the ELF tables cannot be read: {error}") from error


def _rewrite(data: bytearray, prefix: bytes) -> bytes:
    segments = _segments(data)

    def place(address: int) -> int:
        for kind, offset, start, length in segments:
            if kind == _PT_LOAD and start <= address < start + length:
                return offset + address - start
        raise ElfError(f"address {address:#x} lies in no segment")

    at, length = next((o, n) for kind, o, _, n in segments if kind == _PT_DYNAMIC)
    entries = {o: struct.unpack_from("<qQ", data, o) for o in range(at, at + length, 16)}
    tags = {tag: value for tag, value in entries.values() if tag}
    if _DT_GNU_HASH in tags:
        table = tags[_DT_GNU_HASH]
        count, room = _gnu_symbols(data, place(table))
    elif _DT_HASH in tags:
        table = tags[_DT_HASH]
        buckets, count = struct.unpack_from("<II", data, place(table))
        room = 4 * (2 + buckets + count)
    else:
        raise ElfError("the library has no symbol lookup table")

    strings, symbols = place(tags[_DT_STRTAB]), place(tags[_DT_SYMTAB])

    def text(offset: int) -> bytes:
        return bytes(data[strings + offset : data.index(0, strings + offset)])

    names = []
    for where in range(symbols, symbols + count * _SYMBOL_BYTES, _SYMBOL_BYTES):
        (name_at,) = struct.unpack_from("<I", data, where)
        name = text(name_at)
        if name.startswith(prefix):
            struct.pack_into("<I", data, where, name_at + len(prefix))
            name = name[len(prefix) :]
        names.append(name)

    new_table = _hash_table(names, room)
    data[place(table) : place(table) + room] = new_table.ljust(room, b"\0")
    for where, (tag, value) in entries.items():
        if tag in (_DT_HASH, _DT_GNU_HASH):  # one table, and no stale second one
            struct.pack_into("<qQ", data, where, _DT_HASH, table)
        elif tag == _DT_SONAME:
            skip = text(value).find(prefix)
            struct.pack_into("<qQ", data, where, tag, value + (skip + len(prefix)) * (skip >= 0))
    return bytes(data)
