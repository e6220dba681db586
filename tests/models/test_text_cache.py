"""The text cache: the encoder runs once per prompt, and cached embeddings give the same bits in pictures."""

import pytest
import torch

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch
from alignprop_fast.models.text_cache import TextCache

SIZE = (16, 16)


class Counted:
    """A model that counts the prompts given to `encode`."""

    def __init__(self, model):
        self._model, self.pipe, self.device, self.prompts = model, model.pipe, model.device, []
        self.text_learns = model.text_learns

    def encode(self, batch):
        self.prompts += batch.prompts
        return self._model.encode(batch)


@pytest.fixture(params=["tiny_sd", "tiny_sdxl", "tiny_z_image", "tiny_qwen_image"])
def pipe(request):
    return request.getfixturevalue(request.param)


def tensors(cond):
    return [cond.embeds, *(cond.added or {}).values()]


@pytest.mark.parametrize("guided", [True, False])
def test_embeddings_are_those_of_each_prompt_alone(pipe, guided):
    model = adapt(pipe)
    cache = TextCache(model)
    prompts, negatives = ["a dog", "red", "a dog"], ["bad", "worse", "bad"]
    found = cache.encode(PromptBatch(prompts, negatives, guided, SIZE))
    alone = [model.encode(PromptBatch([p], [n], guided, SIZE)) for p, n in zip(prompts, negatives, strict=True)]
    assert found.branches == 1 + guided
    for k, tensor in enumerate(tensors(found)):
        rows = tensor.unflatten(0, (found.branches, len(prompts)))
        for i, entry in enumerate(alone):
            assert torch.equal(rows[:, i], tensors(entry)[k])
    together = model.encode(PromptBatch(prompts, negatives, guided, SIZE))
    assert found.lengths == together.lengths
    for mine, theirs in zip(tensors(found), tensors(together), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)  # other sums in a batch of three


@pytest.mark.parametrize("model", ["tiny_z_image", "tiny_qwen_image", "tiny_krea2"])
def test_a_text_longer_than_the_model_reads_beside_a_short_one(request, model):
    cache = TextCache(adapt(request.getfixturevalue(model)))
    found = cache.encode(PromptBatch(["red", "cat " * 600], None, False, SIZE))
    assert found.embeds.shape[:2] == (2, 512) and found.lengths[0] < found.lengths[1] == 512


def test_each_prompt_is_encoded_once(tiny_sd):
    model = Counted(adapt(tiny_sd))
    cache = TextCache(model)
    for prompts in (["red", "a dog"], ["a dog"], ["red", "red", "the cat"]):
        cache.encode(PromptBatch(prompts, None, True, SIZE))
    assert model.prompts == ["red", "a dog", "the cat"]
    cache.encode(PromptBatch(["red"], ["blurred"], True, SIZE))  # another negative prompt, another pair
    assert model.prompts[3:] == ["red"]


def test_the_least_recently_used_goes_first(tiny_sd):
    model = Counted(adapt(tiny_sd))
    entry_bytes = 2 * 77 * 32 * 4
    cache = TextCache(model, limit_bytes=2 * entry_bytes)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache.encode(PromptBatch([prompt], None, True, SIZE))
    assert model.prompts == ["a", "b", "c", "b"]


def test_pictures_are_the_same_bits(pipe):
    """Cached embeddings, also beside other prompts, equal those of encoding now."""
    size = dict(zip(("height", "width"), SIZE, strict=True))
    sampler = DifferentiableSampler(pipe, num_inference_steps=2, cache_text=True, **size)

    def picture():
        return sampler(["a dog"], "bad", torch.Generator().manual_seed(1), grad_steps=())

    first = picture()
    sampler.encode_ahead(["red", "the cat"], "bad")
    plain = DifferentiableSampler(pipe, num_inference_steps=2, **size)
    expected = plain(["a dog"], "bad", torch.Generator().manual_seed(1), grad_steps=())
    assert torch.equal(first, expected) and torch.equal(picture(), expected)
