"""What is kept is whole, a missing package is named, and exported pipelines load with diffusers alone, in fp32."""

import sys

import pytest
import torch

from alignprop_fast.making import train
from alignprop_fast.making.networks import write_tokenizer


def test_what_was_made_is_kept_and_a_stop_leaves_nothing(tmp_path):
    path = tmp_path / "kept.pt"

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.kept(path, stop)
    assert not list(tmp_path.iterdir())
    assert train.kept(path, lambda: torch.arange(3)).equal(torch.arange(3))
    assert train.kept(path, stop).equal(torch.arange(3))


def test_scenes_are_made_in_parts_that_a_stop_does_not_lose(tmp_path, monkeypatch):
    made = []

    def make(data, seed):
        made.append(seed)
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        return torch.full((2, 3, 1, 1), seed), [f"{seed} a", f"{seed} b"]

    monkeypatch.setattr(train, "SCENE_SEEDS", range(4))
    monkeypatch.setattr(train, "make_scenes", make)
    with pytest.raises(KeyboardInterrupt):
        train.load_scenes(tmp_path, tmp_path)
    pictures, captions = train.load_scenes(tmp_path, tmp_path)
    assert made == [0, 1, 2, 2, 3]
    assert pictures[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and captions[-1] == "3 b"


@pytest.mark.parametrize(("stage", "remedy"), [("vae", "npm install"), ("export", "npm install")])
def test_without_the_drawings_the_command_says_what_to_install(stage, remedy, tmp_path, monkeypatch, capsys):
    options = ["--data", str(tmp_path), "--output-dir", str(tmp_path / "run"), "--stages", stage]
    monkeypatch.setattr(sys, "argv", ["train", *options])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 1 and remedy in capsys.readouterr().err


def test_exported_pipelines_load_in_fp32_and_draw_what_they_drew_up_to_half_precision(pipe, tmp_path):
    from diffusers import StableDiffusionPipeline

    write_tokenizer(tmp_path / "tokenizer")
    train.export_pipeline(pipe, tmp_path / "tokenizer", tmp_path / "model")
    weights = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors"))
    numbers = sum(p.numel() for part in (pipe.vae, pipe.unet, pipe.text_encoder) for p in part.parameters())
    assert 2 * numbers < weights < 2 * numbers + 100_000  # names and shapes besides
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    for part in (loaded.vae, loaded.unet, loaded.text_encoder, pipe.unet):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert dict(loaded.scheduler.config)["prediction_type"] == "v_prediction"

    def draw(one):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
        return one("a cat", generator=generator, **options).images

    # Weights in half precision have 11 bits: a few parts in a thousand after some tens of layers.
    torch.testing.assert_close(draw(loaded), draw(pipe), rtol=0, atol=0.02)
