"""Given embeddings of SANA, with their masks; its scheduler and the sizes of its pictures."""

import inspect

import pytest
import torch

from alignprop_fast import DifferentiableSampler

PROMPTS, NEGATIVE = ["red cat", "dog and cat"], ["dog", "cat " * 9]


@pytest.fixture
def given(tiny_sana):
    """What the pipeline makes of the texts, by its own names."""
    names = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
    instruction = inspect.signature(type(tiny_sana).__call__).parameters["complex_human_instruction"].default
    found = tiny_sana.encode_prompt(PROMPTS, True, NEGATIVE, complex_human_instruction=instruction)
    return dict(zip(names, found, strict=True))


@pytest.fixture
def sampler(tiny_sana):
    return DifferentiableSampler(tiny_sana, 2, 3.0, height=32, width=32)


def test_embeddings_with_their_masks(sampler, given):
    from_text, from_embeddings = (
        sampler(PROMPTS, NEGATIVE, torch.Generator().manual_seed(0), embeddings=one) for one in (None, given)
    )
    assert torch.equal(from_text, from_embeddings)
    del given["negative_prompt_attention_mask"]
    with pytest.raises(ValueError, match="give negative_prompt_attention_mask"):
        sampler(PROMPTS, embeddings=given)


def test_a_scheduler_without_flow_is_refused(tiny_sana):
    tiny_sana.scheduler = type(tiny_sana.scheduler)(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="set use_flow_sigmas=True"):
        DifferentiableSampler(tiny_sana, 2, height=32, width=32)
