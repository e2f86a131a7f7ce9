"""The functions of csrc/cuda/arch, read from its headers."""

import re
from pathlib import Path

ARCH = Path(__file__).parent.parent / "csrc" / "cuda" / "arch"

# A function at the margin: [template <...>] specifiers, return type, name, "(".
_HEAD = re.compile(
    r"^(?:template <[^;{}]*>\s+)?"
    r"(?P<specifiers>(?:(?:__device__|__forceinline__|inline|constexpr|FIL_SIMT_INLINE)\s+)*)"
    r"(?P<result>[\w:]+)\s+(?P<name>\w+)\(",
    re.MULTILINE,
)


def _close(text, start):
    """Index of the parenthesis that closes the one before `start`."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError("unbalanced parentheses")


def _parameter_type(parameter):
    """`const uint32_t (&a)[4]` -> `const uint32_t (&)[4]`, `int n = 3` -> `int`."""
    parameter = " ".join(re.sub(r"\w+::", "", parameter.split("=")[0]).split())
    if array := re.fullmatch(r"(.*\([&*])\w+(\)\[\w+\])", parameter):
        return array[1] + array[2]
    named = re.fullmatch(r"(.*[\s*&])\w+", parameter)
    return (named[1] if named else parameter).strip()


def declared(side):
    """Names -> sorted (result type, *parameter types) of the functions; side: ptx, cpu.

    The executor's functions take the call's site behind what the others take; it is left out.
    """
    functions = {}
    for path in sorted(ARCH.glob(f"{side}*.cuh")):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        for head in _HEAD.finditer(text):
            parameters = text[head.end() : _close(text, head.end())]
            split = [p for p in re.split(r",(?![^(\[]*[)\]])", parameters) if p.strip()]
            types = tuple(_parameter_type(p) for p in split if not re.search(r"\bSite\b", p))
            functions.setdefault(head["name"], []).append((head["result"], *types))
    return {name: sorted(signatures) for name, signatures in functions.items()}
