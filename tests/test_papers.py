"""The contract of papers/, and that its verdicts can be lost."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignkit import cli
from alignkit.papers import shell
from alignkit.papers.claims import Claim, Criterion
from alignkit.papers.folders import Mutant, papers, read
from tests.papers import judged

ROOT = Path(__file__).parents[1]
PAPERS = papers()
CHEAP = [p for p in PAPERS if any(tier == "ci" for tier, _ in p.runs.values())]
FILES = sorted((ROOT / "papers").glob("*/*.py"))
CLAIMS = """
paper = "A. Author (2026), A paper"
url = "https://example.org"
[runs]
toss = { tier = "ci", seeds = 5 }
[[claims]]
id = "fair"
text = "a coin is fair"
source = "section 1"
kind = "number"
scale = "exact"
run = "toss"
metric = "heads"
value = 0.5
sigmas = 4
paper = "0.5"
provenance = "derived here"
"""
RUN = """
import torch
def toss(seed):
    x = (torch.rand(400) < 0.5).double()
    return {"heads": x.mean(), "heads_se": x.std() / 20, "curve": [0, 1]}
"""
PLOT = """
def plot(figure, lines):
    figure.subplots().plot(lines[-1]["metrics"]["curve"])
"""


@pytest.fixture
def coin(tmp_path, monkeypatch):
    """A folder with one paper."""
    folder = tmp_path / "papers" / "coin-2026"
    folder.mkdir(parents=True)
    for name, text in {"claims.toml": CLAIMS, "run.py": RUN, "plot.py": PLOT}.items():
        (folder / name).write_text(text)
    for module in ("folders", "shell"):
        monkeypatch.setattr(f"alignkit.papers.{module}.folder", lambda: tmp_path / "papers")
    return folder


def change(file, old, new):
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


class TestTheContract:
    @pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
    def test_of_a_folder(self, paper):
        for name, limit in {"README.md": 40, "run.py": 60, "plot.py": 40}.items():
            lines = (paper.folder / name).read_text().splitlines()
            assert len(lines) <= limit, name
            assert max(map(len, lines)) <= 120, name
        assert "figure.png" in (paper.folder / "README.md").read_text()
        assert len(paper.mutants) >= 2
        assert len({claim.id for claim in paper.claims}) == len(paper.claims)
        assert {claim.run for claim in paper.claims} == set(paper.runs)

    @pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
    def test_a_folder_uses_what_is_public(self, file):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", None) or ""
            assert not any(part.startswith("_") for name in names for part in f"{module}.{name}".split(".")), file
            assert not module.startswith(("alignkit.trl", "tests", "benchmarks"))

    @pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
    def test_results_are_of_runs_that_exist_and_the_gallery_is_true(self, paper):
        lines, published = paper.lines(), shell._published()
        assert {line["run"] for line in lines} <= set(paper.runs)
        assert (paper.folder / "figure.png").is_file()
        for claim, (verdict, _) in paper.verdicts(lines).items():
            assert published[paper.name, claim] == verdict

    @pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
    def test_a_claim_holds_or_says_why_not(self, paper):
        for claim, (verdict, _) in paper.verdicts(paper.lines()).items():
            tier = paper.runs[next(c.run for c in paper.claims if c.id == claim)][0]
            said = verdict == "fails" and f"`{claim}`" in (paper.folder / "README.md").read_text()  # a negative
            assert said or verdict in ("holds", "differs") or (verdict == "not run" and tier == "gpu"), claim


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("paper", CHEAP, ids=lambda p: p.name)
def test_what_is_cheap_still_comes_out(paper):
    runs = {name: seeds for name, (tier, seeds) in paper.runs.items() if tier == "ci"}
    lines = [paper.measure(name, seed) for name, seeds in runs.items() for seed in range(seeds)]
    published = shell._published()
    for claim in paper.claims:
        if claim.run in runs:
            assert claim.judge(lines, runs[claim.run])[0] == published[paper.name, claim.id], claim.id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("paper", "name"), [pytest.param(p, name, id=f"{p.name}-{name}") for p in PAPERS for name in p.mutants]
)
def test_a_mutant_fails_its_claim(paper, name):
    assert judged(paper, name).startswith("fails")


def test_mutants_are_found(tmp_path):
    (paper,) = papers(["kl-schulman"])
    assert judged(paper, "k2-without-half").startswith("fails")
    gone = replace(paper, mutants={"gone": Mutant("run.py", "not there", "", "unbiased")})
    with pytest.raises(ValueError, match="mutant gone: 'not there' is 0 times"):
        judged(gone, "gone")


class TestVerdicts:
    @staticmethod
    def judge(kind, criterion, metrics, differs=None, seeds=None):
        claim = Claim("id", "", "", kind, "exact", "run", criterion, differs, provenance="ours")
        columns = {name: np.broadcast_to(x, max(np.size(y) for y in metrics.values())) for name, x in metrics.items()}
        rows = [dict(zip(columns, values)) for values in zip(*(x.tolist() for x in columns.values()))]
        lines = [{"run": "run", "seed": i, "metrics": row} for i, row in enumerate(rows)]
        return claim.judge(lines, len(lines) if seeds is None else seeds)[0]

    def test_an_identity_must_hold_at_every_seed(self):
        near = Criterion(metric="gap", tolerance=0.1)
        assert self.judge("identity", near, {"gap": [0.1, -0.1]}) == "holds"
        assert self.judge("identity", near, {"gap": [0.0, 0.0, 0.2]}) == "fails"
        assert self.judge("identity", Criterion(metric="gap", at_least=1.0), {"gap": [1.0, 0.9]}) == "fails"

    def test_a_number_in_the_mean_by_its_own_error(self):
        near = Criterion(metric="x", value=1.0, sigmas=4)
        assert self.judge("number", near, {"x": [0.0, 2.05], "x_se": [0.01, 0.01]}) == "holds"
        assert self.judge("number", near, {"x": [0.0, 2.07], "x_se": [0.01, 0.01]}) == "fails"
        assert self.judge("number", near, {"x": [0.9, 1.0, 1.2]}) == "holds"
        assert self.judge("number", near, {"x": [1.09, 1.1, 1.11]}) == "fails"

    def test_an_order_by_paired_seeds(self):
        order = Criterion(order=("a", "b"))
        level = np.array([0.0, 5.0, -3.0, 8.0, 1.0])
        assert self.judge("trend", order, {"a": level + 0.1, "b": level}) == "holds"
        assert self.judge("trend", order, {"a": level, "b": level + 0.1}) == "fails"
        assert self.judge("trend", order, {"a": level, "b": level[::-1]}) == "fails"

    def test_a_trends_interval_lies_within_its_bounds(self):
        x = np.array([0.9, 1.0, 1.1, 1.2, 1.3])
        assert self.judge("trend", Criterion(metric="x", at_least=0.95), {"x": x}) == "holds"
        assert self.judge("trend", Criterion(metric="x", at_least=1.05), {"x": x}) == "fails"
        assert self.judge("trend", Criterion(metric="x", at_most=1.15), {"x": x}) == "fails"

    def test_nothing_that_is_not_finite_or_not_there_holds(self):
        near = Criterion(metric="x", at_least=0.0)
        assert self.judge("identity", near, {"x": [1.0, np.nan]}) == "fails"
        assert self.judge("identity", near, {"y": [1.0, 1.0]}) == "fails"
        assert self.judge("identity", near, {"x": [1.0]}, seeds=2) == "not run"

    def test_a_deviation_that_is_described_differs(self):
        claim = Criterion(metric="x", at_least=0.5)
        assert self.judge("identity", claim, {"x": [0.1]}, differs=Criterion(metric="x", at_most=0.2)) == "differs"
        assert self.judge("identity", claim, {"x": [0.3]}, differs=Criterion(metric="x", at_most=0.2)) == "fails"

    def test_the_newest_result_of_a_seed_counts(self):
        claim = Claim("id", "", "", "identity", "exact", "run", Criterion(metric="x", tolerance=1.0))
        lines = [{"run": "run", "seed": 0, "metrics": {"x": x}} for x in (0.0, 2.0)]
        assert claim.judge(lines, 1)[0] == "fails"
        assert claim.judge(lines[::-1], 1)[0] == "holds"


class TestCommands:
    def test_run_and_check_publish_what_was_measured(self, coin, capsys):
        cli.main(["papers", "run", "coin"])
        assert [json.loads(x)["seed"] for x in (coin / "results.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4]
        assert (coin / "figure.png").is_file()
        cli.main(["papers", "check"])
        text = (coin.parent / "README.md").read_text()
        assert "| `fair` | holds |" in text
        assert "coin-2026/figure.png" in text
        cli.main(["papers", "list"])
        assert "1 claims, 1 hold; runs: toss ci" in capsys.readouterr().out
        before = (coin / "results.jsonl").read_text()
        cli.main(["papers", "check", "coin", "--first-seed", "100"])
        assert (coin / "results.jsonl").read_text() == before

    def test_one_seed_of_one_run(self, coin):
        cli.main(["papers", "run", "coin", "--only", "toss", "--first-seed", "7", "--seeds", "1"])
        (line,) = map(json.loads, (coin / "results.jsonl").read_text().splitlines())
        assert (line["run"], line["seed"], line["command"].split()[-4:]) == (
            "toss", 7, ["--first-seed", "7", "--seeds", "1"],
        )  # fmt: skip
        again = read(coin).measure("toss", 7)
        assert again["metrics"] == line["metrics"]
        assert shell.papers()[0].verdicts([line])["fair"][0] == "not run"

    @pytest.mark.parametrize("old_new", [("< 0.5", "< 0.9"), ("x.mean()", "x.nothing()")])
    def test_a_claim_that_held_and_no_longer_does(self, coin, capsys, old_new):
        cli.main(["papers", "run", "coin"])
        cli.main(["papers", "check"])
        published = (coin.parent / "README.md").read_text()
        change(coin / "run.py", *old_new)
        with pytest.raises(SystemExit) as stop:
            cli.main(["papers", "check"])
        assert stop.value.code == 1
        assert "fair: holds -> fails" in capsys.readouterr().out
        assert (coin.parent / "README.md").read_text() == published
        cli.main(["papers", "run", "coin"]) if "0.9" in old_new[1] else shutil.copy(coin / "run.py", coin / "other")
        cli.main(["papers", "check", "--accept"])

    def test_a_deviation_that_is_none_any_more_is_told(self, coin, capsys):
        change(coin / "claims.toml", "value = 0.5", "value = 0.9\ndiffers = { metric = 'heads', at_most = 0.6 }")
        cli.main(["papers", "run", "coin"])
        cli.main(["papers", "check"])
        assert "| `fair` | differs |" in (coin.parent / "README.md").read_text()
        change(coin / "run.py", "< 0.5", "< 0.9")
        cli.main(["papers", "check"])
        assert "fair: differs -> holds" in capsys.readouterr().out

    def test_a_result_that_is_gone(self, coin, capsys):
        change(coin / "claims.toml", '"ci"', '"slow"')
        cli.main(["papers", "run", "coin", "--tier", "slow"])
        cli.main(["papers", "check"])
        (coin / "results.jsonl").unlink()
        with pytest.raises(SystemExit):
            cli.main(["papers", "check"])
        assert "fair: holds -> not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('tier = "ci"', 'tier = "fast"', "tier 'fast' must be one of ci, cpu, slow, gpu"),
        ("sigmas = 4", "sigma = 4", "claim 'fair': unknown keys sigma"),
        ("sigmas = 4", "", "needs a metric with tolerance"),
        ("sigmas = 4", "sigmas = 4\nat_least = 0", "needs a metric with tolerance"),
        ("value = 0.5\n", "", "a number needs a value"),
        ('provenance = "derived here"', "", "a number needs a value and its provenance"),
        ('kind = "number"', 'kind = "guess"', "kind='guess' must be one of"),
        ('run = "toss"', 'run = "spin"', "run='spin' is not in"),
        ('source = "section 1"\n', "", "source"),
        ("[[claims]]", "[[claims]", "Expected"),
        ('url = "https://example.org"\n', "", "'url' is missing"),
    ],
)
def test_a_broken_claims_file_is_named(coin, old, new, words):
    change(coin / "claims.toml", old, new)
    with pytest.raises(ValueError, match=words) as error:
        read(coin)
    assert "claims.toml" in str(error.value)


def test_few_seeds_make_no_interval(coin):
    change(coin / "claims.toml", 'kind = "number"', 'kind = "trend"')
    change(coin / "claims.toml", "seeds = 5", "seeds = 4")
    with pytest.raises(ValueError, match="a trend needs at least 5 seeds"):
        read(coin)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "run needs a NAME"),
        (["run", "dice"], "there is no paper 'dice', but coin-2026"),
        (["run", "coin", "--only", "spin"], "only='spin' is not a run of coin-2026: toss"),
        (["run", "coin", "--tier", "gpu", "--only", "toss"], ""),
    ],
)
def test_wrong_words(coin, capsys, words, message):
    if not message:
        cli.main(["papers", *words])
        return
    with pytest.raises(SystemExit) as stop:
        cli.main(["papers", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_broken_lines_and_missing_functions(coin):
    (coin / "results.jsonl").write_text('{"run": "toss"}\n{"run"\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2"):
        read(coin).lines()
    change(coin / "run.py", "def toss", "def throw")
    with pytest.raises(ValueError, match="no function 'toss'"):
        read(coin).measure("toss", 0)
