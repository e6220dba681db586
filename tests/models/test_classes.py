"""Classes that only newer releases of diffusers have."""

import json

import pytest

from alignprop_fast.models.load import folder
from alignprop_fast.models.load.folder import read_index


def test_a_release_without_the_class_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "SUPPORTED", ("NewPipeline",))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NewPipeline"}))
    with pytest.raises(ValueError, match="has no NewPipeline: update it with pip install -U diffusers") as error:
        read_index(tmp_path)
    assert "\n" not in str(error.value)
