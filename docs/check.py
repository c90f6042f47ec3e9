"""Are all links inside the built site whole, and is every public object in it? No network.

python docs/check.py docs/_build/html
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util.inventory import InventoryFile

MODULES = ("ella", "ella.baselines", "ella.metrics", "ella.sklearn", "ella.spectral")


class Page(HTMLParser):
    """Anchors of a page, what it links to, and pictures that say nothing to those who cannot see.

    Args:
        path: The page.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.mute: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag defines and what it needs."""
        found = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}
        self.links += [value for key in ("href", "src") if (value := found.get(key))]
        if tag == "img" and found.get("alt") is None:  # "" is for decoration
            self.mute.append(found.get("src") or "?")


def broken(site: Path) -> Iterator[str]:
    """Links to files or anchors that are not there, and pictures without a text."""
    page = cache(Page)
    for path in sorted(site.rglob("*.html")):
        if "_static" in path.parts:
            continue
        for link in page(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            whole = target.is_file()
            if whole and anchor and target.suffix == ".html":
                whole = anchor in page(target).anchors
            if not whole:
                yield f"{path.relative_to(site)}: {link}"
        for picture in page(path).mute:
            yield f"{path.relative_to(site)}: no alternative text for {picture}"


def missing(site: Path) -> Iterator[str]:
    """Public names that have no entry; those of other modules count where they are the same."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, name: name)
    named = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    entries = {name: object_at(name) for name in named if name.startswith("ella")}
    known = {id(found) for found in entries.values()}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            if (
                f"{module.__name__}.{name}" not in entries
                and id(getattr(module, name)) not in known
            ):
                yield f"{module.__name__}.{name}"


def object_at(name: str) -> object:
    """What a dotted name means, or None."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found
    return None


def main() -> None:
    """Say what is wrong, and fail if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    site = parser.parse_args().site.resolve()
    wrong = [f"broken: {each}" for each in broken(site)]
    wrong += [f"not documented: {each}" for each in missing(site)]
    print("\n".join(wrong) or "All links are whole, every public object is documented.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
