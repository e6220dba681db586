"""Loading pipelines, and the one-line error for everything that can go wrong."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from alignprop_fast.models import adapt
from alignprop_fast.models.load.pipeline import SCHEDULERS, load_outline, load_pipeline
from alignprop_fast.models.lora.targets import denoiser
from alignprop_fast.models.schedules import make_scheduler


@pytest.fixture
def copied(tiny_sd_folder, tmp_path):
    return shutil.copytree(tiny_sd_folder, tmp_path / "model")


def _one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_loads_frozen_with_ddim(kind, request):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    pipe = load_pipeline(str(folder), dtype=torch.bfloat16)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert not pipe.unet.training


def test_clipping_is_turned_off_where_the_config_is_silent(copied):
    """PNDM configurations say nothing about clipping, and DDIM's default would clip."""
    (copied / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler", "steps_offset": 1}')
    index = json.loads((copied / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (copied / "model_index.json").write_text(json.dumps(index))
    pipe = load_pipeline(copied)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.clip_sample is False
    assert pipe.scheduler.config.steps_offset == 1


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline(tmp_path / "nowhere")
    assert "nowhere" in _one_line(error) and "demo" in _one_line(error)


def test_a_file_of_another_kind(copied):
    with pytest.raises(ValueError) as error:
        load_pipeline(copied / "model_index.json")
    assert "not a .safetensors file" in _one_line(error)


FLOWS = ("sd3", "flux", "z_image", "flux2_klein", "qwen_image", "krea2", "chroma", "lumina2")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd", "sdxl", *FLOWS])
def test_every_scheduler_that_fits(kind, scheduler, request):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    if scheduler != "auto" and (scheduler == "flow-euler") != (kind in FLOWS):
        with pytest.raises(ValueError, match="does not fit"):
            load_pipeline(folder, scheduler=scheduler)
        return
    pipe = load_pipeline(folder, scheduler=scheduler)
    default = "flow-euler" if kind in FLOWS else "ddim"
    assert adapt(pipe).scheduler_name == (default if scheduler == "auto" else scheduler)
    assert not any(parameter.requires_grad for parameter in denoiser(pipe).parameters())


def test_the_schedulers_of_sana(tiny_sana_folder):
    """Two for flow matching, which call the shift by two names."""
    for scheduler, name in (("auto", "dpm++2m"), ("dpm++2m", "dpm++2m"), ("flow-euler", "flow-euler")):
        pipe = load_pipeline(tiny_sana_folder, scheduler=scheduler)
        assert adapt(pipe).scheduler_name == name
    assert pipe.scheduler.config.shift == 3 == make_scheduler("dpm++2m", pipe.scheduler.config).config.flow_shift
    with pytest.raises(ValueError, match="does not fit"):
        load_pipeline(tiny_sana_folder, scheduler="ddim")


def test_folder_without_index(copied):
    (copied / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline(copied)
    assert "model_index.json" in _one_line(error)


def test_damaged_index(copied):
    (copied / "model_index.json").write_text("{")
    with pytest.raises(ValueError) as error:
        load_pipeline(copied)
    assert "model_index.json is damaged" in _one_line(error)


@pytest.mark.parametrize("keep_bytes", [0, 5, 1000])
def test_truncated_weights_name_the_file(copied, keep_bytes):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    with pytest.raises(ValueError) as error:
        load_pipeline(copied)
    assert str(file) in _one_line(error) and "damaged" in _one_line(error)


def test_missing_weights(copied):
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        load_pipeline(copied)
    assert f"the vae of {copied} has no weights" in _one_line(error)


def test_unsupported_class_is_named(copied):
    index = json.loads((copied / "model_index.json").read_text())
    index["_class_name"] = "PixArtSigmaPipeline"
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        load_pipeline(copied)
    assert "PixArtSigmaPipeline" in _one_line(error) and "StableDiffusionXLPipeline" in _one_line(error)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_outline_is_the_pipeline_without_weights(kind, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    ignored = shutil.ignore_patterns("*.safetensors", "tokenizer*")
    outline = load_outline(shutil.copytree(folder, tmp_path / "configs", ignore=ignored), torch.bfloat16)
    pipe = load_pipeline(folder, torch.bfloat16)
    assert type(outline) is type(pipe) and isinstance(outline.scheduler, DDIMScheduler)
    assert outline.scheduler.config == pipe.scheduler.config
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        own = outline.components[name].state_dict(keep_vars=True)
        expected = part.state_dict(keep_vars=True)
        assert {k: (v.shape, v.dtype, v.requires_grad) for k, v in own.items()} == {
            k: (v.shape, v.dtype, v.requires_grad) for k, v in expected.items()
        }
        assert all(tensor.is_meta for tensor in own.values()) and not outline.components[name].training


@pytest.mark.parametrize(
    "name",
    ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"],
)
def test_an_outline_of_a_folder_with_any_scheduler(copied, name):
    """SDXL's has EulerDiscreteScheduler. Most schedulers compute their numbers as soon as they are made."""
    getattr(diffusers, f"{name}Scheduler")().save_pretrained(copied / "scheduler")
    index = json.loads((copied / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", f"{name}Scheduler"]
    (copied / "model_index.json").write_text(json.dumps(index))
    outline = load_outline(copied)
    assert outline.scheduler.config == load_pipeline(copied).scheduler.config and outline.unet.device.type == "meta"


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_outline_of_damaged_configurations(copied, part):
    (copied / part / "config.json").write_text("{")
    with pytest.raises(ValueError) as error:
        load_outline(copied)
    assert "copy it again" in _one_line(error)
    (copied / part / "config.json").unlink()
    with pytest.raises(ValueError):
        load_outline(copied)


def test_the_outline_of_a_single_file_is_that_of_its_model_config(tiny_sd_folder, tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    shapes = [
        {name: weight.shape for name, weight in pipe.unet.state_dict().items()}
        for pipe in (load_outline(file, model_config=tiny_sd_folder), load_outline(tiny_sd_folder))
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="holds weights alone: give the folder of its configurations"):
        load_outline(file)
    with pytest.raises(ValueError, match=r"for a single \.safetensors file: leave it out"):
        load_outline(tiny_sd_folder, model_config=tiny_sd_folder)


class Hub:
    """Replaces the three calls to the Hub (list of files, index, download) by a local folder."""

    def __init__(self, monkeypatch, folder, online=True):
        self.folder, self.online, self.asked = folder, online, []
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self._info)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self._file)
        monkeypatch.setattr("diffusers.DiffusionPipeline.download", self._download)

    def _info(self, model, revision):
        if not self.online:
            raise OSError(
                "Cannot load model owner/name. Please check out the root cause in the stacktrace above.\nmore"
            )
        names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def _file(self, model, name, revision, local_files_only):
        assert local_files_only != self.online
        if not (self.folder / name).is_file():
            raise OSError("not in the cache")
        return str(self.folder / name)

    def _download(self, model, **options):
        self.asked.append((model, options))
        return str(self.folder)


def test_a_hub_model_that_cannot_be_reached_says_how_to_get_it(monkeypatch, tmp_path):
    Hub(monkeypatch, tmp_path, online=False)
    with pytest.raises(OSError) as caught:
        load_pipeline("owner/name")
    assert str(caught.value) == (
        "cannot load owner/name from the Hub: Cannot load model owner/name; give the folder of a copy, such as one "
        "made by `hf download owner/name --local-dir FOLDER`"
    )


@pytest.mark.parametrize("online", [True, False])
def test_a_hub_model_in_the_variant_that_it_has(monkeypatch, tiny_sd, tmp_path, online, caplog):
    tiny_sd.save_pretrained(tmp_path, variant="fp16")
    hub = Hub(monkeypatch, tmp_path, online)
    assert load_pipeline("owner/name", revision="v1").unet.dtype == torch.float32
    assert hub.asked == [("owner/name", {"revision": "v1", "variant": "fp16", "use_safetensors": True})]
    assert "owner/name holds no full weights" in caplog.text


def test_an_unsupported_hub_model_is_not_downloaded(monkeypatch, copied):
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxKontextPipeline"}))
    hub = Hub(monkeypatch, copied)
    with pytest.raises(ValueError, match="owner/name holds a FluxKontextPipeline, which needs a picture"):
        load_pipeline("owner/name")
    assert not hub.asked
