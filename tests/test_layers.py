import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alignkit"
FLOOR_1 = [
    "types",
    "masking",
    "sampling",
    "logps",
    "heads",
    "kl",
    "weights",
    "advantages",
    "objectives",
    "multistep",
    "shaping",
    "text_rewards",
    "monitors",
    "controllers",
    "filters",
    "importance",
    "diffusion",
    "func",
    "losses",
]
LIBRARIES = {"transformers", "datasets", "peft", "diffusers", "accelerate", "tokenizers"}
BESIDE = {
    "logps": {"sampling"},
    "heads": {"logps", "sampling"},
    "monitors": {"kl", "weights"},
    "multistep": {"advantages"},
    "shaping": {"advantages"},
}
FLOOR_2 = ["data", "train", "source", "testing", "conventions"]
MAY_IMPORT = {1: {"types", "masking"}, 2: {*FLOOR_1, *FLOOR_2}, 3: {*FLOOR_1, "data", "train", "source", "hf"}}


def floor(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return 1 if part in FLOOR_1 else 2 if part in FLOOR_2 else 3 if part == "hf" else 4


def imports(path):
    """Dotted names that a file imports, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    level = floor(path)
    for name in imports(path):
        top, *rest = name.split(".")
        assert not (level < 3 and top in LIBRARIES), f"{path} imports {name}"
        assert top != "recipes", f"{path} imports a recipe"
        if level == 1:
            assert top in {"torch", "einops", "jaxtyping", "alignkit", *sys.stdlib_module_names}, f"{path}: {name}"
        if top == "alignkit" and level < 4:
            assert rest[0] in MAY_IMPORT[level] | BESIDE.get(path.stem, set()), f"{path} (floor {level}) imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_recipes_are_short_and_flat(path):
    limit = 66 if path.stem == "ppo" else 60  # the one with a critic
    assert len(path.read_text().splitlines()) <= limit
    assert not any(name.startswith(("recipes", "alignkit.trl")) for name in imports(path))
    (main,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    assert len(main.args.args) <= 15


def test_one_trainer_subclass():
    found = [p for p in SOURCES for _ in re.findall(r"^class \w+\((?:\w+\.)?Trainer\)", p.read_text(), re.MULTILINE)]
    assert found == [PACKAGE / "hf" / "trainer.py"]


def test_the_package_re_exports_nothing():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_the_floors_below_hf_never_import_transformers():
    code = (
        "import sys, alignkit.data, alignkit.train, alignkit.logps, alignkit.controllers, alignkit.losses.policy\n"
        f"assert not {LIBRARIES!r} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_cheap():
    code = "import time, torch; t = time.perf_counter(); import alignkit; print(time.perf_counter() - t)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, torch; n = set(sys.modules); import alignkit; print(set(sys.modules) - n)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert modules.strip() == "{'alignkit'}", f"import alignkit pulls in {modules} ({out.strip()} s)"
