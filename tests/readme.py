"""The parts of README.md made from the code: `python -m tests.readme` writes them, tests/test_docs.py checks them."""

import importlib
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FLOOR = (
    "masking",
    "logps",
    "kl",
    "weights",
    "advantages",
    "shaping",
    "controllers",
    "losses.supervised",
    "losses.preference",
    "losses.reward",
    "losses.policy",
    "losses.value",
    "data",
    "train",
)


def public(module):
    """The functions and classes that a module defines, in the order of its source."""
    here = [
        (name, x)
        for name, x in vars(module).items()
        if not name.startswith("_") and callable(x) and getattr(x, "__module__", None) == module.__name__
    ]
    return sorted(here, key=lambda item: inspect.getsourcelines(inspect.unwrap(item[1]))[1])


def first_sentence(x):
    text = " ".join(inspect.getdoc(x).split("\n\n")[0].split())
    return re.split(r"(?<!e\.g)(?<!Dr)(?<! al)\. (?=[A-Z`(])", text)[0].rstrip(".")


def index():
    lines = []
    for name in FLOOR:
        module = importlib.import_module(f"alignkit.{name}")
        lines += [f"**`alignkit.{name}`** {first_sentence(module)}", ""]
        lines += [f"- `{function}`: {first_sentence(x)}" for function, x in public(module)]
        lines += [""]
    return "\n".join(lines).strip()


def recipe():
    return f"```python\n{(ROOT / 'recipes' / 'dpo.py').read_text().strip()}\n```"


PARTS = {"index": index, "recipe": recipe}


def filled(text):
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
