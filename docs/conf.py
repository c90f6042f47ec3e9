"""How the documentation is built: `python -m sphinx -W -b html docs docs/_build/html`."""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# Tutorials run on one thread, as everything measured here did, and ask no hub for anything.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ella  # after the settings that torch reads when it is imported

project = "ella"
author = "The ella developers"
copyright = author
release = ella.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "docstrings",
    "evidence",
    "mathml",
]
exclude_patterns = ["_build", "_ext", "tutorials"]
suppress_warnings = ["config.cache"]  # sphinx-gallery's settings hold functions
default_role = "py:obj"  # docstrings write names in single backticks: a link where there is one

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False}
autoclass_content = "class"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "tutorials_run",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "matplotlib_animations": False,
    "image_scrapers": ("figures.scraper",),
    "write_computation_times": False,
}
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")

html_theme = "furo"
html_title = "ella"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = ">>> "
