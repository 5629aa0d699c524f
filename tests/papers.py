"""Do the papers' checks notice? `python -m tests.papers [NAME ...]` applies each mutant of claims.toml to a copy.

Prints the verdict of the claim that the mutant must fail; exits with 1 if one still holds.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from alignkit.papers.folders import Paper, papers

ROOT = Path(__file__).parents[1]
JUDGE = """
import sys
from alignkit.papers.folders import papers
(paper,) = papers([sys.argv[1]])
(claim,) = (claim for claim in paper.claims if claim.id == sys.argv[2])
seeds = paper.runs[claim.run][1]
print(*claim.judge([paper.measure(claim.run, seed) for seed in range(seeds)], seeds))
"""


def judged(paper: Paper, name: str) -> str:
    """The verdict, and what was measured, under a mutant; or the last line of the error."""
    mutant = paper.mutants[name]
    with tempfile.TemporaryDirectory(prefix="alignkit-papers-") as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "alignkit", copy / "alignkit", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "recipes", copy / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(paper.folder, copy / "papers" / paper.name)
        file = copy / (mutant.file if "/" in mutant.file else f"papers/{paper.name}/{mutant.file}")
        text = file.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(f"{paper.name}, mutant {name}: {mutant.old!r} is {text.count(mutant.old)} times in {file}")
        file.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-c", JUDGE, paper.name, mutant.claim]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        out = run.stdout if run.returncode == 0 else f"error: {run.stderr}"
        return out.strip().splitlines()[-1]


if __name__ == "__main__":
    kept = []
    for paper in papers(sys.argv[1:]):
        for name in paper.mutants:
            verdict = judged(paper, name)
            kept += [name] * (not verdict.startswith("fails"))
            print(f"{paper.name:32} {name:32} {verdict}", flush=True)
    sys.exit(bool(kept))
