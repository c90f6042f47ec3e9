"""The package's layout: imports point one way, and importing it costs nothing optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ella"
ORDER = (
    "arguments",
    "modes",
    "processes",
    "inputs",
    "targets",
    "collection",
    "saving",
    "checkpoint",
    "metrics",
    "wrappers",
    "views",
    "attention",
    "outputs",
    "network",
    "batches",
    "spectral",
    "derivatives",
    "routes",
    "linearize",
    "uses",
    "tracing",
    "sketches",
    "kronecker",
    "activations",
    "choosing",
    "lognormal",
    "predictive",
    "links",
    "lumped",
    "scores",
    "likelihoods",
    "positions",
    "hints",
    "seen",
    "posterior",
    "eigenfunctions",
    "distance",
    "hyperparameters",
    "hyperprior",
    "validation",
    "calibrate",
    "predictions",
    "evaluated",
    "predictor",
    "baselines",
    "fitted",
    "export",
    "formats",
    "stored",
    "summing",
    "estimator",
    "sklearn",
    "report",
    "demo",
    "command",
    "__main__",
)
PATHS = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def parts_used(path):
    """Names of the package's parts that a file imports, whichever way it is written."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            if module == "ella":
                used |= {alias.name for alias in node.names}
            elif module.startswith("ella."):
                used.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            used |= {[*name, ""][1] for name in names if name[0] == "ella"}
    return used


def test_every_part_has_a_place():
    assert {part_of(path) for path in PATHS} == set(ORDER)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = part_of(path)
    for used in parts_used(path) - {own}:
        assert ORDER.index(used) < ORDER.index(own), f"{own} imports {used}"


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("spectral", {"inputs"}),  # knows no classifier
        ("metrics", {"targets"}),
        # The k-dimensional half knows neither weights nor where φ came from.
        ("predictive", {"inputs"}),
        ("scores", {"predictive"}),
        ("lumped", {"lognormal", "predictive"}),
        ("likelihoods", {"links", "inputs", "targets", "predictive", "lumped", "scores"}),
        ("posterior", {"links", "predictive", "likelihoods", "saving", "processes"}),
        ("hyperparameters", {"links", "predictive", "likelihoods"}),
        (
            "calibrate",
            {
                "links",
                "predictive",
                "likelihoods",
                "hyperparameters",
                "hyperprior",
                "processes",
                "validation",
            },
        ),
    ],
)
def test_the_halves_do_not_know_each_other(part, allowed):
    used = set().union(*(parts_used(path) for path in PATHS if part_of(path) == part))
    assert used - {part, "arguments"} <= allowed


def test_import_loads_nothing_optional():
    optional = ("netcal", "laplace", "backpack", "curvlinops", "sklearn", "matplotlib", "scipy")
    optional += ("jinja2", "mnist1d")
    script = f"import sys, ella; print([m for m in {optional!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    import ella

    assert all(hasattr(ella, name) for name in ella.__all__)
    assert len(set(ella.__all__)) == len(ella.__all__)


def functions():
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def count(kind, name=None):
    """Nodes of a kind in the package, with a name if one is given."""
    trees = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)]
    return len([node for node in nodes if name is None or getattr(node, "id", None) == name])


def test_the_house_stays_small():
    """What CONTRIBUTING.md promises readers: short functions, and types that say something."""
    assert {name: lines for name, lines in functions() if lines > 50} == {}
    lengths = {path.name: len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
    assert count(ast.Name, "cast") <= 2
    assert count(ast.Assert) == 0  # what is wrong is said, also under `python -O`
    assert count(ast.Name, "Any") <= 70
