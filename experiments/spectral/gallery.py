"""One picture of all figures: `results/gallery.png`.

python experiments/spectral/gallery.py
"""

from pathlib import Path

from _common import new_figure
from matplotlib.image import imread

RESULTS = Path(__file__).parent / "results"
COLUMNS = 2
WIDTH = 7.0
"""Of each figure, in inches."""


def main() -> None:
    """Put the figures of `results` side by side, in the order of their names."""
    paths = [path for path in sorted(RESULTS.glob("*.png")) if path.stem != "gallery"]
    pictures = {path.stem.replace("_", " "): imread(path) for path in paths}
    ratios = [picture.shape[0] / picture.shape[1] for picture in pictures.values()]
    heights = [max(ratios[i : i + COLUMNS]) for i in range(0, len(ratios), COLUMNS)]
    figure = new_figure(WIDTH * COLUMNS, sum(WIDTH * height + 0.4 for height in heights))
    panels = figure.subplots(len(heights), COLUMNS, squeeze=False, height_ratios=heights).flat
    for panel in panels:
        panel.axis("off")
    for panel, (name, picture) in zip(figure.axes, pictures.items(), strict=False):
        panel.imshow(picture)
        panel.set_title(name, fontsize=12)
    figure.savefig(RESULTS / "gallery.png", dpi=100)


if __name__ == "__main__":
    main()
