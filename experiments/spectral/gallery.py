"""One picture of all figures: `results/gallery.png`.

python experiments/spectral/gallery.py
"""

from pathlib import Path

from _common import new_figure
from matplotlib.image import imread

RESULTS = Path(__file__).parent / "results"
COLUMNS = 2


def main() -> None:
    """Put the figures of `results` side by side, in the order of their names."""
    paths = [path for path in sorted(RESULTS.glob("*.png")) if path.stem != "gallery"]
    rows = -(-len(paths) // COLUMNS)
    figure = new_figure(7 * COLUMNS, 4.2 * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for panel in panels:
        panel.axis("off")
    for panel, path in zip(figure.axes, paths, strict=False):
        panel.imshow(imread(path))
        panel.set_title(path.stem.replace("_", " "), fontsize=11)
    figure.savefig(RESULTS / "gallery.png", dpi=100)


if __name__ == "__main__":
    main()
