import re

from tests.readme import FLOOR, README, ROOT, filled


def test_readme_is_up_to_date():
    text = README.read_text()
    assert filled(text) == text, "run `make docs`"


def test_index_names_every_module_of_the_floor():
    here = {p.relative_to(ROOT / "alignkit").with_suffix("").as_posix().replace("/", ".") for p in _floor_files()}
    assert here == set(FLOOR) | {"types"}


def test_the_five_swaps_are_calls_that_exist():
    from alignkit import advantages, controllers, weights
    from alignkit.losses import preference

    swaps = README.read_text().split("## Five swaps")[1].split("```")[1]
    names = set(re.findall(r"[a-z_]{3,}(?=\(|   )|(?<=aggregate=)[a-z_]+", swaps)) - {"partial"}
    for name in names:
        assert any(hasattr(m, name) for m in (advantages, controllers, weights, preference)), name


def _floor_files():
    folder = ROOT / "alignkit"
    return [p for p in [*folder.glob("*.py"), *folder.glob("losses/*.py")] if p.stem not in ("__init__", "cli", "demo")]
