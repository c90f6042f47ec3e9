"""What the documentation says of names, links and calls; `.ci/run` builds the site itself."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))
MODULES = (
    *("ella", "ella.baselines", "ella.metrics", "ella.report"),
    *("ella.sklearn", "ella.spectral"),
)
BUILT = ("tutorials_run", "evidence")
"""Folders of docs that exist once the site was built."""


def documented():
    """Dotted names that an API page documents, and the pages that they are on."""
    directive = re.compile(r"^\.\. auto(?:class|function|exception|data):: (\S+)", re.MULTILINE)
    return {
        name: page.stem
        for page in sorted((DOCS / "api").glob("*.rst"))
        for name in directive.findall(page.read_text())
    }


def at(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_object_is_documented(module):
    pytest.importorskip("sklearn")
    names = documented()
    objects = [at(name) for name in names]
    for public in importlib.import_module(module).__all__:
        found = at(f"{module}.{public}")
        if public in ("metrics", "report") and module == "ella":
            continue  # pages of their own
        assert f"{module}.{public}" in names or any(found is each for each in objects), public


def test_every_documented_name_is_public_and_has_a_docstring():
    pytest.importorskip("sklearn")
    for name in documented():
        module, _, attribute = name.rpartition(".")
        assert attribute in importlib.import_module(module).__all__, name
        assert at(name).__doc__, name


def test_every_page_of_the_api_is_reached():
    index = (DOCS / "api" / "index.md").read_text()
    assert all(f"\n{page}\n" in index for page in set(documented().values()))


def anchors(page):
    """Of headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\([^)]*\)", "", head)) for head in heads]
    return {head.strip().lower().replace(" ", "-") for head in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        if page.parent == DOCS and path.startswith("evidence/"):
            path = path.replace("evidence/", "../experiments/", 1)
        if page.parent == DOCS and path.startswith("tutorials_run/"):
            path = path.replace("tutorials_run/", "tutorials/", 1).replace(".rst", ".py")
        path = path.replace("tutorials/index.py", "tutorials/GALLERY_HEADER.rst")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def calls(variable):
    """Attributes that a page takes of a variable in its code spans."""
    text = (DOCS / "laplace_torch.md").read_text()
    spans = re.findall(r"`([^`]+)`", text)
    return {name for span in spans for name in re.findall(rf"\b{variable}\.(\w+)", span)}


def test_calls_of_laplace_torch_exist():
    laplace = pytest.importorskip("laplace")
    la = laplace.Laplace(torch.nn.Sequential(torch.nn.Linear(2, 2)), "classification")
    assert calls("la")
    assert all(hasattr(la, name) for name in calls("la"))
    assert hasattr(laplace, "ELLA")


def test_calls_of_the_table_exist():
    import ella
    import ella.baselines

    model = torch.nn.Linear(2, 2)
    names = calls("ella") - {"baselines"}
    assert names
    assert all(hasattr(ella.ELLA(model), name) for name in names)
    assert all(hasattr(ella.ELLA, name) for name in calls("ELLA"))
    assert all(hasattr(ella.baselines, name) for name in calls("baselines"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_use_public_names_alone(path):
    """They are executed when the site is built; this is found out sooner."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ella":
            assert node.module in MODULES
            public = set(importlib.import_module(node.module).__all__)
            assert {alias.name for alias in node.names} <= public


def test_every_page_of_evidence_is_in_the_contents():
    listed = set(re.findall(r"^evidence/(\S+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    folder = ROOT / "experiments"
    assert listed == {
        str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.md")
    }
