"""Given embeddings of Chroma, with their masks."""

import pytest
import torch

from alignprop_fast import DifferentiableSampler

PROMPTS, NEGATIVE = ["red cat", "dog and cat"], ["dog", "cat " * 9]


@pytest.fixture
def given(tiny_chroma):
    """What the pipeline makes of the texts, by its own names."""
    found = {}
    for side, texts in (("", PROMPTS), ("negative_", NEGATIVE)):
        embeds, _, mask, *_ = tiny_chroma.encode_prompt(texts, do_classifier_free_guidance=False)
        found |= {f"{side}prompt_embeds": embeds, f"{side}prompt_attention_mask": mask}
    return found


@pytest.fixture
def sampler(tiny_chroma):
    return DifferentiableSampler(tiny_chroma, 2, 3.0, height=16, width=16)


def test_embeddings_with_their_masks(sampler, given):
    from_text, from_embeddings = (
        sampler(PROMPTS, NEGATIVE, torch.Generator().manual_seed(0), embeddings=one) for one in (None, given)
    )
    assert torch.equal(from_text, from_embeddings)


@pytest.mark.parametrize("kind", ["none", "bool"])
def test_a_mask_that_is_missing_or_of_another_type(sampler, given, kind):
    mask = given.pop("negative_prompt_attention_mask")
    if kind == "bool":
        given["negative_prompt_attention_mask"] = mask.bool()
    with pytest.raises(ValueError, match="negative_prompt_embeds need negative_prompt_attention_mask in floating"):
        sampler(PROMPTS, embeddings=given)
