import pytest

from alignkit.difference import report
from tests.test_layers import ROOT

A = '''"""A: one."""

from m import b, a


def main(x: int = 1, out: str = "runs/a"):
    y = a(x)

    def loss_fn(z):
        return z + y

    return loss_fn
'''


@pytest.fixture
def pair(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(A)
    return a, b


def test_only_the_lines_that_differ_below_what_they_are_in(pair):
    a, b = pair
    b.write_text(
        A.replace("A: one", "B: two")
        .replace("import b, a", "import a, c")
        .replace("z + y", "z - y")
        .replace("/a", "/b")
    )
    assert report(a, b, color=False).splitlines() == [
        "- a",
        "+ b",
        "",
        "docstring",
        '- """A: one."""',
        '+ """B: two."""',
        "",
        "loss_fn",
        "- return z + y",
        "+ return z - y",
        "",
        "imports",
        "- from m import b",
        "+ from m import c",
    ]


def test_recipes_that_do_not_differ(pair):
    a, b = pair
    b.write_text(A.replace("import b, a", "import a, b").replace("\n\n", "\n\n\n").replace("runs/a", "runs/b"))
    assert report(a, b, color=False) == f"{a} and {b} do not differ\n"


def test_colours_only_if_asked(pair):
    a, b = pair
    b.write_text(A.replace("z + y", "z - y"))
    assert "\x1b[31m- return z + y\x1b[0m" in report(a, b, color=True)
    assert "\x1b" not in report(a, b, color=False)


@pytest.mark.parametrize(("text", "message"), [(None, "is not a file that exists"), ("def (", "is not Python.*line 1")])
def test_what_is_no_recipe(pair, text, message):
    a, b = pair
    if text:
        b.write_text(text)
    with pytest.raises(ValueError, match=message):
        report(a, b, color=False)


def test_the_family_differs_from_grpo_in_few_lines():
    """Fewer than a third of the lines of the recipe, so that the rest is the same in both."""
    grpo = ROOT / "recipes" / "grpo.py"
    for name in ("cispo", "dapo", "dr_grpo", "gspo", "on_policy_distillation", "raft", "reinforce_pp", "remax", "rloo"):
        lines = report(grpo, ROOT / "recipes" / f"{name}.py", color=False).splitlines()
        removed = [line for line in lines[2:] if line.startswith("- ")]
        assert 2 < len(removed) <= 20, name
