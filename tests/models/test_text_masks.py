"""Given embeddings of the models whose pipelines take them with a mask: Chroma, Lumina 2 and SANA."""

import inspect

import pytest
import torch

from alignprop_fast import DifferentiableSampler

PROMPTS, NEGATIVE = ["red cat", "dog and cat"], ["dog", "cat " * 9]
NAMES = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
MASK = NAMES[-1]


def encoded(pipe):
    """What the pipeline makes of the texts, by its own names."""
    kind = type(pipe).__name__
    if kind == "ChromaPipeline":
        sides = (pipe.encode_prompt(texts, do_classifier_free_guidance=False) for texts in (PROMPTS, NEGATIVE))
        found = [tensor for embeds, _, mask, *_ in sides for tensor in (embeds, mask)]
    elif kind == "Lumina2Pipeline":
        found = pipe.encode_prompt(PROMPTS, True, NEGATIVE)
    else:
        instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        found = pipe.encode_prompt(PROMPTS, True, NEGATIVE, complex_human_instruction=instruction)
    return dict(zip(NAMES, found, strict=True))


@pytest.fixture
def made(request, model):
    """(sampler, embeddings with their masks)"""
    pipe = request.getfixturevalue(f"tiny_{model}")
    return DifferentiableSampler(pipe, 2, 3.0, height=32, width=32), encoded(pipe)


@pytest.mark.parametrize("model", ["chroma", "lumina2", "sana"])
def test_embeddings_with_their_masks(made):
    sampler, given = made
    from_text, from_embeddings = (
        sampler(PROMPTS, NEGATIVE, torch.Generator().manual_seed(0), embeddings=one) for one in (None, given)
    )
    assert torch.equal(from_text, from_embeddings)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("chroma", None, f"negative_prompt_embeds need {MASK} in floating"),
        ("chroma", torch.Tensor.bool, f"negative_prompt_embeds need {MASK} in floating"),
        ("lumina2", None, f"give {MASK}"),
        ("lumina2", lambda mask: mask.flip(1), f"padding at the end: give {MASK}"),
        ("sana", None, f"give {MASK}"),
    ],
    ids=["chroma: none", "chroma: of another type", "lumina2: none", "lumina2: padding first", "sana: none"],
)
def test_a_mask_that_is_missing_or_of_another_kind(made, change, message):
    sampler, given = made
    mask = given.pop(MASK)
    if change is not None:
        given[MASK] = change(mask)
    with pytest.raises(ValueError, match=message):
        sampler(PROMPTS, embeddings=given)
