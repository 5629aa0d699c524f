"""Dry runs of recipes: the columns, their shapes, and who is differentiated.

They run in a process of their own, as tracing every call under the type checker takes minutes.
"""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from alignkit import cli
from alignkit.explain import explain
from tests.test_layers import ROOT

CODE = """
import json, sys
from pathlib import Path
from alignkit.explain import explain
runs = json.loads(sys.argv[1])
made = {name: explain(Path(file), svg=Path(name + ".svg"), options=options) for name, (file, options) in runs.items()}
print(json.dumps(made))
"""
FEW = {"sft", "dpo", "ppo", "grpo"}


def explained(folder, runs):
    runs = {name: (str(ROOT / "recipes" / f"{recipe}.py"), options) for name, (recipe, options) in runs.items()}
    command = [sys.executable, "-c", CODE, json.dumps(runs)]
    out = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert {path.name for path in folder.iterdir()} == {f"{name}.svg" for name in runs}  # no run is left behind
    return json.loads(out)


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    texts = explained(folder, {name: (name, {}) for name in FEW} | {"ipo": ("dpo", {"loss": "ipo", "beta": 0.3})})
    return {name: (text, folder / f"{name}.svg") for name, text in texts.items()}


def columns(text):
    """{what a line makes: (differentiated, shape)} of the parts STREAM and LOSS."""
    found = re.findall(r"^(.*?)→ (\w+) +\w+ +\[(.*?)\]$", text, re.MULTILINE)
    return {name: ("∂" in head, shape) for head, name, shape in found}


def check(text, svg):
    stream, loss = text.split("\nLOSS")
    assert "∂" not in stream
    assert "WEIGHTS" in stream
    assert re.search(r"∂ (policy|actor|model|scorer)\(ids, mask\)", loss)
    assert re.search(r"∂ .*→ loss +float32 +\[\]", loss)
    ElementTree.parse(svg)


@pytest.mark.parametrize("recipe", sorted(FEW))
def test_from_source_to_loss(flows, recipe):
    check(*flows[recipe])


@pytest.mark.slow
def test_every_other_recipe(tmp_path):
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")} - FEW - {"best_of_n"}  # which has no loss
    for name, text in explained(tmp_path, {name: (name, {}) for name in names}).items():
        check(text, tmp_path / f"{name}.svg")


def test_dpo(flows):
    text, _ = flows["dpo"]
    made = columns(text)
    assert made["ref_logps"] == (False, "8, 2")
    assert made["logps"][0]
    assert re.fullmatch(r"8, 2, \d+", made["logps"][1])
    assert made["margin"] == (True, "8")
    assert "dpo(margin; beta=0.1 smoothing=0)" in text
    assert "ipo(margin; beta=0.3)" in flows["ipo"][0]


def test_grpo(flows):
    text, _ = flows["grpo"]
    made = columns(text)
    assert made["advantages"] == (False, "8, 1")
    assert not any(made[name][0] for name in ("old_logps", "ref_logps", "rewards", "sampler_logps", "weights"))
    assert made["logps"][0]
    for call in ("group_normalize(rewards", "clipped_surrogate(logps, old_logps, advantages", "k3(logps, ref_logps)"):
        assert call in text


def test_what_cannot_be_explained(capsys, tmp_path):
    for argv, message in ((["nothing"], "recipe 'nothing' is neither"), (["dpo", "--bta", "1"], "did you mean --beta")):
        with pytest.raises(SystemExit):
            cli.main(["explain", *argv])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a file that exists"):
        explain(tmp_path / "no.py", options={})
    (tmp_path / "no.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no function main"):
        explain(tmp_path / "no.py", options={})
