"""Figures that belong to no window, as `ella.metrics.reliability_diagram` makes them."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst, matplotlib_scraper


def scraper(block: tuple[Any, ...], variables: dict[str, Any], settings: dict[str, Any]) -> str:
    """What pyplot holds; else the variable `figure` of a block that assigns one."""
    found = matplotlib_scraper(block, variables, settings)
    figure = variables["example_globals"].get("figure")
    if found or not isinstance(figure, Figure) or "figure = metrics." not in block[1]:
        return found
    path = next(variables["image_path_iterator"])
    figure.savefig(path, dpi=100)
    return figure_rst([path], settings["src_dir"], "reliability diagrams")
