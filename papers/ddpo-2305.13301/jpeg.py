"""`builtin:shapes` trained by the recipes ddpo and rwr to make images of smaller or larger JPEGs."""

import runpy
import tempfile
from pathlib import Path

from alignkit import hf
from alignkit.hf import diffusion

FOLDER = Path(__file__).parents[2] / "recipes"
ROUNDS, ROLLOUT, DENOISING = 24, 128, diffusion.Denoising(steps=5, guidance=1.0)
OPTIONS = {"rollout": ROLLOUT, "warmup_steps": 5, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
RECIPES = {  # optimizer steps of a rollout, and options; learning rates from a grid on a seed that is not reported
    "ddpo": (1, {"batch": 5 * ROLLOUT, "micro": ROLLOUT, "lr": 6e-4}),
    "rwr": (4, {"batch": 64, "micro": 64, "epochs": 2, "lr": 1e-3}),
}


def compare(seed):
    """Mean JPEG size in kB before, and after each recipe with each reward."""
    out = {"before": size("builtin:shapes", seed)}
    for reward in ("compressible", "incompressible"):
        for recipe in RECIPES:
            with tempfile.TemporaryDirectory() as folder:
                train(recipe, f"builtin:{reward}", f"{folder}/{recipe}", seed)
                out[f"{recipe}_{reward}"] = size(f"{folder}/{recipe}", seed)
    for recipe in RECIPES:
        out[f"{recipe}_steered"] = out[f"{recipe}_incompressible"] - out[f"{recipe}_compressible"]
    return out


def train(recipe, reward, out, seed):
    """A model into the folder `out`."""
    updates, options = RECIPES[recipe]
    options = OPTIONS | options | {"steps": ROUNDS * updates, "reward": (reward,), "out": out, "seed": seed}
    runpy.run_path(str(FOLDER / f"{recipe}.py"))["main"](denoising=DENOISING, **options)


def size(model, seed):
    """Of 8 images of each prompt, from the same noise for every model."""
    policy, prompts = diffusion.pipeline(model, denoising=DENOISING), hf.prompts("builtin:shapes")
    images = diffusion.denoise(policy, prompts, n=8, rows=64, seed=seed)["images"]
    return diffusion.image_reward("builtin:incompressible")(images, prompts).mean()
