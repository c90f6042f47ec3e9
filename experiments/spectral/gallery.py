"""One picture of all figures: `results/gallery.png`.

python experiments/spectral/gallery.py
"""

from collections.abc import Mapping
from pathlib import Path

from _common import new_figure
from matplotlib.image import imread

RESULTS = Path(__file__).parent / "results"
COLUMNS = 3
WIDTH, TITLE, GAP = 6.0, 0.35, 0.15
"""Of each figure, of the line above it and of the space between two, in inches."""


def columns(heights: Mapping[str, float], count: int) -> list[list[str]]:
    """Names in columns of about one height: the highest first, each into the lowest column."""
    found: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(heights, key=lambda name: -heights[name]):
        min(found, key=lambda column: sum(heights[each] for each in column)).append(name)
    return found


def main() -> None:
    """Put the figures of `results` into columns that leave little empty: for one screen."""
    paths = [path for path in sorted(RESULTS.glob("*.png")) if path.stem != "gallery"]
    pictures = {path.stem: imread(path) for path in paths}
    heights = {
        name: WIDTH * picture.shape[0] / picture.shape[1] + TITLE + GAP
        for name, picture in pictures.items()
    }
    placed = columns(heights, COLUMNS)
    height = max(sum(heights[name] for name in column) for column in placed)
    width = COLUMNS * (WIDTH + GAP)
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    for i, column in enumerate(placed):
        # What a column lacks is shared out between its figures.
        spare = (height - sum(heights[name] for name in column)) / len(column)
        top = height
        for name in column:
            tall = heights[name] - TITLE - GAP
            left, bottom = i * (WIDTH + GAP) + GAP / 2, top - TITLE - tall
            box = (left / width, bottom / height, WIDTH / width, tall / height)
            panel = figure.add_axes(box)
            panel.imshow(pictures[name], aspect="auto")
            panel.axis("off")
            panel.set_title(name.replace("_", " "), fontsize=13)
            top -= heights[name] + spare
    figure.savefig(RESULTS / "gallery.png", dpi=110)


if __name__ == "__main__":
    main()
