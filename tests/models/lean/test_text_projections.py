"""Keys and values of the text, projected once: the same bits as projecting them in every step."""

import copy

import pytest
import torch

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.lean import attention
from alignprop_fast.models.lean.text_projections import TextProjections, known_projections
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.pipeline_adapter import PipelineAdapter
from alignprop_fast.planner import BlockOption, Plan, StageChoice

from ...adapters import draw_factors

KEEP = {"*": BlockOption.KEEP}
# Step 0 is closed, 1 replayed with every block run again, 2 resident.
PLAN = Plan(3, (2,), (1,), (KEEP,), {"*": BlockOption.ATTENTION}, StageChoice("batch", KEEP))


def with_adapters(pipe):
    draw_factors(add_lora(pipe, 4, 4), std=0.1)
    return pipe


def images_and_gradients(pipe, **options):
    sampler = DifferentiableSampler(pipe, 3, memory_budget=None, **options)
    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2)).requires_grad_(not options)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds.detach() / 2}
    images = sampler(["red cat", "dog"], generator=torch.Generator().manual_seed(0), plan=PLAN, embeddings=given)
    loss = (images * torch.linspace(0, 1, images.shape[-1])).mean()
    (loss if sampler.base_mse is None else loss + sampler.base_mse).backward()
    return [images.detach(), *([] if options else [embeds.grad]), *(p.grad for p in sampler.model.trainable())]


@pytest.mark.parametrize("options", [{}, {"compare_with_base": True}])
def test_images_and_gradients_are_the_same_bits(tiny_sd, monkeypatch, options):
    """Gradients of adapters and of the embeddings too; and of the distance to the base model, which has other keys."""
    pipe, project, texts = with_adapters(tiny_sd), attention.projected, []

    def counting(x, *linears):
        if len(linears) == 2:
            texts.append(torch.is_grad_enabled())
        return project(x, *linears)

    monkeypatch.setattr(attention, "projected", counting)
    twin = copy.deepcopy(pipe)
    found = images_and_gradients(pipe, **options)
    layers, with_gradient = len(attention.over_a_text(pipe.unet)), texts.count(True)
    assert layers > 3
    assert texts.count(False) == layers * (1 + 2 * bool(options))  # once, and by the base model in two steps
    texts.clear()
    none_kept = lambda model, cond: TextProjections(cond.embeds, {})  # noqa: E731
    monkeypatch.setattr(PipelineAdapter, "text_projections", none_kept)
    expected = images_and_gradients(twin, **options)
    assert len(found) == len(expected) > 10 and all(map(torch.equal, found, expected))
    # Without gradient run the closed step and the replayed one at first; with gradient the other two.
    assert texts.count(False) == layers * (2 + 2 * bool(options)) and texts.count(True) >= with_gradient + 2 * layers


def test_their_bytes_are_in_the_plan_and_joint_attention_has_none(tiny_sd, tiny_flux):
    sampler = DifferentiableSampler(tiny_sd, 3)
    step = sampler._blank_step(2, None)
    held = step.chain.texts.by_attention
    assert len(held) == len(attention.over_a_text(tiny_sd.unet)) > 3
    assert step.chain.texts.size_bytes == sum(4 * 4 * 77 * 2 * attn.to_k.out_features for attn in held)
    attn, text = next(iter(held)), step.chain.texts.text
    assert known_projections(attn, text) is None
    with step.chain.texts.in_place():
        assert known_projections(attn, text) is held[attn] and known_projections(attn, text.clone()) is None
    with step.chain.around_block():  # blocks are measured alone, on other inputs
        assert known_projections(attn, text.clone()) is held[attn] and known_projections(attn, text[:1]) is None
    assert not DifferentiableSampler(tiny_flux, 3, height=16, width=16)._blank_step(1, None).chain.texts.by_attention
