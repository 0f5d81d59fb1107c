"""What files hold, by their names and first bytes. Planning needs it, so it loads no library."""

import re
from typing import Literal

Kind = Literal["text", "lines", "array", "table"]
"""Plain text, a row of JSON a line, an array of JSON, or Parquet."""

MAX_RATIO = 200
"""Text is packed to a tenth of its size or so; one value over and over, to a thousandth."""
MAX_HELD_BYTES = 64 << 20
"""What has to be in memory as a whole, a row or a document, has at most this size; and a packed
file that unpacks to no more is no danger, whatever its ratio."""
START_BYTES = 4096

_PROSE = "txt text md markdown rst adoc org tex html htm log srt vtt"
_CODE = """
    asm bash bat c cc clj cmake coq cpp cs cu cuh cxx dart ex exs el elm erl f f90 f95 fish for fs
    fsx go gradle graphql groovy h hh hpp hs hxx java jl js jsx kt kts lean lisp lua m make mjs cjs
    mk ml mli mm nim nix pas php pl pm proto ps1 py pyi r rb rkt rs s scala scm sh sql sv svelte
    swift tf thrift thy ts tsx v vb vhd vhdl vue zig zsh
"""
_BY_HAND = "bib cfg conf css csv ini less scss svg toml tsv xml yaml yml"
"""Settings and data that people write."""
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(f"{_PROSE} {_CODE} {_BY_HAND}".split(), "text"),
    "jsonl": "lines",
    "ndjson": "lines",
    "parquet": "table",
}
_SNIFFED = "json"
"""Some keep a row a line in such files, some an array, and programmers their settings."""
_PACKED_SUFFIXES = (".gz", ".zst")
_PARQUET = b"PAR1"
_GZIP, _ZSTD, _ZSTD_SKIPPED = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_JSON_LINE = re.compile(rb"(\xef\xbb\xbf)?\s*\{[ \t]*[\"}]")
"""Begins an object that goes on in the same line, as one of many lines over several does not."""
_JSON_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")


def suffix_of(label: str) -> str:
    """The suffix of a file's name in lower case, but for that of its packing; empty without one."""
    own = label.rpartition("/")[2].lower()
    for packed in _PACKED_SUFFIXES:
        own = own.removesuffix(packed)
    return own.rpartition(".")[2] if "." in own else ""


def is_readable(label: str) -> bool:
    """Whether a file's name says that it can be read."""
    suffix = suffix_of(label)
    return suffix == _SNIFFED or suffix in _KINDS


def kind_of(label: str, start: bytes) -> Kind | None:
    """What a file is by its suffix or, without one, by what it begins as; none if unknown."""
    suffix = suffix_of(label)
    if suffix == _SNIFFED:
        if _JSON_LINE.match(start):
            return "lines"
        return "array" if _JSON_ARRAY.match(start) else "text"
    if suffix:
        return _KINDS.get(suffix)
    if start.startswith(_PARQUET):
        return "table"
    return "lines" if _JSON_LINE.match(start) else "text"


def packing_of(start: bytes) -> str | None:
    """What packed a file that begins like this; none if nothing did."""
    if start.startswith(_GZIP):
        return "gzip"
    # Frames without content may come first.
    is_skipped = start[1:4] == _ZSTD_SKIPPED and start[0] >> 4 == 5
    return "zstd" if start.startswith(_ZSTD) or is_skipped else None
