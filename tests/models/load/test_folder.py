"""The files of a folder: full weights, variants, weights in several files, pickles, and the messages for each."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from alignprop_fast.models.load.folder import choose_weights
from alignprop_fast.models.load.pipeline import load_pipeline

KINDS = ("sd", "sdxl", "sd3", "flux", "z_image", "flux2_klein", "qwen_image", "krea2", "chroma", "lumina2", "sana")
SMALL = "16KB"  # so that the small networks take several files


@pytest.fixture
def saved(request, tmp_path):
    """saved(kind, fp16=, full=, shards=) -> a folder as `save_pretrained` writes it."""

    def make(kind, fp16=False, full=True, shards=False, safe=True):
        source, folder = request.getfixturevalue(f"tiny_{kind}_folder"), tmp_path / "model"
        pipe = DiffusionPipeline.from_pretrained(source, local_files_only=True)
        size = {"max_shard_size": SMALL} if shards else {}
        if full:
            pipe.save_pretrained(folder, safe_serialization=safe, **size)
        if fp16:
            pipe.to(torch.float16).save_pretrained(folder, variant="fp16", **size)
        for tokenizer in source.glob("tokenizer*"):  # of the test model, readable by every version
            shutil.copytree(tokenizer, folder / tokenizer.name, dirs_exist_ok=True)
        return folder

    return make


def networks(pipe):
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def assert_weights(pipe, folder, dtype):
    """The original folder's weights, rounded to `dtype`."""
    expected = networks(DiffusionPipeline.from_pretrained(folder, local_files_only=True))
    found = networks(pipe)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.to(dtype).float()) for name, tensor in expected.items())


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fp16_variant_where_there_is_nothing_else(kind, shards, saved, request, caplog):
    folder = saved(kind, fp16=True, full=False, shards=shards)
    names = [file.name for file in folder.rglob("*.safetensors")]
    assert names and all(".fp16" in name for name in names)
    assert any(file.name.endswith("index.fp16.json") for file in folder.rglob("*")) == shards
    pipe = load_pipeline(folder)
    assert_weights(pipe, request.getfixturevalue(f"tiny_{kind}_folder"), torch.float16)
    notes = [record.getMessage() for record in caplog.records if record.name.startswith("alignprop_fast")]
    assert len(notes) == 1 and notes[0].startswith(f"{folder} holds no full weights of ")
    assert notes[0].endswith(": using the fp16 variant") and "vae" in notes[0]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_of_both_the_full_weights(kind, shards, saved, request, caplog):
    folder = saved(kind, fp16=True, shards=shards)
    # Unused files may be damaged.
    next((folder / "vae").glob("*fp16*.safetensors")).write_bytes(b"")
    pipe = load_pipeline(folder)
    assert_weights(pipe, request.getfixturevalue(f"tiny_{kind}_folder"), torch.float32)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("alignprop_fast")] == [
        f"{folder} holds the full weights and a variant (fp16): using the full ones"
    ]


def test_a_part_alone_in_fp16(saved, request, caplog):
    folder = saved("sd", fp16=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe = load_pipeline(folder)
    original = networks(DiffusionPipeline.from_pretrained(request.getfixturevalue("tiny_sd_folder")))
    assert all(torch.equal(t, original[n].half().float()) for n, t in networks(pipe).items() if n.startswith("unet."))
    assert "holds no full weights of unet: using the fp16 variant" in caplog.text


def test_weights_in_several_files(saved, request):
    folder = saved("sd3", shards=True)
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    assert_weights(load_pipeline(folder), request.getfixturevalue("tiny_sd3_folder"), torch.float32)
    lost = sorted((folder / "transformer").glob("*.safetensors"))[1]
    content = lost.read_bytes()
    lost.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=rf"{lost.name} is damaged"):
        load_pipeline(folder)
    lost.unlink()
    with pytest.raises(ValueError, match=rf"transformer lacks {lost.name}, one of \d+ files: copy or download"):
        load_pipeline(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        load_pipeline(folder)


@pytest.mark.parametrize("shards", [False, True])
def test_pickles_are_read_where_they_are_allowed(saved, request, caplog, shards):
    folder = saved("sd", safe=False, shards=shards)
    for file in (folder / "text_encoder").glob("model*"):  # transformers 5 writes no pickles, but reads them
        file.unlink()
    encoder = request.getfixturevalue("tiny_sd_folder") / "text_encoder" / "model.safetensors"
    torch.save(load_file(encoder), folder / "text_encoder" / "pytorch_model.bin")
    assert not list(folder.rglob("*.safetensors"))
    with pytest.raises(ValueError, match=r"text_encoder/pytorch_model\.bin is a pickle.*--allow-pickle") as error:
        load_pipeline(folder)
    assert "\n" not in str(error.value)
    pipe = load_pipeline(folder, allow_pickle=True)
    assert_weights(pipe, request.getfixturevalue("tiny_sd_folder"), torch.float32)
    assert "the pickles text_encoder/pytorch_model.bin, unet/diffusion_pytorch_model" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def test_a_pickle_runs_nothing(saved, tmp_path):
    """Also with --allow-pickle, because the unpickler accepts only tensors."""
    folder = saved("sd")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv_in.weight": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the pipeline"):
        load_pipeline(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_what_was_left_out_when_the_folder_was_saved(request, tmp_path):
    """SD3 without T5, as the guides for small cards save it."""
    pipe = DiffusionPipeline.from_pretrained(
        request.getfixturevalue("tiny_sd3_folder"), text_encoder_3=None, tokenizer_3=None
    )
    pipe.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    loaded = load_pipeline(tmp_path / "model")
    assert loaded.text_encoder_3 is None and loaded.text_encoder_2 is not None


def test_the_safety_checker_is_not_read(tiny_sd_folder, tmp_path):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(folder).safety_checker is None


FILES = ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json")


def choose(*names, allow_pickle=False):
    return choose_weights([*FILES, *names], ["unet", "vae"], "here", allow_pickle)


VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["unet/diffusion_pytorch_model.safetensors"], None),
        (["unet/diffusion_pytorch_model.bf16.safetensors"], "bf16"),
        (["unet/diffusion_pytorch_model.bf16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.safetensors"], None),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"], "fp16"),
        (["unet/model.safetensors.index.fp16.json", "unet/model.fp16-00001-of-00002.safetensors"], "fp16"),
        (["unet/openvino_model.bin", "unet/diffusion_pytorch_model.safetensors"], None),
    ],
)
def test_the_choice(names, variant):
    weights = choose(VAE, *names)
    assert weights.variant == variant and weights.names[1] == VAE and not weights.pickles


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the unet of here has no weights"),
        (["unet/openvino_model.bin", "unet/other/model.safetensors"], "the unet of here has no weights"),
        (["unet/diffusion_pytorch_model.bin"], "here/unet/diffusion_pytorch_model.bin is a pickle"),
    ],
)
def test_refusals(names, message):
    with pytest.raises(ValueError, match=message):
        choose(VAE, *names)


def test_two_parts_with_nothing_in_common():
    names = ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(ValueError, match=r"nor one variant of all parts \(unet: fp16; vae: bf16\)"):
        choose(*names)
