"""Scripts use the library as anybody would: public names of public modules alone."""

import ast
import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PATHS = sorted(EXPERIMENTS.rglob("*.py"))
PUBLIC = (
    *("ella", "ella.baselines", "ella.demo", "ella.eigenfunctions", "ella.metrics"),
    *("ella.report", "ella.spectral"),
)
OWN = ("self", "cls", "super")


def violations(source):
    """What a script imports from elsewhere in the library, and what of it that is private."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "ella" != a.name]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ella":
            if node.module not in PUBLIC:
                found.append(node.module)
                continue
            public = set(importlib.import_module(node.module).__all__)
            found += [a.name for a in node.names if a.name not in public | {"metrics"}]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = node.value
            if isinstance(owner, ast.Call):
                owner = owner.func
            mine = isinstance(owner, ast.Name) and owner.id in OWN
            if not mine and not node.attr.startswith("__"):
                found.append(node.attr)
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_scripts_use_public_names_alone(path):
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ella.linearize import Linearized",
        "from ella.spectral.problems import Pair",
        "import ella.predictor",
        "from ella import no_such_name",
        "from ella.baselines import _laplace",
        "def f(method): return method._fit",
        "method.fit(x)._evaluate(x)",
    ],
)
def test_a_deep_or_private_name_is_found(source):
    assert len(violations(source)) == 1


def test_command_lines_are_parsed_once():
    """Into a frozen dataclass: `argparse.Namespace` is no argument of any function."""
    for path in PATHS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.annotation is not None:
                assert "Namespace" not in ast.unparse(node.annotation), path
