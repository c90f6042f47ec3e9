"""Docstrings are plain text with formulas: what reStructuredText would read into it is escaped.

Shapes such as (n, *positions) are no emphasis, p(x|z) is no substitution and a plural after a name
in backticks ends that name.
"""

import re

from sphinx.application import Sphinx

CODE = re.compile(r"(:\w+:`[^`]*`|``[^`]+``|`[^`]*`)")
MATH = re.compile(r"^(\s*)\.\. math::")


def escaped(text: str) -> str:
    """Text with its backticks and roles as they are, and all other markup escaped."""
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<!\\)([*|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", parts[i])
        if i and re.match(r"\w", parts[i]):
            parts[i] = "\\ " + parts[i]
    return "".join(parts)


def escape(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Do so in a docstring, blocks of formulas aside."""
    blocks: list[tuple[bool, list[str]]] = [(False, [])]
    depth = 0
    for line in lines:
        start, inside = MATH.match(line), blocks[-1][0]
        if start:
            depth = len(start[1])
            blocks.append((True, [line]))
        elif inside and line.strip() and len(line) - len(line.lstrip()) <= depth:
            blocks.append((False, [line]))
        else:
            blocks[-1][1].append(line)
    done = ["\n".join(part) if math else escaped("\n".join(part)) for math, part in blocks if part]
    lines[:] = "\n".join(done).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Before napoleon, which writes markup of its own."""
    app.connect("autodoc-process-docstring", escape, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
