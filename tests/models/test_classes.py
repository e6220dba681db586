"""Classes that only newer releases of diffusers and transformers have."""

import json
import shutil
from importlib.util import find_spec

import pytest

from alignprop_fast.models.load import folder
from alignprop_fast.models.load.folder import read_index
from alignprop_fast.models.load.pipeline import load_outline, load_pipeline


def test_a_release_without_the_class_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "SUPPORTED", ("NewPipeline",))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NewPipeline"}))
    with pytest.raises(ValueError, match="has no NewPipeline: update it with pip install -U diffusers") as error:
        read_index(tmp_path)
    assert "\n" not in str(error.value)


def test_a_transformers_release_without_a_part_s_class(tiny_sd_folder, tmp_path):
    index = json.loads((tiny_sd_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["transformers", "NewModel"]}))
    with pytest.raises(ValueError, match=r"transformers [\w.]+ has no NewModel: update it with pip") as error:
        read_index(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_tokenizer_whose_package_is_missing(tiny_flux2_dev_folder, tmp_path):
    """The published FLUX.2-dev has a processor of texts and pictures. A plan needs no tokenizer."""
    folder = shutil.copytree(tiny_flux2_dev_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    entry = {"tokenizer": ["transformers", "PixtralProcessor"]}
    (folder / "model_index.json").write_text(json.dumps({**index, **entry}))
    with pytest.raises(
        ValueError, match=r"^PixtralProcessor needs torchvision: pip install torchvision torch==[\d.]+$"
    ):
        load_pipeline(folder)
    assert load_outline(folder).tokenizer is None


@pytest.mark.parametrize("entry", [[], ["transformers"], ["transformers", None], "x"])
def test_an_index_that_is_damaged_gets_its_line_when_it_is_loaded(tiny_sd_folder, tmp_path, entry):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": entry}))
    with pytest.raises(ValueError) as error:
        load_pipeline(folder)
    assert "\n" not in str(error.value)
