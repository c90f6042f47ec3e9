"""Single changes of the core, each of which some test has to notice.

    python -m tests.mutate            # those that were not tried yet
    python -m tests.mutate --again    # all
    python -m tests.mutate posterior  # those whose file or text holds a word

Each is made in a copy of the package in a temporary folder, and the tests that should notice are
run there, one process a change. What came of it is kept in `mutants.json`, change by change, so
that a run can stop and go on. The working tree is not touched.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "mutants.json"
TIMEOUT = 120
"""Seconds of processor time: what takes longer hangs, which is noticed, too."""


@dataclass(frozen=True)
class Mutant:
    """A change: `old`, which is in the file once, becomes `new`."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self):
        return f"{self.file}: {self.old} -> {self.new}"

    def applied(self, package):
        path = package / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: the old text is there {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))


def mutants():
    """All of them, from the table in `mutants.txt`.

    A line "[file] tests" says what the changes below it are of, and which tests should notice; a
    line "old => new" is a change; "#" begins a comment.
    """
    file, tests, found = "", "", []
    for line in (HERE / "mutants.txt").read_text().splitlines():
        if line.startswith("["):
            file, tests = (part.strip() for part in line[1:].split("]", 1))
        elif line.strip() and not line.startswith("#"):
            old, new = line.split(" => ")
            found.append(Mutant(file, old.strip(), new.strip(), tests))
    return found


def tried(mutant, change=True):
    """Whether it was "killed" or has "survived", by a child that has loaded torch, but no ella.

    Args:
        mutant: See `Mutant`.
        change: False runs the tests on the package as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "ella", Path(folder, "ella"))
        if change:
            mutant.applied(Path(folder, "ella"))
        log = Path(folder, "log")
        child = os.fork()
        if not child:
            code = INTERNAL
            with log.open("w") as file, contextlib.suppress(BaseException):
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                code = run_tests(folder, shlex.split(mutant.tests))
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (FAILED, UNREADABLE, -signal.SIGXCPU):
            return "killed"
        if code != PASSED:
            raise RuntimeError(
                f"{mutant.name}: pytest ended with {code}:\n{log.read_text()[-2000:]}"
            )
        return "survived"


PASSED, FAILED, UNREADABLE, INTERNAL = 0, 1, 2, 3
"""Exit codes of pytest; the third is that of a module that cannot be imported any more."""


def run_tests(folder, arguments):
    """In a child: tests of the working tree, of the package in a folder."""
    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT + 5))
    os.environ["PYTHONPATH"] = folder
    os.chdir(ROOT)
    sys.path = [folder, *(p for p in sys.path if p and Path(p) != ROOT)]
    found = importlib.import_module("ella").__file__
    if Path(found).parent != Path(folder, "ella"):
        raise RuntimeError(f"the tests would see {found}")
    quiet = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", PRELOADED]
    return int(pytest.main([*quiet, *arguments]))


PRELOADED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
WARM = ("torch", "hypothesis", "safetensors.torch", "tqdm.auto", "numpy")
"""Loaded once, for all children."""


def main(words, again=False):
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [m for m in mutants() if all(word in m.name for word in words)]
    for name in WARM:
        importlib.import_module(name)
    sound = set()
    for mutant in chosen:
        if mutant.name in known and not again:
            continue
        if mutant.tests not in sound and tried(mutant, change=False) == "killed":
            raise RuntimeError(f"these tests fail anyway: {mutant.tests}")
        sound.add(mutant.tests)
        start = time.perf_counter()
        known[mutant.name] = tried(mutant)
        print(
            f"{known[mutant.name]:8} {time.perf_counter() - start:5.1f} s  {mutant.name}",
            flush=True,
        )
        ordered = {m.name: known[m.name] for m in mutants() if m.name in known}
        RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    survived = [m.name for m in chosen if known.get(m.name) == "survived"]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} killed")
    return len(survived)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    sys.exit(main(given.words, given.again) > 0)
