"""The command line, in process: what it writes, what it says, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ella import ELLA, LastLayer, Probit
from ella.command import main

pytest.importorskip("jinja2")

MODULE = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from ella import LastLayer


def loader(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    x = torch.randn(n, 4, generator=generator)
    x[torch.arange(n), y] += 2
    return DataLoader(TensorDataset(x, y), batch_size=50)


def named():
    linear = torch.nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(4 * torch.eye(3, 4)), linear.bias.zero_()
    return {
        "model": linear,
        "train": loader(100, 0),
        "val": loader(300, 1),
        "test": loader(200, 2),
        "ood": {"far": [9 * torch.randn(50, 4)]},
        "classes": ["red", "green", "blue"],
        "eigenfunctions": LastLayer(),
    }


def short():
    found = named()
    return found["model"], found["train"], found["val"], found["test"]


def lacking():
    return {"model": named()["model"], "train": loader(100, 0)}


def unknown():
    return {**named(), "tset": None}


def wrong_labels():
    return {**named(), "val": [(torch.randn(5, 4), torch.full((5,), 7))]}


def shifted_targets():
    found = named()
    del found["classes"], found["eigenfunctions"]
    batches = {}
    for name, n in (("train", 100), ("val", 300), ("test", 200)):
        x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
        batches[name] = [(x, x @ torch.ones(4, 1) + x[:, :1].sin())]
    model = torch.nn.Linear(4, 1)
    return {**found, **batches, "model": model, "likelihood": "regression",
            "eigenfunctions": LastLayer(), "classes": ["height"]}


def tagged():
    found = named()
    for name in ("train", "val", "test"):
        found[name] = [(x, torch.stack([y == 0, y != 1, y == 2], 1)) for x, y in found[name]]
    return {**found, "likelihood": "multilabel"}


def one_source():
    return {**named(), "ood": [torch.randn(50, 4)]}


def number():
    return 3


def broken():
    return {}["no such key"]


nothing = None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_module.py").write_text(MODULE)
    (tmp_path / "their_broken_module.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "their_module"
    sys.modules.pop("their_module", None)


@pytest.fixture
def saved(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(30, 4), torch.arange(30) % 3)]
    fitted = ELLA(model, eigenfunctions=LastLayer(), progress=False).fit(data)
    fitted.save(tmp_path / "ella.safetensors")
    return tmp_path / "ella.safetensors"


# --- report -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:calibrate. 300 validation examples alone")
def test_report_writes_the_page_and_says_where(module, tmp_path, capsys):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    command = ["report", f"{module}:named", "--out", str(page), "--json", str(numbers)]
    assert main([*command, "--samples", "20", "--risk", "0.05"]) == 0
    said = capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert found["verdict"]["sentence"] in said
    assert said.strip().endswith(f"The page is {page}")
    assert [row["method"] for row in found["rows"]] == ["MAP", "temperature scaling", "ELLA"]
    assert {"auroc far", "nll"} <= set(found["rows"][0]["metrics"])
    assert found["verdict"]["num_resamples"] == 20
    assert found["risk"] == 0.05
    assert "coverage at 5 % error" in page.read_text()
    assert {gap["name"] for gap in found["classes"]} <= {"red", "green", "blue"}


@pytest.mark.filterwarnings("ignore:calibrate. 300 validation examples alone")
def test_one_source_needs_no_name_and_distance_is_a_flag(module, tmp_path):
    assert main(["report", f"{module}:one_source", "--distance", "--samples", "5"]) == 0
    text = (tmp_path / "ella-report.html").read_text()
    assert "AUROC, out of distribution" in text
    assert "ELLA with distance" in text


@pytest.mark.filterwarnings("ignore:calibrate. 300 validation examples alone")
@pytest.mark.parametrize(
    ("function", "plural", "risk", "text"),
    [
        ("shifted_targets", "targets", "2.5", "coverage at RMSE 2.5"),
        ("tagged", "labels", "0.2", "coverage at 20 % wrong labels"),
    ],
)
def test_report_of_other_targets(module, tmp_path, capsys, function, plural, risk, text):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    command = ["report", f"{module}:{function}", "--out", str(page), "--json", str(numbers)]
    assert main([*command, "--samples", "10", "--risk", risk]) == 0
    found = json.loads(numbers.read_text())
    names = {"height"} if plural == "targets" else {"red", "green", "blue"}
    assert {each["name"] for each in found[plural]} == names
    assert found["verdict"]["sentence"] in capsys.readouterr().out
    assert text in page.read_text()


def test_a_bad_risk_is_found_before_the_work(module, capsys):
    assert main(["report", f"{module}:named", "--risk", "7"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ella: `risk` must lie between 0 and 1")


def test_a_tuple_is_taken_in_order(module):
    from ella.command import _given

    found = _given(f"{module}:short")
    assert isinstance(found.model, nn.Linear)
    assert [len(part.dataset) for part in (found.train, found.val, found.test)] == [100, 300, 200]
    assert found.ood is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("their_module", "must be MODULE:FUNCTION"),
        ("their_module.py:named", "write their_module:named"),
        ("no_such_module:named", "no module 'no_such_module'"),
        ("their_module:nobody", "'their_module' has no function 'nobody'"),
        ("their_module:nothing", "has no function 'nothing'"),
        ("their_module:number", "must return a mapping or a tuple"),
        ("their_module:lacking", "lacks 'val', 'test'"),
        ("their_module:unknown", "unknown tset; known are model"),
        ("their_module:wrong_labels", "Class labels must lie in 0..2"),
    ],
)
def test_mistakes_are_a_sentence(module, capsys, place, message):
    assert main(["report", place, "--samples", "5"]) == 1
    error = capsys.readouterr().err.split("\r")[-1]  # after what progress bars leave
    assert error.startswith("ella: ")
    assert message in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_errors_inside_the_users_code_are_shown(module):
    with pytest.raises(KeyError, match="no such key"):
        main(["report", f"{module}:broken"])
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        main(["report", "their_broken_module:named"])


def test_a_traceback_can_be_had(module):
    with pytest.raises(ValueError, match="Class labels"):
        main(["report", f"{module}:wrong_labels", "--traceback"])


def test_a_missing_folder_is_found_before_the_work(module, capsys):
    assert main(["report", f"{module}:broken", "--out", "nowhere/page.html"]) == 1
    assert "there is no folder" in capsys.readouterr().err


# --- info ---------------------------------------------------------------------------------------


def test_info_tells_what_a_file_holds(saved, capsys):
    assert main(["info", str(saved)]) == 0
    said = capsys.readouterr().out
    assert '"type": "LastLayer"' in said
    assert '"prior_precision"' in said
    assert "sums.curvature" in said
    assert main(["info", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == 2
    assert found["likelihood"]["type"] == "Categorical"
    assert found["needed to load"] == ["the model it was fitted to"]
    assert found["tensors"]["sums.curvature"] == "float64 [18, 18]"
    assert found["bytes"] >= 18 * 18 * 8


def test_info_names_what_no_file_holds(tmp_path, capsys):
    class Own(Probit):
        pass

    model = nn.Linear(4, 3)
    data = [(torch.randn(30, 4), torch.arange(30) % 3)]
    fitted = ELLA(model, eigenfunctions=LastLayer(), progress=False).fit(data)
    fitted.link = Own()
    fitted.save(tmp_path / "own.safetensors")
    assert main(["info", str(tmp_path / "own.safetensors"), "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["needed to load"]
    assert len(needed) == 2
    assert "Own" in needed[1]


def test_info_refuses_other_files(saved, tmp_path, capsys):
    (tmp_path / "text").write_text("hello")
    save_file({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    data = bytearray(saved.read_bytes())
    data[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    for name, message in (
        ("text", "no safetensors file"),
        ("other.safetensors", "no file that this version of ella can read"),
        ("damaged.safetensors", "is damaged"),
        ("missing.safetensors", "missing.safetensors"),
    ):
        assert main(["info", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert message in error, name
        assert error.count("\n") == 1


def test_names_in_a_file_cannot_drive_a_terminal(tmp_path, capsys):
    digest_free = {"ella": json.dumps({"format": 1, "likelihood": "\x1b[2Jclassification"})}
    save_file({"\x1b[31mred": torch.ones(1)}, tmp_path / "old.safetensors", metadata=digest_free)
    assert main(["info", str(tmp_path / "old.safetensors")]) == 0
    assert "\x1b" not in capsys.readouterr().out


# --- demo ---------------------------------------------------------------------------------------


def test_the_demonstration_runs_and_writes_its_page(tmp_path, capsys):
    pytest.importorskip("mnist1d")
    page, numbers = tmp_path / "demo.html", tmp_path / "demo.json"
    command = ["demo", "--scale", "0.02", "--samples", "5", "--out", str(page)]
    assert main([*command, "--json", str(numbers)]) == 0
    said = capsys.readouterr().out
    assert str(page) in said
    assert "http" not in said
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["method"] for row in rows][-2:] == ["ELLA", "ELLA with distance"]
    assert {"auroc shuffled signals", "auroc white noise", "nll more noise"} <= set(
        rows[0]["metrics"]
    )


def test_signals_depend_on_the_seed_alone():
    pytest.importorskip("mnist1d")
    import numpy as np

    from ella.demo import Signals

    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first, again, other = (Signals.made(30, seed) for seed in (0, 0, 1))
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert first.x.shape == (30, 1, 40)
    noisy = Signals.made(30, 0, iid_noise_scale=1.0)
    assert noisy.x.std() > 2 * first.x.std()


def test_without_the_package_the_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    assert main(["demo", "--out", str(tmp_path / "page.html")]) == 1
    assert 'pip install "ella-laplace[demo]"' in capsys.readouterr().err


# --- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["demo"], ["report"], ["info"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 400


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["nothing"],
        ["report"],
        ["demo", "--risk", "7"],
        ["demo", "--seed", "x"],
        ["demo", "--samples", "1"],
    ],
)
def test_a_bad_command_line_exits_with_2(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "usage: python -m ella" in capsys.readouterr().err


def test_it_runs_as_a_module(saved):
    done = subprocess.run(
        [sys.executable, "-m", "ella", "info", str(saved)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "LastLayer" in done.stdout
