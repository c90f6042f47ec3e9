"""What comes of attacks on the library is right, or our error: never NaN, never another's message.

The table is in `attacks.py`, one line a case.
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from attacks import FAMILIES, HERE, OUTCOMES, World, verdict
from torch.overrides import _get_current_function_mode_stack

import ella as package
from ella.views import shared_copy

pytestmark = [
    pytest.mark.filterwarnings("ignore:calibrate. "),
    # Of Python 3.12 and later, where a process with threads forks.
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]

CASES = [
    pytest.param(attack, outcome, id=f"{family}: {name}")
    for family, cases in FAMILIES.items()
    for name, (attack, outcome) in cases.items()
]


@pytest.mark.parametrize(("attack", "outcome"), CASES)
def test_attack(attack, outcome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert verdict(attack, outcome, World(tmp_path)) in ("right", "our error")


def test_the_table_is_that_of_these_cases():
    """The README's numbers of cases, none of them bad, and all changes of the core noticed."""
    text = (HERE / "README.md").read_text()
    for family, cases in FAMILIES.items():
        right = sum(outcome in OUTCOMES for _, outcome in cases.values())
        row = f"| {family} | {len(cases)} | {right} | {len(cases) - right} | 0 |"
        assert row in text, f"run `python -m tests.summary`; expected {row}"
    outcomes = json.loads((HERE / "mutants.json").read_text())
    survived = [name for name, outcome in outcomes.items() if outcome == "survived"]
    assert set(survived) <= set(EQUIVALENT) | set(UNNOTICED)
    assert f"{len(outcomes) - len(survived)} of {len(outcomes)} noticed" in text


UNNOTICED = ('hyperparameters.py: positive = ("prior_precision", -> positive = (',)
"""Changes that no quick test notices yet."""
EQUIVALENT = ()
"""Changes that change nothing, with the reason."""


# Interrupted at any moment


class Interruption:
    """Ctrl-C at the n-th line that is run in the package."""

    def __init__(self, at):
        self.left = at
        self.root = str(Path(package.__file__).parent)

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.root):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


CALLS = {
    "fit": lambda world, ella: ella.fit(world.val),
    "calibrate": lambda world, ella: ella.calibrate(world.val, n_samples=4),
    "partial_fit": lambda world, ella: ella.partial_fit(world.val),
    "forget": lambda world, ella: ella.forget(world.train[:1]),
    "predict_proba": lambda world, ella: ella.predict_proba(world.test),
    "save": lambda world, ella: ella.save(world.path),
}
MOMENTS = 34
"""Of each call: 204 in all."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left to gc
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("method", ["nystrom", "neural"])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_changes_nothing_or_all(name, method, tmp_path):
    world, call = World(tmp_path), CALLS[name]
    ella = world.ella(method)
    file = world.saved(method)
    before, flags = ella.predict_proba(world.test), state_of(ella.model)
    done = world.ella(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Interruption(-1) as counting:
            call(world, done)
    after, new_file = done.predict_proba(world.test), world.path.read_bytes()
    lines = -1 - counting.left
    moments = torch.randint(1, lines, (MOMENTS // 2,), generator=torch.Generator().manual_seed(0))
    for moment in moments.tolist():
        world.path.write_bytes(file)
        twin = world.ella(method)
        with pytest.raises(KeyboardInterrupt), Interruption(moment):
            call(world, twin)
        assert state_of(twin.model) == flags
        found = twin.predict_proba(world.test)
        assert torch.equal(found, before) or torch.equal(found, after)
        assert world.path.read_bytes() in (file, new_file)
        assert [p.name for p in tmp_path.iterdir()] == [world.path.name]
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_no_mode_outlives_an_interruption():
    """At every line: a mode that is left on would share what the user copies afterwards."""
    model = torch.nn.Linear(2, 2)
    with Interruption(-1) as counting:
        shared_copy(model)
    for moment in range(1, -counting.left):
        with pytest.raises(KeyboardInterrupt), Interruption(moment):
            shared_copy(model)
        assert not _get_current_function_mode_stack()
    assert copy.deepcopy(model).weight.data_ptr() != model.weight.data_ptr()


def state_of(model):
    """What a call must not change: modes, gradients, hooks and values."""
    modules = [(m.training, len(m._forward_hooks), sorted(vars(m))) for m in model.modules()]
    weights = [(p.requires_grad, p.grad, p.tolist()) for p in model.parameters()]
    return modules, weights, torch.get_rng_state().tolist()
