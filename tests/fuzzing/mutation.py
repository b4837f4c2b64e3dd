"""Inputs made of other inputs: their bytes, their JSON or YAML trees, or the instructions of their pickles changed."""

import io
import json
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

Mutator = Callable[[Random, Sequence[bytes]], bytes]

_INTERESTING: Final = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32,
    2**60,
    2**63,
    2**64 - 1,
)
_SCRAPS: Final = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e9", b"true", b"null", b"NaN", b"\xff", b"\\ud800", b"9" * 30,
    b"\0", b"\n", b"\xef\xbb\xbf", b"&a ", b"*a", b"<<: ", b"- ", b"..", b"/", b"PK\x01\x02", b"PK\x05\x06",
    b"PK\x06\x06",
    b"cos\nsystem\n", b"R", b"b", b"(", b"t",
)  # fmt: skip


def of_bytes(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """Some bytes flipped, put in, taken out, doubled, cut off, set to a telling number, or taken from another input."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        to = at + rng.choice((1, 2, 8, 64))
        match rng.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                data[at:at] = rng.choice(_SCRAPS)
            case 3:
                data[at : at + 1] = rng.choice(_SCRAPS)
            case 4:
                del data[at:to]
            case 5:
                data[to:to] = data[at:to] * rng.choice((1, 1, 3, 200))
            case 6 if rng.random() < 0.3:
                del data[at:]
            case 7:
                width = rng.choice((1, 2, 4, 8))
                data[at : at + width] = (rng.choice(_INTERESTING) % 256**width).to_bytes(width, "little")
            case 8:
                other = rng.choice(corpus)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)


# Values in the place of any other, as JSON text. What is no JSON stands here on purpose.
_JSON_VALUES: Final = (
    "null", "true", "false", "0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1e308", "1e999", "-1e999", "NaN",
    "Infinity", "-Infinity",
    str(2**31 - 1), str(2**31), str(2**60), str(2**63), str(2**64), "-" + str(2**63), "9" * 5000, "1" * 4000, "[]",
    "{}", "[[]]", '""',
    '"\\ud800"', '"\\u0000"', '"\\n\\u001b[2J"', '"é\\u202e"', '"../../x"', '"/etc/passwd"', '"' + "x" * 5000 + '"',
    '"motif"', '"diffllama"', '"llama"', "[1,1]", "[" * 30 + "]" * 30, "[" * 900 + "]" * 900, "[" * 960 + "]" * 960,
    "[" * 985 + "]" * 985, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "[" + "0," * 3000 + "0]", '{"a":1,"a":2}',
    "Tru", "1.", "01", "'a'",
)  # fmt: skip
# The same for YAML: tags, aliases, merges, and what its types are made of.
_YAML_VALUES: Final = (
    "&a [*a, *a]", "&b {x: *b}", "*a", "!!python/object/apply:os.system ['touch marker']",
    "!!python/name:os.system ''", "!!binary '!'",
    "!!binary aGVsbG8=", "2024-99-99", "2024-01-01", "2024-01-01T25:00:00Z", "0o8", "0o17", "0x" + "f" * 5000,
    "0b12", ".inf", ".nan", "1_000", "12:30:45",
    "!!int x", "!!int ''", "!!float x", "!!bool x", "!!set {a}", "!!set [a]", "!!omap [a: 1]", "!!omap {a: 1}",
    "!!pairs [a: 1]", "!!timestamp x", "!!null x",
    "!!str [a]", "!!map [a]", "!!seq {a: 1}", "!x y", "!<tag:x> y", "{[a]: b}", "{{a: b}: c}", "{a: 1, a: 2}", "? a",
    "{<<: {a: 1}}", "{<<: [1]}", "{<<: x}",
    "{? [a, [b]] : 1}", "{2024-01-01: 1}", "{~: 1}", "{1: 1, 1.0: 2}", "=", "<<", "4:1", "given:.", "given:x\0y",
    "given:" + "x" * 5000, "'after:0,0,0'", "after:999999",
    '"\\ud800"', '"\\xzz"', '"\\U00110000"', "|", ">9", "%YAML 1.1", "---", "...", "@x", "`x", "\t",
    "!!python/tuple [1]", "[" * 60 + "]" * 60, "[" * 3000, "{a: " * 300,
    "[&a [1, 1], " + ", ".join(f"&{chr(at + 1)} [{f'*{chr(at)}, ' * 9}]" for at in range(ord("a"), ord("n"))) + "]",
)  # fmt: skip


class Pairs(list[Any]):
    """A JSON object, whose keys may come twice."""


class Raw(str):
    """JSON text as it is."""

    __slots__ = ()


def json_text(tree: Any) -> str:
    """A tree of `Pairs`, lists and plain values as text."""
    if isinstance(tree, Pairs):
        return (
            "{"
            + ",".join(f"{key if isinstance(key, Raw) else json.dumps(key)}:{json_text(value)}" for key, value in tree)
            + "}"
        )
    if isinstance(tree, list):
        return "[" + ",".join(map(json_text, tree)) + "]"
    return tree if isinstance(tree, Raw) else json.dumps(tree)


def _change_tree(rng: Random, tree: Any, others: Any, values: Sequence[str]) -> None:
    """Change one place of a tree: another value, or its keys or entries taken out, put in, doubled or swapped."""
    parents = [tree]
    for node in parents:
        parents += [child for child in _children(node) if isinstance(child, list) and len(child)]
    # Near the top as likely as deep down, where there is most.
    node = rng.choice(parents) if rng.random() < 0.5 else rng.choice(parents[: 1 + len(parents) // 8])
    at = rng.randrange(len(node)) if node else 0
    is_object = isinstance(node, Pairs)
    new: Any = Raw(rng.choice(values))
    if rng.random() < 0.2:
        taken = [child for place in (rng.choice(parents), others) for child in _children(place)]
        new = Raw(json_text(rng.choice(taken))) if taken else new
    elif rng.random() < 0.2:
        new = rng.choice(_INTERESTING) * rng.choice((1, -1))
    match rng.randrange(8):
        case 0 if node:
            del node[at]
        case 1 if node:
            node.append(node[at])
        case 2:
            node.insert(
                at,
                (rng.choice((new if isinstance(new, str) and new.startswith('"') else "x", "x")), new)
                if is_object
                else new,
            )
        case 3 if node and is_object:
            name = rng.choice(('"\\ud800"', '"__class__"', '""', '"head_dim"', '"a.b"', '"' + "k" * 300 + '"'))
            node[at] = (Raw(name), node[at][1])
        case 4 if len(node) > 1:
            other = rng.randrange(len(node))
            if is_object:
                node[at], node[other] = (node[at][0], node[other][1]), (node[other][0], node[at][1])
            else:
                node[at], node[other] = node[other], node[at]
        case _ if node:
            node[at] = (node[at][0], new) if is_object else new


def _children(node: Any) -> list[Any]:
    if isinstance(node, Pairs):
        return [value for _, value in node]
    return list(node) if isinstance(node, list) else []


def _of_tree(rng: Random, corpus: Sequence[bytes], values: Sequence[str]) -> str:
    tree, others = (json.loads(rng.choice(corpus), object_pairs_hook=Pairs) for _ in range(2))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change_tree(rng, tree, others, values)
    return json_text(tree)


def of_json(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """Half of them bytes changed, half the tree."""
    if rng.random() < 0.4:
        return of_bytes(rng, corpus)
    return _of_tree(rng, corpus, _JSON_VALUES).encode("utf-8", "surrogatepass")


def of_lines(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """The same for JSON a line."""
    lines = rng.choice(corpus).splitlines()
    at = rng.randrange(len(lines))
    lines[at] = of_json(rng, [lines[at]])
    return b"\n".join(lines)


def of_yaml(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """The corpus is YAML that is JSON too; trees are changed to what only YAML has as well."""
    if rng.random() < 0.4:
        return of_bytes(rng, corpus)
    values = _YAML_VALUES if rng.random() < 0.7 else _JSON_VALUES
    text = _of_tree(rng, corpus, values)
    if rng.random() < 0.1:
        text = rng.choice(("%YAML 1.1\n---\n", "\ufeff", "--- ", "&a ", "!!set ", "- ", "x: &a [1]\n")) + text
    return text.encode("utf-8", "surrogatepass")


def of_shard(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """The header's tree, with a length that mostly fits; or bytes of the file."""
    content = rng.choice(corpus)
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        return (
            of_bytes(rng, [content[: 8 + size]]) + content[8 + size :] if rng.random() < 0.8 else of_bytes(rng, corpus)
        )
    header = _of_tree(rng, [content[8 : 8 + size]], _JSON_VALUES).encode("utf-8", "surrogatepass")
    claim = rng.choice(_INTERESTING) if rng.random() < 0.1 else len(header)
    return (claim % 2**64).to_bytes(8, "little") + header + content[8 + size :]


# Instructions to put into a pickle: names of what would do harm, calls, memo and stack tricks, huge or odd values.
_INSTRUCTIONS: Final = (
    b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\nexec\n", b"cbuiltins\neval\n", b"cplanted\nrun\n",
    b"\x8c\x07planted\x8c\x03run\x93",
    b"ctorch\nSize\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n",
    b"ccollections\nCounter\n", b"X\x0c\x00\x00\x00touch marker",
    b"R", b"\x81", b"\x92", b"b", b"Q", b"Pid\n", b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00",
    b"iplanted\nrun\n", b"o", b"0", b"1", b"2",
    b"N", b"\x88", b"]", b"}", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"\x94",
    b"q\x00", b"h\x00", b"h\x01", b"j\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255,
    b"G\x7f\xf8" + b"\0" * 6, b"G\x7f\xf0" + b"\0" * 6,
    b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 7 + b"\x00",
    b"\x95" + b"\xff" * 8, b"\x80\x05", b"\x80\xff", b".", b"I99\n", b"L99L\n",
    b"F1e999\n", b"S'a'\n", b"Va\n", b"\x8f", b"\x90", b"\x91", b"\x97", b"\x98", b"K\x02\x86R" , b"(" * 50,
    b")" + b"\x85" * 2000, b"]" + b"\x94]" * 500 , b"2\x86" * 40, b"2\x86" * 400,
    b"X\x03\x00\x00\x00\xed\xa0\x80", b"X\x01\x00\x00\x00\x00", b"X\x09\x00\x00\x00../secret",
    b"\x8a\x05\xff\xff\xff\xff\x7f",
)  # fmt: skip


def of_pickle(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """Instructions taken out, doubled, swapped, put in or taken from another pickle; or bytes changed."""
    if rng.random() < 0.3:
        return of_bytes(rng, corpus)
    raw, other = rng.choice(corpus), rng.choice(corpus)
    steps, others = _instructions(raw), _instructions(other)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(steps))
        match rng.randrange(6):
            case 0:
                del steps[at : at + rng.choice((1, 1, 3))]
            case 1:
                steps[at:at] = steps[at : at + rng.choice((1, 2, 6))] * rng.choice((1, 1, 30))
            case 2:
                swapped = rng.randrange(len(steps))
                steps[at], steps[swapped] = steps[swapped], steps[at]
            case 3:
                steps[at] = rng.choice(others)
            case _:
                steps[at : at + rng.randrange(2)] = [rng.choice(_INSTRUCTIONS)]
        steps = steps or [b"."]
    return b"".join(steps)


def _instructions(raw: bytes) -> list[bytes]:
    starts = [at for _, _, at in pickletools.genops(raw) if at is not None]
    return [raw[start:stop] for start, stop in zip(starts, [*starts[1:], len(raw)], strict=True)]


def of_torch_file(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """The zip that `torch.save` writes: its bytes, the pickle in it, or its records."""
    raw = rng.choice(corpus)
    if rng.random() < 0.35:
        return of_bytes(rng, corpus)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    pickled = next(at for at, (name, _) in enumerate(records) if name.endswith("/data.pkl"))
    name, content = records[pickled]
    if rng.random() < 0.8:
        records[pickled] = name, of_pickle(rng, [content])
    else:
        at = rng.randrange(len(records))
        match rng.randrange(4):
            case 0:
                del records[at]
            case 1:
                records.append(records[at])
            case 2:
                records[at] = records[at][0], of_bytes(rng, [records[at][1] or b"x"])
            case 3:
                records[at] = rng.choice(("../x", "", "a/data.pkl", "é" * 300, "a/byteorder")), records[at][1]
    written = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(written, "w", how) as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content, how)
    return written.getvalue()
