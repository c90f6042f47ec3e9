"""The pages of the studies, which lie beside their scripts, copied into the site.

Links among pages stay; those to scripts and pictures are led back to where these are.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

SITE = Path(__file__).parents[1]
STUDIES = SITE.parent / "experiments"
LINK = re.compile(r"(\]\()(?!\w+:)([^)#]+)")


def copy(app: Sphinx, config: Config) -> None:
    """Write each page that is new or has changed to `docs/evidence`, which git ignores."""
    for page in STUDIES.rglob("*.md"):
        target = SITE / "evidence" / page.relative_to(STUDIES)
        text = relinked(page.read_text(), page.parent, target.parent)
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


def relinked(text: str, before: Path, after: Path) -> str:
    """A page that moves from one folder to another, with links that still lead to files."""

    def moved(match: re.Match[str]) -> str:
        if match[2].endswith(".md"):
            return match[0]
        return match[1] + os.path.relpath(before / match[2], after)

    return LINK.sub(moved, text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Copy before Sphinx looks which pages there are."""
    app.connect("config-inited", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
