"""The command line, `python -m ella`: a demonstration, a report on a model, a look at a file."""

import argparse
import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

from torch import nn

from ella.batches import Loader, Split
from ella.demo import Demonstration
from ella.distance import Distance
from ella.eigenfunctions import EigenfunctionMethod
from ella.likelihoods import Likelihood, as_likelihood
from ella.outputs import Output
from ella.predictions import NotFittedError
from ella.predictor import ModelChangedError
from ella.report import Bootstrap, Report, evaluate, kind_of, standard_methods
from ella.saving import FORMAT, Json, State, custom_names, read

__all__ = ["main"]

DESCRIPTION = """\
ella gives a trained PyTorch classifier calibrated predictions that know what they do not know.

  python -m ella demo                       what it does, on data made here (two minutes)
  python -m ella report my_module:data      whether it helps your model
  python -m ella info ella.safetensors      what a saved file holds

Each command has its own --help."""

DEMO = """\
Train a small convolutional net on MNIST-1D, which a procedure makes without a download, fit ELLA
to it, and write a page that compares it with temperature scaling on 10,000 other signals, on
signals made with other settings, and on inputs that are no signals at all. Needs
pip install "ella-laplace[demo]"."""

REPORT = """\
Fit the model as it is (MAP), temperature scaling and ELLA, and write a page that says whether ELLA
is worth it on your data: classes, labels that are yes or no, or real numbers. FUNCTION, in a
module that can be imported from here, is called without arguments and returns a mapping:

  def data():
      return {
          "model": model,              # trained, an nn.Module
          "train": train_loader,       # what it was trained on
          "val": val_loader,           # held out, to calibrate
          "test": test_loader,         # held out, to judge
          "ood": {"noise": loader},    # optional: inputs of no class, or from elsewhere
          "shift": {"fog": loader},    # optional: labelled, other conditions
          "classes": ["cat", "dog"],   # optional: names of classes, labels or targets
          "likelihood": "regression",  # optional: or "multilabel", "binary"
      }

or the same as a tuple (model, train, val, test[, ood[, shift]]). It may also name "output",
"split" and "eigenfunctions", which go to the constructors. For real numbers temperature scaling
is the model with its noise variance tuned, and --risk is an RMSE."""

INFO = """\
Tell what a file of `ELLA.save` holds: settings, what was tuned, tensors. It needs no model, and
nothing in the file is executed: a file from a stranger can be looked at.

  python -m ella info ella.safetensors
  python -m ella info ella.safetensors --json | jq .hyperparameters"""

REQUIRED = ("model", "train", "val", "test")
LONGEST = 6
"""Of a tuple that a user's function returns: with "ood" and "shift"."""
MISTAKES = (TypeError, ValueError, ImportError, OSError, NotFittedError, ModelChangedError)
"""What ella raises of what it is given: a sentence says it, without a traceback."""


class Mistake(Exception):
    """The user can put it right; the text says how."""


@dataclass(frozen=True)
class Given:
    """What a user's function returns.

    Attributes:
        model: The trained classifier or regressor.
        train: What it was trained on.
        val: Held out, to calibrate.
        test: Held out, to judge.
        ood: Inputs of no class: a loader, or several by name.
        shift: Labelled data under other conditions: a loader, or several by name.
        classes: Names of the classes, labels or targets.
        eigenfunctions: See `ELLA`.
        likelihood: See `Predictor`.
        output: See `Predictor`.
        split: See `Predictor`.
    """

    model: nn.Module
    train: Loader
    val: Loader
    test: Loader
    ood: Loader | Mapping[str, Loader] | None = None
    shift: Loader | Mapping[str, Loader] | None = None
    classes: Sequence[str] | None = None
    eigenfunctions: EigenfunctionMethod | None = None
    likelihood: str | Likelihood = "classification"
    output: Output = None
    split: Split | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0, or 1 if ella refuses what it was given; `SystemExit` of 2 for a bad command line.
    """
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.command
    try:
        command(args)
    except Mistake as mistake:
        _say(f"ella: {mistake}", sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m ella", description=DESCRIPTION, formatter_class=raw
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    add = partial(commands.add_parser, formatter_class=raw)
    demo = add("demo", help="see what it does", description=DEMO)
    _add_page(demo, "ella-demo.html")
    demo.add_argument(
        "--risk", type=_share, default=0.01, help="error rate for selective prediction (.01)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of data and training (default 0)")
    demo.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    demo.set_defaults(command=_demo)
    report = add("report", help="judge your model", description=REPORT)
    report.add_argument("function", metavar="MODULE:FUNCTION", help="what returns model and data")
    _add_page(report, "ella-report.html")
    report.add_argument(
        "--risk",
        type=_positive,
        help="for selective prediction: error rate (.01), of labels the share that is wrong, of "
        "real numbers an RMSE (none)",
    )
    report.add_argument(
        "--distance", action="store_true", help="also judge ELLA with the distance term"
    )
    report.set_defaults(command=_report)
    info = add("info", help="what a saved file holds", description=INFO)
    info.add_argument("file", type=Path, help="a file of ELLA.save")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)
    for each in (demo, report, info):
        each.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _add_page(parser: argparse.ArgumentParser, name: str) -> None:
    """What both commands that write a page have."""
    parser.add_argument("--out", type=Path, default=Path(name), help=f"the page (default {name})")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument(
        "--samples", type=_count, default=1000, help="bootstrap samples (default 1000)"
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, not {text}")
    return value


def _demo(args: argparse.Namespace) -> None:
    _check_place(args)
    with _one_sentence(args), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing that a user of the demonstration could mend
        _say("1/4  Making 18,000 signals of MNIST-1D and training a net on 4,000 of them ...")
        found = Demonstration.made(args.seed, args.scale)
        _say("2/4  Fitting MAP, temperature scaling, ELLA, and ELLA with a distance term ...")
        methods = standard_methods(
            found.model,
            found.train,
            found.val,
            eigenfunctions=Demonstration.eigenfunctions(args.scale),
            distance=Distance(),
            progress=False,
        )
        _say("3/4  Predicting the test signals, shifted signals, and what are no signals ...")
        report = evaluate(
            methods,
            found.test,
            ood=found.ood,
            shift=found.shift,
            risk=args.risk,
            bootstrap=Bootstrap(args.samples, seed=args.seed),
            progress=False,
        )
        _say("4/4  Writing the page ...")
        _write(report, args, "ELLA on MNIST-1D")


def _report(args: argparse.Namespace) -> None:
    _check_place(args)
    given = _given(args.function)
    with _one_sentence(args):
        kind_of(as_likelihood(given.likelihood)).checked_risk(args.risk)  # before the long part
        methods = standard_methods(
            given.model,
            given.train,
            given.val,
            eigenfunctions=given.eigenfunctions,
            distance=Distance() if args.distance else None,
            likelihood=given.likelihood,
            output=given.output,
            split=given.split,
        )
        report = evaluate(
            methods,
            given.test,
            ood=_named(given.ood, "out of distribution"),
            shift=_named(given.shift, "shifted"),
            risk=args.risk,
            classes=given.classes,
            bootstrap=Bootstrap(args.samples),
        )
        _write(report, args, f"ELLA on {args.function}")


def _info(args: argparse.Namespace) -> None:
    with _one_sentence(args):
        version, state = read(args.file)
    found = described(version, state)
    tensors = {
        name: f"{tensor.dtype}".removeprefix("torch.") + f" {list(tensor.shape)}"
        for name, tensor in sorted(state.tensors.items())
    }
    if args.json:
        _say(json.dumps({**found, "tensors": tensors}, indent=2))
        return
    # As JSON, names in a file cannot drive the terminal.
    for name, value in found.items():
        _say(f"{name:16} {json.dumps(value)}")
    _say(f"tensors{len(tensors):>10}")
    for name, about in tensors.items():
        _say(f"  {json.dumps(name)[1:-1]:40} {about}")


def described(version: int, state: State) -> dict[str, Json]:
    """What a file holds beside tensors, as JSON.

    Args:
        version: Of its format.
        state: What `read` found in it.
    """
    settings = dict(state.settings)
    sizes = [tensor.numel() * tensor.element_size() for tensor in state.tensors.values()]
    custom = [
        name
        for key in ("likelihood", "eigenfunctions", "link", "output", "distance_term")
        for name in custom_names(settings.get(key), key)
    ]
    found: dict[str, Json] = {
        "format": version,
        "current format": version == FORMAT,
        "bytes": sum(sizes),
    }
    shown = ("fingerprint", "likelihood", "eigenfunctions", "distance_term", "options", "output")
    found |= {name: settings[name] for name in shown if name in settings}
    found |= {n: settings[n] for n in ("hyperparameters", "tuning", "link") if n in settings}
    found["needed to load"] = ["the model it was fitted to", *custom]
    return found


def _given(place: str) -> Given:
    """What the user's function returns; errors inside it are shown as they are."""
    module_name, _, name = place.partition(":")
    if not module_name or not name:
        _wrong(f"{place!r} must be MODULE:FUNCTION, such as train:data for data() in train.py.")
    if module_name.endswith(".py"):
        _wrong(f"{place!r} names a file; write {Path(module_name).stem}:{name}, beside it.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself needs
        _wrong(f"there is no module {module_name!r} to import from {Path.cwd()}.")
    function = getattr(module, name, None)
    if not callable(function):
        _wrong(f"{module_name!r} has no function {name!r}.")
    return _by_name(function(), place)


def _by_name(found: object, place: str) -> Given:
    """A mapping or tuple that a function returned, checked."""
    if isinstance(found, tuple) and len(REQUIRED) <= len(found) <= LONGEST:
        return Given(*found)
    if not isinstance(found, Mapping):
        _wrong(
            f"{place} must return a mapping or a tuple (model, train, val, test[, ood[, shift]]); "
            f"got {type(found).__name__}."
        )
    names = [each.name for each in fields(Given)]
    missing = [name for name in REQUIRED if name not in found]
    unknown = [str(name) for name in found if name not in names]
    if missing:
        _wrong(f"what {place} returns lacks {', '.join(map(repr, missing))}.")
    if unknown:
        known = ", ".join(names)
        _wrong(f"what {place} returns has the unknown {', '.join(unknown)}; known are {known}.")
    return Given(**found)


def _named(
    loaders: Loader | Mapping[str, Loader] | None, name: str
) -> Mapping[str, Loader] | None:
    """Loaders by name, from such or from one."""
    return loaders if loaders is None or isinstance(loaders, Mapping) else {name: loaders}


def _check_place(args: argparse.Namespace) -> None:
    """Fail before the long part, not after it."""
    for path in (args.out, args.json):
        if path is not None and not path.absolute().parent.is_dir():
            _wrong(f"there is no folder {str(path.absolute().parent)!r} to write to.")


def _write(report: Report, args: argparse.Namespace, title: str) -> None:
    page = report.to_html(args.out, title)
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n", encoding="utf-8")
    _say(f"\n{report.verdict.sentence}\n{report.verdict.beside}\n\nThe page is {page.absolute()}")


@contextmanager
def _one_sentence(args: argparse.Namespace) -> Iterator[None]:
    """What ella refuses becomes a sentence, unless a traceback is asked for."""
    try:
        yield
    except MISTAKES as error:
        if args.traceback:
            raise
        raise Mistake(str(error)) from error


def _wrong(text: str) -> NoReturn:
    raise Mistake(text)


def _say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)
