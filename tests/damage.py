"""Ways to damage a file: its bytes, or what they mean."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

DEEP = "\0deep\0"
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 255, 256, 65536, 1 << 31, 1 << 63, 1 << 64, 10**30),
    *(-(1 << 63), 0.0, -0.5, 1.5, 1e308, float("nan"), float("inf"), "", "x", "1", "x" * 5000),
    *("../../../etc/passwd", "/dev/zero", "/etc/passwd", "layer_000/../../x", "\ud800", "[red]"),
    *([], {}, [[]], [0], [None], ["x"], {"a": 1}, DEEP, "float32", "rmz", "low-rank", "train"),
)
ODD_WORDS = ("", "-1", "x", "1e9", "99999999", "9" * 40, "9" * 5000, '"', "\0", "0.5", "nan", "é")


def damage(path: Path, rng: random.Random) -> None:
    """Damage a file: its meaning or its bytes."""
    content = path.read_bytes()
    kinds = [damage_bytes]
    suffix = path.suffix
    if suffix in (".json", ".lock"):
        kinds = [damage_json] * 4 + kinds
    elif suffix in (".csv", ".jsonl", ".txt"):
        kinds = [damage_lines] * 3 + ([damage_json_lines] * 3 if suffix == ".jsonl" else []) + kinds
    elif suffix == ".safetensors":
        kinds = [damage_header] * 3 + kinds
    elif suffix in (".npy", ".npz"):
        kinds = [{".npy": damage_npy, ".npz": damage_npz}[suffix]] * 3 + kinds
    path.write_bytes(rng.choice(kinds)(content, rng))


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert or repeat bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 3:
            del data[at : at + rng.choice((1, 4, 100))]
        else:
            data[at:at] = data[: rng.choice((1, 50, 500))]
    return bytes(data)


def damage_value(value: Any, rng: random.Random) -> Any:
    """Another value somewhere in a nested one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return value | {rng.choice(("x", "../x", "/dev/zero")): value[key]}
        return value | {key: damage_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], damage_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 1 << 16))
    return rng.choice(ODD_VALUES)


def to_json(value: Any, rng: random.Random) -> bytes:
    """JSON with values nested as deep as no parser follows."""
    deep = rng.choice(("[" * 5000, "[" * 200 + "]" * 200, '{"a":' * 5000))
    return json.dumps(value).replace(json.dumps(DEEP), deep).encode()


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Other values in a JSON document."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = damage_value(value, rng)
    return to_json(value, rng)


def damage_json_lines(content: bytes, rng: random.Random) -> bytes:
    """Other values in one line of JSON."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damage_json(lines[at], rng)
    return b"\n".join(lines)


def damage_lines(content: bytes, rng: random.Random) -> bytes:
    """Other words in a table, lines left out or repeated."""
    lines = content.decode().splitlines()
    at, kind = rng.randrange(len(lines)), rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at:at] = lines[at : at + rng.randrange(5)]
    elif kind == 2:
        lines.insert(0, f"# n_expert={rng.choice(ODD_WORDS)}")
    else:
        words = lines[at].split(",")
        words[rng.randrange(len(words))] = rng.choice((*ODD_WORDS, str(rng.randrange(1 << 20))))
        lines[at] = ",".join(words)
    return "\n".join(lines).encode(errors="replace")


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """Another header before the same tensors."""
    size = int.from_bytes(content[:8], "little")
    header = damage_json(content[8 : 8 + size], rng)
    if rng.random() < 0.3:
        dtype = rng.choice((b"F8_E4M3", b"BOOL", b"U8", b"F64", b"BF16", b"F4", b"I64", b"C64"))
        header = content[8 : 8 + size].replace(rng.choice((b"F32", b"I64", b"U8")), dtype, 1)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1 << 20, 1 << 62))
    return length.to_bytes(8, "little") + header + content[8 + size :]


def damage_npy(content: bytes, rng: random.Random) -> bytes:
    """Another description before the same numbers."""
    start, size = 10, int.from_bytes(content[8:10], "little")
    header = content[start : start + size].decode()
    shapes = ("(200000000, 3, 2)", "(True, 3, 2)", "(-1, 3, 2)", "()", "(3,)", "(0, 3, 2)", "x")
    dtypes = ("<m8", "|S0", "|O", "<f8", ">i8", "<U9", "|b1", "<i1", "<u2", "V0", "x")
    shape = header[header.index("(") : header.index(")") + 1]
    header = rng.choice(
        (
            header.replace(shape, rng.choice(shapes)),
            header.replace("<i8", rng.choice(dtypes)),
            header.replace("False", rng.choice(("True", "1", "None"))),
            "-" * rng.choice((100, 100, 100, 5000)),
            header.replace("{", "{" * rng.choice((2, 20, 200, 3000))),
        )
    )
    raw = header.encode()
    return content[:8] + len(raw).to_bytes(2, "little") + raw + content[start + size :]


def damage_npz(content: bytes, rng: random.Random) -> bytes:
    """An archive of damaged arrays, of other names and compressions."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    made = io.BytesIO()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    method = rng.choices(methods, (20, 20, 3, 1))[0]  # the others are slow to make
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in members.items():
            place = rng.choice((name, name, name, "../../x.npy", "a.npy"))
            kind = rng.choice((damage_npy, damage_npy, damage_bytes))
            archive.writestr(place, kind(data, rng) if rng.random() < 0.8 else data)
        if rng.random() < 0.02:
            archive.writestr("zeros.npy", bytes(1 << 22))
    return made.getvalue()
