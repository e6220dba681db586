"""What a model card shows of a run's options."""

import pytest

from alignprop_fast.cli.results import shareable


def test_paths_become_names(tmp_path):
    assert shareable(str(tmp_path)) == tmp_path.name
    assert shareable((f"clip={tmp_path}", "count=owner/name")) == f"clip={tmp_path.name}, count=owner/name"


@pytest.mark.parametrize(
    "text", ["owner/name", "bad hands/feet, " * 30, "lowres, " * 40 + "hands/feet", "/" + "x" * 300]
)
def test_other_texts_stay(text):
    """A negative prompt may be longer than the name of a file, which ended the run when the card was written."""
    assert shareable(text) == text
