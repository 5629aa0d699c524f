"""Pairs of images in every form, and Diffusion-DPO on tiny pipelines: what it trains, saves and resumes."""

import io
import json
import math
import runpy
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from alignkit import hf
from alignkit.hf import diffusion
from alignkit.hf.diffusion.rewards import colour
from alignkit.hf.shapes import PROMPTS, shapes
from alignkit.train import infer
from tests.hf.diffusion.test_ddpo import weights
from tests.hf.diffusion.test_denoiser import opened, spec
from tests.test_layers import ROOT

SIDES = ("chosen", "rejected")
SHORT = {"batch": 4, "micro": 2, "steps": 4, "lr": 1e-3, "logging_steps": 1, "save_steps": 2}


def painted(level, size=(16, 16)):
    """A noisy image of this brightness."""
    pixels = np.random.default_rng(level).integers(0, 60, (size[1], size[0], 3)) + level
    return Image.fromarray(pixels.astype(np.uint8))


def in_bytes(image, form="PNG"):
    image.save(file := io.BytesIO(), form)
    return file.getvalue()


@pytest.fixture
def dataset(tmp_path):
    """Six pairs: bright images are chosen."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(6):
        rows.append({"prompt": ["a red circle", "a blue square"][i % 2], "other": i})
        for side, level in zip(SIDES, (180 + i, 10 + i)):
            painted(level).save(tmp_path / "images" / f"{i}-{side}.png")
            rows[-1][side] = f"images/{i}-{side}.png"
    return written(tmp_path / "pairs.jsonl", rows)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder, dataset, out, **options):
    main = runpy.run_path(str(ROOT / "recipes" / "diffusion_dpo.py"))["main"]
    main(model=str(folder), dataset=str(dataset), out=str(out), **{"denoising": spec(), **SHORT, **options})
    return [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]


def test_images_come_in_many_forms(folders, dataset, tmp_path, capsys):
    policy = opened(folders)
    pairs = diffusion.image_pairs(dataset, policy)
    assert "pairs.jsonl: 6 pairs; columns not used: other\n" in capsys.readouterr().out
    row = pairs[3]
    assert len(pairs) == 6
    assert set(row) == {"original", "cond_prompt"}
    torch.testing.assert_close(row["cond_prompt"], policy.encode(["a blue square"])["cond_prompt"][0])
    pixels = torch.stack([torch.from_numpy(np.array(painted(level))) for level in (183, 13)])
    expected = policy.family.latents(pixels.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(row["original"], expected)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    images = [[painted(level + i) for i in range(6)] for level in (180, 10)]
    rows = [{"prompt": ["a red circle", "a blue square"][i % 2]} for i in range(6)]
    table = {side: [in_bytes(x) for x in column] for side, column in zip(SIDES, images)} | {
        "prompt": [row["prompt"] for row in rows]
    }
    Dataset.from_dict(table).to_parquet(tmp_path / "bytes.parquet")
    kinds = Features({"prompt": Value("string"), **{side: ImageFeature() for side in SIDES}})
    Dataset.from_dict(table | dict(zip(SIDES, images)), features=kinds).to_parquet(tmp_path / "images.parquet")
    given = [row | dict(zip(SIDES, both)) for row, both in zip(rows, zip(*images))]
    absolute = [json.loads(line) for line in dataset.read_text().splitlines()]
    absolute = [row | {side: str(tmp_path / row[side]) for side in SIDES} for row in absolute]
    for other in (tmp_path / "bytes.parquet", str(tmp_path / "images.parquet"), given, absolute):
        for i in (0, 3):
            again = diffusion.image_pairs(other, policy)[i]
            assert torch.equal(again["original"], pairs[i]["original"])
            assert torch.equal(again["cond_prompt"], pairs[i]["cond_prompt"])


def test_the_middle_of_an_image_upright(folders):
    """Of 32 x 64 pixels, three stripes: the middle one, turned as its EXIF data say, without its alpha channel."""
    policy = opened(folders, "pixels", resolution=8)
    stripes = Image.new("RGBA", (32, 64), (255, 0, 0, 255))
    stripes.paste((0, 255, 0, 255), (0, 16, 32, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    halves = Image.new("RGB", (32, 32), (0, 0, 255))
    halves.paste((255, 255, 255), (0, 0, 32, 16))
    halves.save(turned := io.BytesIO(), "PNG", exif=exif)
    rows = [{"prompt": "a", "chosen": in_bytes(stripes), "rejected": turned.getvalue()}]
    chosen, rejected = policy.decode(diffusion.image_pairs(rows, policy)[0]["original"])
    assert chosen.shape == (3, 8, 8)
    green, inside = torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 6, 8), chosen[:, 1:-1]
    torch.testing.assert_close(inside, green, atol=0.1, rtol=0)
    torch.testing.assert_close(rejected[:, :, -2:], torch.ones(3, 8, 2), atol=0.1, rtol=0)
    assert (rejected[0, :, :2] < 0.1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "images/9.png"}, r"pairs.jsonl, row 2: chosen: there is no file .*images/9.png"),
        ({"rejected": None}, r"pairs.jsonl, row 2: rejected=None must be an image, its bytes or its path"),
        ({"rejected": "pairs.jsonl"}, r"pairs.jsonl, row 2: rejected is an image that cannot be read: cannot identify"),
        ({"chosen": "half.png"}, r"pairs.jsonl, row 2: chosen is an image that cannot be read"),
        ({"prompt": None}, r"pairs.jsonl, row 2: prompt=None must be a string"),
    ],
)
def test_errors_name_the_row(folders, dataset, tmp_path, change, message):
    whole = (tmp_path / "images" / "0-chosen.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    written(dataset, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(ValueError, match=message):
        diffusion.image_pairs(dataset, opened(folders))[1]


def test_missing_columns_are_named(folders, tmp_path):
    path = written(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "a.png", "label": 1}])
    with pytest.raises(ValueError, match=r"pairs.jsonl: no column rejected, only prompt, chosen, label"):
        diffusion.image_pairs(path, opened(folders))


def test_built_in_pairs():
    """The colour of the prompt on a calm ground is chosen, another on stripes rejected; the scene is the same."""
    table = hf.load("builtin:shape-pairs")
    assert len(table) == 1024
    some = table[:64]
    assert set(some["prompt"]) <= set(PROMPTS)
    chosen, rejected = (
        torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255 for x in some[side]]) for side in SIDES
    )
    assert (colour(chosen, some["prompt"]) > colour(rejected, some["prompt"])).float().mean() > 0.95
    rim = [torch.cat([x[..., 0, :], x[..., -1, :]], -1).std(-1).mean() for x in (chosen, rejected)]
    assert rim[0] < 0.5 * rim[1]
    plain, prompts = shapes(64, seed=1)
    turned, same = shapes(64, seed=1, turn=6)
    assert prompts == same
    assert torch.equal(plain, turned)
    with pytest.raises(ValueError, match="split='x' of builtin:shape-pairs must be one of"):
        hf.load("builtin:shape-pairs", split="x")


def test_a_batch(folders, dataset, tmp_path, monkeypatch):
    """New noise in each, the same for both images, and the reference's errors at it."""
    found = {}
    monkeypatch.setattr(hf, "fit", lambda loss_fn, policy, batches, **_: found.update(policy=policy, batches=batches))
    main = runpy.run_path(str(ROOT / "recipes" / "diffusion_dpo.py"))["main"]
    main(model=str(folders["sd"]), dataset=str(dataset), out=str(tmp_path / "out"), denoising=spec(), **SHORT)
    stream, policy = found["batches"](0), found["policy"]
    first, second = next(stream), next(stream)
    assert first["original"].shape == (4, 2, 4, 8, 8)
    assert first["noise"].shape == (4, 1, 4, 8, 8)
    assert not (first["noise"] == second["noise"]).flatten(1).all(1).any()
    torch.testing.assert_close(second, next(found["batches"](1)), atol=0, rtol=0)
    names = ("original", "noise", "timesteps", "cond_prompt")
    errors = infer(policy, **{name: first[name] for name in names})
    torch.testing.assert_close(first["ref_errors"], errors)


@pytest.mark.parametrize(("kind", "lora"), [("sd", 0), ("sd", 2), ("sd3", 2), ("flux", 0)])
def test_the_recipe(folders, dataset, tmp_path, kind, lora):
    out = tmp_path / "out"
    logs = run(folders[kind], dataset, out, lora=lora, steps=2, save_steps=2)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(logs[0]["margin"]) < 1e-7 < abs(logs[1]["margin"])
    assert logs[0]["grad_norm"] > 0
    found = weights(out / "checkpoint-2")
    assert all("lora_" in name for name in found) if lora else not any("lora_" in name for name in found)
    prompts = ["a red circle"]
    after = diffusion.denoise(opened({kind: out}, kind), prompts)["images"]
    assert not torch.allclose(after, diffusion.denoise(opened(folders, kind), prompts)["images"], atol=1e-6)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_resumed_run_is_the_whole_run(folders, dataset, tmp_path, lora):
    out = tmp_path / "out"
    run(folders["sd"], dataset, out, lora=lora, save_steps=1)
    whole, before = weights(out / "checkpoint-4"), weights(out / "checkpoint-3")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    for step in (3, 4):
        shutil.rmtree(out / f"checkpoint-{step}")
    run(folders["sd"], dataset, out, lora=lora, save_steps=1, resume_from_checkpoint="last")
    again = weights(out / "checkpoint-4")
    assert any(not torch.equal(before[name], x) for name, x in whole.items())
    for name, x in whole.items():
        assert torch.equal(x, again[name]), name
    for line, other in zip(lines[:4], (out / "metrics.jsonl").read_text().splitlines()):
        assert json.loads(line)["loss"] == json.loads(other)["loss"]


def test_micro_batches_change_nothing(folders, dataset, tmp_path):
    found = []
    for micro in (1, 4):
        run(folders["sd"], dataset, tmp_path / str(micro), micro=micro, steps=2, optim="sgd", lr=1e-3, beta=10.0)
        found.append(weights(tmp_path / str(micro) / "checkpoint-2"))
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], atol=1e-6, rtol=0)


def test_the_chosen_images_win(folders, dataset, tmp_path):
    options = {"steps": 16, "lr": 1e-2, "batch": 6, "micro": 6, "save_steps": 100, "beta": 1000.0}
    logs = run(folders["pixels"], dataset, tmp_path / "out", denoising=spec(resolution=0), **options)
    assert sum(log["accuracy"] for log in logs[-5:]) > 4
    assert logs[-1]["loss"] < logs[0]["loss"]
