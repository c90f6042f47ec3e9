"""The table of `README.md`: runs all attacks, and reads what became of changes.

python -m tests.summary
"""

import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

START, END = "<!-- table -->", "<!-- end of table -->"


def counted():
    """By family: how often it was right, our error, or bad."""
    import torch
    from attacks import FAMILIES, World, verdict

    torch.set_num_threads(1)  # a pool of threads does not survive the fork that some attacks do
    found, here = {}, Path.cwd()
    warnings.simplefilter("ignore")
    for family, cases in FAMILIES.items():
        verdicts = Counter()
        for attack, outcome in cases.values():
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                try:
                    with warnings.catch_warnings():
                        # As in the tests, what is warned of is an error.
                        warnings.simplefilter("error")
                        warnings.filterwarnings("ignore", "calibrate")
                        verdicts[verdict(attack, outcome, World(Path(folder)))] += 1
                finally:
                    os.chdir(here)
        found[family] = verdicts
    return found


def table(found, mutants):
    lines = ["| family | cases | right | our error | bad |", "| --- | ---: | ---: | ---: | ---: |"]
    for family, verdicts in found.items():
        right, ours = verdicts["right"], verdicts["our error"]
        cases = sum(verdicts.values())
        lines.append(f"| {family} | {cases} | {right} | {ours} | {cases - right - ours} |")
    total = sum(found.values(), Counter())
    cases, right, ours = sum(total.values()), total["right"], total["our error"]
    lines.append(f"| all | {cases} | {right} | {ours} | {cases - right - ours} |")
    outcomes = Counter(mutants.values())
    tried = sum(outcomes.values())
    return "\n".join(lines) + f"\n\nChanges of the core: {outcomes['killed']} of {tried} noticed."


def main():
    mutants = json.loads((HERE / "mutants.json").read_text())
    path = HERE / "README.md"
    text = path.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    path.write_text(f"{before}{START}\n{table(counted(), mutants)}\n{END}{after}")


if __name__ == "__main__":
    main()
