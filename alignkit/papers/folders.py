"""A paper's folder: its claims, runs, mutants and results."""

import json
import math
import runpy
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from alignkit.papers.claims import LEAST_SEEDS, Claim, Criterion, Line

TIERS = ("ci", "cpu", "slow", "gpu")
"""At most 10 s a run, 5 minutes, hours, and with a GPU."""


@dataclass(frozen=True)
class Mutant:
    """A change of one place in a file (of the repository, or the folder's own `run.py`) that must fail `claim`."""

    file: str
    old: str
    new: str
    claim: str


@dataclass(frozen=True)
class Paper:
    """A folder. `runs`: name -> (tier, number of seeds)."""

    folder: Path
    title: str
    url: str
    runs: dict[str, tuple[str, int]]
    claims: tuple[Claim, ...]
    mutants: dict[str, Mutant]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    def lines(self) -> list[Line]:
        """What `results.jsonl` holds; ValueError at a broken line."""
        file, out = self.folder / "results.jsonl", []
        for i, text in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
            try:
                out.append(json.loads(text))
            except ValueError as error:
                raise ValueError(f"{file}, line {i}: {error}") from None
        return out

    def measure(self, run: str, seed: int) -> Line:
        """One line of results: the function `run` of run.py at one seed."""
        functions = runpy.run_path(str(self.folder / "run.py"))
        if not callable(functions.get(run)):
            raise ValueError(f"{self.folder / 'run.py'} has no function {run!r}, which claims.toml lists")
        start = time.perf_counter()
        with _own_randomness(seed):
            metrics = {name: _plain(x) for name, x in functions[run](seed).items()}
        return {
            "run": run, "seed": seed, "metrics": metrics, "seconds": round(time.perf_counter() - start, 2),
            "versions": {"alignkit": version("alignkit"), "torch": torch.__version__, "python": python_version()},
            "device": torch.cuda.get_device_name() if self.runs[run][0] == "gpu" else "cpu",
            "command": f"alignkit papers run {self.name} --only {run} --first-seed {seed} --seeds 1",
        }  # fmt: skip

    def verdicts(self, lines: Sequence[Line]) -> dict[str, tuple[str, str]]:
        """(verdict, what was measured) of each claim."""
        return {claim.id: claim.judge(lines, self.runs[claim.run][1]) for claim in self.claims}


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)


def _plain(x: Any) -> Any:
    """A number or (nested) list for JSON, to 8 digits; what is not finite is null."""
    x = x.tolist() if hasattr(x, "tolist") else x
    if isinstance(x, list | tuple):
        return [_plain(y) for y in x]
    return float(f"{float(x):.8g}") if math.isfinite(x) else None


def folder() -> Path:
    """`papers/` of the checkout or the current folder; ValueError if there is none, as in an installed wheel."""
    for place in (Path(__file__).parents[2], Path.cwd()):
        if list((place / "papers").glob("*/claims.toml")):
            return place / "papers"
    raise ValueError("there is no folder papers/ here: it is in the repository, not in the installed package")


def read(path: Path) -> Paper:
    """A paper's folder; ValueError that names the file and the entry for what claims.toml must not hold."""
    file = path / "claims.toml"
    try:
        table = tomllib.loads(file.read_text())
        runs = {name: (run["tier"], run["seeds"]) for name, run in table["runs"].items()}
        unknown = [tier for tier, _ in runs.values() if tier not in TIERS]
        if unknown:
            raise ValueError(f"tier {unknown[0]!r} must be one of {', '.join(TIERS)}")
        claims = tuple(_claim(entry, runs) for entry in table["claims"])
        mutants = {name: Mutant(**entry) for name, entry in table.get("mutants", {}).items()}
        strays = [m.claim for m in mutants.values() if m.claim not in {c.id for c in claims}]
        if strays:
            raise ValueError(f"a mutant must fail the claim {strays[0]!r}, which is not there")
        return Paper(path, table["paper"], table["url"], runs, claims, mutants)
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: {what}") from None


def _claim(entry: dict[str, Any], runs: dict[str, tuple[str, int]]) -> Claim:
    names, own = {f.name for f in fields(Criterion)}, {f.name for f in fields(Claim)}
    try:
        unknown = sorted(set(entry) - names - own)
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        if entry["run"] not in runs:
            raise ValueError(f"run={entry['run']!r} is not in [runs]")
        given = {k: x for k, x in entry.items() if k in own}
        given["criterion"] = _criterion({k: x for k, x in entry.items() if k in names})
        given["differs"] = _criterion(entry["differs"]) if "differs" in entry else None
        claim = Claim(**given)
        if claim.kind == "trend" and runs[claim.run][1] < LEAST_SEEDS:
            raise ValueError(f"a trend needs at least {LEAST_SEEDS} seeds")
        return claim
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"claim {entry.get('id', '?')!r}: {what}") from None


def _criterion(entry: dict[str, Any]) -> Criterion:
    return Criterion(**entry | {"order": tuple(entry.get("order", ()))})


def papers(names: Iterable[str] = ()) -> list[Paper]:
    """Those of these names, or beginnings of names; all if none is given."""
    known, wanted = [file.parent for file in sorted(folder().glob("*/claims.toml"))], list(names)
    strangers = [name for name in wanted if not any(path.name.startswith(name) for path in known)]
    if strangers:
        raise ValueError(f"there is no paper {strangers[0]!r}, but {', '.join(path.name for path in known)}")
    return [read(path) for path in known if not wanted or any(path.name.startswith(name) for name in wanted)]
