"""Given embeddings of Lumina 2, with their masks."""

import pytest
import torch

from alignprop_fast import DifferentiableSampler

PROMPTS, NEGATIVE = ["red cat", "dog and cat"], ["dog", "cat " * 9]


@pytest.fixture
def given(tiny_lumina2):
    """What the pipeline makes of the texts, by its own names."""
    names = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
    return dict(zip(names, tiny_lumina2.encode_prompt(PROMPTS, True, NEGATIVE), strict=True))


@pytest.fixture
def sampler(tiny_lumina2):
    return DifferentiableSampler(tiny_lumina2, 2, 3.0, height=16, width=16)


def test_embeddings_with_their_masks(sampler, given):
    from_text, from_embeddings = (
        sampler(PROMPTS, NEGATIVE, torch.Generator().manual_seed(0), embeddings=one) for one in (None, given)
    )
    assert torch.equal(from_text, from_embeddings)


@pytest.mark.parametrize("kind", ["none", "padding first"])
def test_a_mask_that_is_missing_or_has_padding_first(sampler, given, kind):
    mask = given.pop("negative_prompt_attention_mask")
    if kind == "padding first":
        given["negative_prompt_attention_mask"] = mask.flip(1)
    with pytest.raises(ValueError, match="give negative_prompt_attention_mask"):
        sampler(PROMPTS, embeddings=given)
