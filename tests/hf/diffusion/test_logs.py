"""Pictures of images while a policy learns: in the folder, in trackers, and in no checkpoint; progress of sampling."""

import io
import json
import logging
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from alignkit import hf
from alignkit.hf import diffusion
from alignkit.hf.diffusion import picture
from alignkit.hf.images import Images
from alignkit.train import rollouts
from alignkit.weights import token_mean, weigh
from tests.hf.diffusion.test_ddpo import PROMPTS, run
from tests.hf.diffusion.test_denoiser import opened, spec

RED, BLUE = torch.tensor([1.0, 0, 0])[:, None, None], torch.tensor([0, 0, 1.0])[:, None, None]


def steps(out):
    return [int(path.stem.removeprefix("step-")) for path in sorted((out / "images").glob("*"))]


class TestPicture:
    def test_evenly_spaced_images_in_their_order(self):
        images = (torch.arange(60) / 100)[:, None, None, None].expand(60, 3, 8, 8)
        seen = np.asarray(picture(images))
        side = seen.shape[1] // 4
        middles = seen[side // 2 :: side, side // 2 :: side, 0].flatten()
        assert middles[:15].tolist() == [round(255 * i / 100) for i in range(0, 60, 4)]
        assert middles[15] == 255  # no image

    @pytest.mark.parametrize(
        ("shape", "size"), [((8, 8), (128, 128)), ((100, 150), (150, 100)), ((512, 1024), (256, 128))]
    )
    def test_small_images_grow_and_large_ones_shrink(self, shape, size):
        image = torch.stack([torch.linspace(0, 1, shape[1]).expand(shape)] * 3)[None]
        drawn = picture(image)
        assert drawn.size == (size[0] + 4, size[1] + 4)
        row = np.asarray(drawn)[size[1] // 2, 2 : 2 + size[0], 0].astype(int)
        assert (np.diff(row) >= 0).all()
        assert row[0] <= 5
        assert row[-1] >= 250

    def test_texts_stand_below(self):
        images = RED.expand(2, 3, 8, 8)
        bare, texts, numbers = (picture(images, *x) for x in ((), (["a", "b"],), (["a", "b"], torch.tensor([1.0, 2]))))
        assert bare.height < texts.height < numbers.height
        below = np.asarray(numbers)[bare.height :]
        halves = below[:, : below.shape[1] // 2], below[:, below.shape[1] // 2 :]
        assert all((half < 128).any() for half in halves)
        assert not np.array_equal(*halves)
        other = np.asarray(picture(images, ["a", "b"], torch.tensor([1.0, 3])))[bare.height :]
        assert np.array_equal(other[:, : below.shape[1] // 2], halves[0])
        assert not np.array_equal(other, below)

    def test_a_long_text_stays_in_its_place(self):
        long = picture(RED.expand(1, 3, 8, 8), ["astronaut\n" * 30 + "漢" * 90])
        assert long.size == picture(RED.expand(1, 3, 8, 8), ["short"]).size
        one, two = (picture(RED.expand(1, 3, 8, 8), ["astronaut " * 30], [x]) for x in (1.0, 2.0))
        assert not np.array_equal(one, two)  # the number is still to be seen

    def test_values_out_of_range_and_half_precision(self):
        images = torch.tensor([-1.0, 2])[:, None, None, None].expand(2, 3, 8, 8).bfloat16().requires_grad_()
        seen = np.asarray(picture(images))[64]
        assert (seen[64] == 0).all()
        assert (seen[64 + 132] == 255).all()

    @pytest.mark.parametrize("below", [["a"], torch.zeros(3)])
    def test_an_entry_for_each_image(self, below):
        with pytest.raises(ValueError, match="below 2 images as many entries"):
            picture(RED.expand(2, 3, 8, 8), below)
        with pytest.raises(ValueError, match="at least one image"):
            picture(torch.zeros(0, 3, 8, 8))


def watch(out, *, total, every=None, put=lambda step: (RED.expand(1, 3, 8, 8), ["x"]), start=0, main=True, trackers=()):
    state = {}
    images = Images(state, every=every, trackers=trackers)
    args = SimpleNamespace(output_dir=str(out))
    images.on_train_begin(args, SimpleNamespace(is_world_process_zero=main, global_step=start), None)
    for step in range(start + 1, total + 1):
        if put(step) is not None:
            state["images"] = put(step)
        images.on_step_end(args, SimpleNamespace(is_world_process_zero=main, global_step=step, max_steps=total), None)
        assert "images" not in state


class TestTimes:
    @pytest.mark.parametrize(
        ("total", "every", "expected"),
        [
            (10, 3, [1, 3, 6, 9, 10]),
            (3, 9, [1, 3]),
            (3, None, [1, 2, 3]),
            (40, None, [1, *range(2, 41, 2)]),
            (3, 0, []),
        ],
    )
    def test_every_so_many_steps(self, tmp_path, total, every, expected):
        watch(tmp_path, total=total, every=every)
        assert (steps(tmp_path) if expected else list(tmp_path.iterdir())) == expected

    def test_a_rollout_of_several_steps_once(self, tmp_path):
        watch(tmp_path, total=14, every=4, put=lambda step: RED.expand(1, 3, 8, 8) if step % 3 == 1 else None)
        assert steps(tmp_path) == [1, 4, 10, 13]

    def test_a_resumed_run_goes_on_as_the_whole_would(self, tmp_path):
        watch(tmp_path, total=10, every=4)
        assert steps(tmp_path) == [1, 4, 8, 10]
        for start in (9, 7, 2):
            watch(tmp_path, total=10, every=4, start=start, put=lambda step: BLUE.expand(1, 3, 8, 8))
            assert steps(tmp_path) == [1, 4, 8, 10]
            colours = {
                s: Image.open(tmp_path / "images" / f"step-{s:05}.png").getpixel((64, 64)) for s in (1, 4, 8, 10)
            }
            assert {s for s, colour in colours.items() if colour == (0, 0, 255)} == {s for s in colours if s > start}

    def test_pictures_after_the_checkpoint_go_even_if_no_more_are_wanted(self, tmp_path):
        watch(tmp_path, total=10, every=4)
        watch(tmp_path, total=10, every=0, start=7)
        assert steps(tmp_path) == [1, 4]

    def test_those_of_another_run_are_refused(self, tmp_path):
        watch(tmp_path, total=2)
        with pytest.raises(ValueError, match="images holds pictures, but this run begins: move them away"):
            watch(tmp_path, total=2)
        watch(tmp_path, total=2, main=False)
        assert steps(tmp_path) == [1, 2]

    def test_only_the_main_process_draws(self, tmp_path):
        watch(tmp_path, total=2, main=False)
        assert not list(tmp_path.iterdir())

    def test_a_write_that_fails_leaves_what_was_there(self, tmp_path, monkeypatch):
        watch(tmp_path, total=1)
        before = (tmp_path / "images" / "step-00001.png").read_bytes()

        def half(image, file, **_):
            file.write_bytes(before[:20])
            raise OSError("No space left on device")

        monkeypatch.setattr(Image.Image, "save", half)
        with pytest.raises(OSError, match="No space"):
            watch(tmp_path, total=2, start=1)
        assert [path.name for path in (tmp_path / "images").glob("*.png")] == ["step-00001.png"]
        assert (tmp_path / "images" / "step-00001.png").read_bytes() == before

    def test_a_negative_number_of_steps(self):
        with pytest.raises(ValueError, match="images=-1 must be a number of steps, or 0"):
            Images({}, every=-1)


class TestTrackers:
    def test_weights_and_biases(self, tmp_path, monkeypatch):
        logged = []
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.append, Image=lambda image: image))
        watch(tmp_path, total=2, trackers=[object.__new__(WandbCallback), TrainerCallback()])
        assert [x["train/global_step"] for x in logged] == [1, 2]
        assert all(isinstance(x["images"], Image.Image) for x in logged)

    def test_tensorboard_has_what_the_folder_has(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.fit(tmp_path, report_to=["tensorboard"])
        (log,) = tmp_path.glob("runs/*")
        events = EventAccumulator(str(log))
        events.Reload()
        found = {
            event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            for event in events.Images("images")
        }
        assert list(found) == steps(tmp_path) == [1, 3]
        for step, image in found.items():
            assert np.array_equal(image, np.asarray(Image.open(tmp_path / "images" / f"step-{step:05}.png")))

    def fit(self, out, **fields):
        """Four steps, two to a rollout; images of the loss, one of each micro-batch."""
        model, state = torch.nn.Linear(1, 1), {}

        def collect(i):
            state["images"] = torch.rand(4, 3, 8, 8), [f"rollout {i}"] * 4, torch.rand(4)
            return {"x": torch.rand(4, 1), "mask": torch.ones(4, 1, dtype=torch.bool)}

        def loss_fn(model, x, mask, weights):
            return weigh(model(x), weights), {}

        args = hf.arguments(str(out), batch=2, micro=1, lr=1e-3, steps=4, seed=0, save_steps=2, **fields)
        hf.fit(
            loss_fn,
            model,
            lambda step: rollouts(collect, state, size=2, seed=0, start=step),
            aggregate=token_mean,
            args=args,
            state=state,
        )


def test_images_of_the_loss_and_no_state(tmp_path):
    state = {}

    def loss_fn(model, x, mask, weights):
        y = model(x)
        state["images"] = y.view(-1, 1, 1, 1).expand(-1, 3, 8, 8), y
        return weigh(y, weights), {}

    def start(out, **options):
        batch = {"x": torch.rand(2, 1), "mask": torch.ones(2, 1, dtype=torch.bool)}
        args = hf.arguments(str(tmp_path / out), batch=2, micro=1, lr=1e-3, steps=2, seed=0)
        hf.fit(loss_fn, torch.nn.Linear(1, 1), lambda _: iter([batch] * 2), aggregate=token_mean, args=args, **options)

    start("one", state=state, images=1)
    assert steps(tmp_path / "one") == [1, 2]
    assert not state
    start("never", state=state, images=0)
    assert not (tmp_path / "never" / "images").exists()
    with pytest.raises(ValueError, match="images=3 needs state"):
        start("two", images=3)


def test_the_recipe_draws_and_checkpoints_hold_no_images(folders, tmp_path):
    """The drawn prompts and rewards are those of the rollout; a resumed run ends with the same pictures."""
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    out, options = tmp_path / "out", {"steps": 4, "save_steps": 1}
    run(folders["sd"], dataset, out, **options)
    assert steps(out) == [1, 3]  # two steps of a rollout
    whole = [(out / "images" / f"step-{step:05}.png").read_bytes() for step in (1, 3)]
    saved = torch.load(out / "checkpoint-1" / "stream_0.pt")
    assert set(saved) == {"rollout", "stats"}
    assert "images" not in saved["rollout"]
    policy, score = opened(folders), diffusion.image_reward("builtin:brightness")
    b, state = {}, {}
    drawn = {"n": 2, "size": 4, "rows": 4, "seed": 0, "step": 0}
    b = diffusion.rollout(policy, PROMPTS, score, **drawn)
    assert "images" not in diffusion.rollout(policy, PROMPTS, score, state, **drawn)
    images, prompts, rewards = state["images"]
    assert prompts == [PROMPTS[i] for i in b["prompt"].tolist()]
    assert torch.equal(images, b["images"])
    assert torch.equal(rewards, b["rewards"])
    assert np.array_equal(np.asarray(picture(*state["images"])), np.asarray(Image.open(io.BytesIO(whole[0]))))
    run(folders["sd"], dataset, out, **options, resume_from_checkpoint=str(out / "checkpoint-1"))
    assert [(out / "images" / f"step-{step:05}.png").read_bytes() for step in (1, 3)] == whole


def test_pipelines_without_a_vae_are_saved_in_silence(folders, tmp_path):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        for name in (folders["pixels"], "builtin:untrained"):
            diffusion.save(diffusion.pipeline(name, dtype="bfloat16"), tmp_path / "saved")
            assert diffusion.pipeline(tmp_path / "saved").pipe.vae is None
        assert not said
        logger.warning("others are heard")
    finally:
        logger.removeHandler(handler)
    assert said == ["others are heard"]


class TestProgress:
    def shown(self, monkeypatch, make, *, terminal):
        file = io.StringIO()
        file.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", file)
        make()
        return file.getvalue()

    @pytest.mark.parametrize(("terminal", "expected"), [(True, True), (False, False)])
    def test_rollouts_show_it_on_a_terminal(self, folders, monkeypatch, terminal, expected):
        policy, score = opened(folders), diffusion.image_reward("builtin:brightness")
        options = {"n": 2, "size": 4, "rows": 2, "seed": 0, "step": 0}
        text = self.shown(monkeypatch, lambda: diffusion.rollout(policy, PROMPTS, score, **options), terminal=terminal)
        assert bool(text) == expected
        if expected:
            assert "4 images" in text
            assert f"/{2 * spec().steps}" in text  # of both parts
            assert re.fullmatch(r"\s*", text.rsplit("\r", 2)[1])  # it is gone at the end
        assert not self.shown(
            monkeypatch, lambda: diffusion.rollout(policy, PROMPTS, score, bar=False, **options), terminal=True
        )

    def test_where_it_is_asked_for(self, folders, monkeypatch):
        policy = opened(folders)
        assert "3 images" in self.shown(
            monkeypatch, lambda: diffusion.denoise(policy, PROMPTS, bar=True), terminal=False
        )
        assert not self.shown(monkeypatch, lambda: diffusion.denoise(policy, PROMPTS), terminal=True)
        from alignkit.hf.diffusion import sampling

        monkeypatch.setattr(sampling, "process", lambda: SimpleNamespace(process_index=1, is_main_process=False))
        assert not self.shown(monkeypatch, lambda: diffusion.denoise(policy, PROMPTS, bar=True), terminal=True)
