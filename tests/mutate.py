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
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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


def tried(mutant):
    """ "killed" or "survived": by a child that has loaded torch already, but no ella."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "ella", Path(folder, "ella"))
        mutant.applied(Path(folder, "ella"))
        child = os.fork()
        if not child:
            os._exit(run_tests(folder, shlex.split(mutant.tests)))
        return "survived" if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 else "killed"


def run_tests(folder, arguments):
    import resource

    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT))
    os.environ["PYTHONPATH"] = folder
    sys.path.insert(0, folder)
    os.chdir(ROOT)
    sys.path = [p for p in sys.path if p not in ("", str(ROOT))]
    import ella

    assert Path(ella.__file__).parent == Path(folder, "ella"), ella.__file__
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))


def main(words, again=False):
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [m for m in mutants() if all(word in m.name for word in words)]
    import hypothesis  # noqa: F401 - loaded once, for all children
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import tqdm.auto  # noqa: F401

    for mutant in chosen:
        if mutant.name in known and not again:
            continue
        start = time.perf_counter()
        known[mutant.name] = tried(mutant)
        print(f"{known[mutant.name]:8} {time.perf_counter() - start:5.1f} s  {mutant.name}")
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
