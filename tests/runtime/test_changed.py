"""Changes between sampling and the backward pass are an error for replays too, as they are for tensors autograd saved.

Without the check most changes would pass unnoticed: autograd only checks tensors that it saved, and a replayed step has
saved none.
"""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.planner import BlockOption, Plan, StageChoice
from alignprop_fast.rewards.mixture import Part, WeightedSum

PROMPTS, STEPS = ["red cat", "dog and cat"], 2


@pytest.fixture
def pipe(tiny_sd):
    for name in ("default", "style"):
        tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
    tiny_sd.unet.set_adapters(["default", "style"], [1.0, 0.5])
    return tiny_sd


def plan(option=BlockOption.RECOMPUTE, resident=(), reward=None):
    replayed = tuple(i for i in range(STEPS) if i not in resident)
    keep = StageChoice("batch", {"*": BlockOption.KEEP})
    return Plan(STEPS, resident, replayed, ({"*": option},) * len(resident), {"*": option}, keep, reward)


def an_optimizer_steps(pipe, scale):
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(trained, 0.1).step()


@torch.no_grad()
def a_base_weight_moves(pipe, scale):
    pipe.unet.conv_in.weight.mul_(1.1)


def adapters_move_elsewhere(pipe, scale):
    for parameter in pipe.unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 1


def a_checkpoint_is_loaded(pipe, scale):
    pipe.unet.load_state_dict({name: tensor + 1 for name, tensor in pipe.unet.state_dict().items()})


def an_adapter_is_turned_down(pipe, scale):
    pipe.unet.set_adapters(["default", "style"], [1.0, 0.1])


def adapters_are_switched_off(pipe, scale):
    pipe.unet.disable_adapters()


def adapters_are_fused(pipe, scale):
    pipe.fuse_lora()


@torch.no_grad()
def the_decoder_changes(pipe, scale):
    pipe.vae.decoder.conv_out.weight.add_(1)


@torch.no_grad()
def the_guidance_scale_steps(pipe, scale):
    scale.add_(1)


def freeu_is_switched_on(pipe, scale):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


CHANGES = [
    *(an_optimizer_steps, a_base_weight_moves, adapters_move_elsewhere, a_checkpoint_is_loaded),
    *(an_adapter_is_turned_down, adapters_are_switched_off, adapters_are_fused, freeu_is_switched_on),
    *(the_decoder_changes, the_guidance_scale_steps),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("resident", [(), (0, 1)])
def test_a_replay_finds_what_was_sampled_with(pipe, change, resident):
    scale = torch.tensor(4.0, requires_grad=True)
    images = DifferentiableSampler(pipe, STEPS, scale)(PROMPTS, plan=plan(resident=resident))
    change(pipe, scale)
    # The second message is autograd's own, for kept tensors.
    with pytest.raises(RuntimeError, match=r"or sample again|modified by an inplace operation"):
        images.sum().backward()


@pytest.mark.parametrize("stage", ["batch", "image"])
def test_a_decoder_that_changes_behind_a_chain_without_gradient_steps(pipe, stage):
    sampler = DifferentiableSampler(pipe, STEPS)
    latents = torch.randn(2, 4, *[side // pipe.vae_scale_factor for side in sampler.size], requires_grad=True)
    keep = StageChoice(stage, {"*": BlockOption.RECOMPUTE})
    images = sampler(PROMPTS, latents=latents, plan=Plan(STEPS, (), (), (), {"*": BlockOption.KEEP}, keep, None))
    images.mul_(2)  # as users may do
    the_decoder_changes(pipe, None)
    with pytest.raises(RuntimeError, match="sample again"):
        images.sum().backward()


def test_embeddings_that_are_not_copied(tiny_sd3):
    """SD3's embeddings reach the denoiser unchanged if there is one branch."""
    embeds, _, pooled, _ = tiny_sd3.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    texts = {"prompt_embeds": embeds[:, :8], "pooled_prompt_embeds": pooled}
    tiny_sd3.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    images = DifferentiableSampler(tiny_sd3, STEPS, 1.0)(PROMPTS, embeddings=texts)
    texts["pooled_prompt_embeds"].mul_(2)
    with pytest.raises(RuntimeError, match="sample again"):
        images.sum().backward()


def test_two_chains_wait_for_their_backward_passes(pipe):
    """As with gradient accumulation; the text encoder runs in between."""
    sampler = DifferentiableSampler(pipe, STEPS, eta=0.0)
    trained = sampler.model.trainable()
    noise = torch.randn(2, 4, *[side // pipe.vae_scale_factor for side in sampler.size])
    alone = []
    for prompt in PROMPTS:
        sampler(prompt, latents=noise[:1]).sum().backward()
        alone.append([parameter.grad.clone() for parameter in trained])
        for parameter in trained:
            parameter.grad = None
    first, second = (sampler(prompt, latents=noise[:1]) for prompt in PROMPTS)
    first.sum().backward()
    second.sum().backward()
    for parameter, one, other in zip(trained, *alone, strict=True):
        assert (parameter.grad - one - other).abs().max() <= 1e-5 * parameter.grad.abs().max()


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images, prompts, metadata):
        return (images * self.weight[:, None, None]).square().mean((1, 2, 3)), {}


@pytest.mark.parametrize("wrap", [lambda scorer: scorer, lambda scorer: WeightedSum([Part("own", 1.0, scorer, True)])])
def test_a_reward_that_is_scored_in_pieces(pipe, wrap):
    scorer = Scorer()
    sampler = DifferentiableSampler(pipe, STEPS, reward=wrap(scorer))
    for changed in (False, True):
        images = sampler(PROMPTS, plan=plan(reward=StageChoice("chunk:1", {})))
        scores, _ = sampler.score(images, PROMPTS, [{}, {}])
        if not changed:
            scores.sum().backward()
            continue
        with torch.no_grad():
            scorer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="sample again"):
            scores.sum().backward()
