"""Adapters of every kind: diffusers' loader restores from the file what PEFT adds in memory, or saving is refused."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from alignprop_fast.models.lean.quantization import quantize_linears
from alignprop_fast.models.lora.adapters import the_adapter, train_adapter
from alignprop_fast.models.lora.file import read_lora
from alignprop_fast.models.lora.kohya_file import KOHYA_NAME, save_kohya_lora
from alignprop_fast.models.lora.load_save import load_lora, save_lora
from alignprop_fast.models.lora.targets import denoiser

from ...adapters import draw_factors, factors_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": ATTENTION, **options})


def add(pipe, config, name="default"):
    """An adapter in the denoiser with random factors."""
    denoiser(pipe).add_adapter(config, name)
    draw_factors(factors_of(denoiser(pipe)))


def deltas(pipe, name):
    """What the adapter adds to each weight, by PEFT's own function, of factors in fp32."""
    found = {}
    for part, model in pipe.components.items():
        for path, layer in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(layer, BaseTunerLayer) and name in layer.scaling:
                layer.lora_A.float(), layer.lora_B.float()
                path = path.removeprefix("base_model.model.").removeprefix("text_model.")
                found[f"{part}.{path}"] = layer.get_delta_weight(name)
    return found


def assert_same(one, two):
    assert one.keys() == two.keys() and one
    for module in one:
        # fp32: sums of up to 16 products of order 1, and the scale before or after them.
        torch.testing.assert_close(two[module], one[module], rtol=1e-6, atol=2e-6, msg=module)
    assert any(delta.abs().max() > 1e-2 for delta in one.values())


@pytest.fixture(scope="module")
def loaded(tiny_sd_folder):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe


def fresh(pipe):
    """The same pipeline again, in a fraction of the time of loading."""
    networks = {
        name: copy.deepcopy(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
    }
    return type(pipe)(**{**pipe.components, **networks})


@pytest.fixture
def tiny_sd(loaded):
    """As the fixture of that name of all tests."""
    return fresh(loaded)


def style_and_reward(pipe):
    add(pipe, lora(r=2, target_modules=["to_q"]), "style")
    add(pipe, lora(r=3, lora_alpha=7), "reward")
    pipe.set_adapters(["style", "reward"], [0.7, 1.0])
    for name, parameter in pipe.unet.named_parameters():
        if ".style." in name:
            parameter.requires_grad_(False)


def with_text_encoder(pipe):
    add(pipe, lora(r=3, lora_alpha=7))
    # diffusers knows kohya's names of a text encoder by the output projection's
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "out_proj", "fc1"])
    pipe.text_encoder.add_adapter(config, "default")
    draw_factors(factors_of(pipe.text_encoder))


def weighted(pipe):
    add(pipe, lora(), "other")
    pipe.set_adapters("other", 0.3)


def weighted_by_block(pipe):
    add(pipe, lora(), "other")
    pipe.set_adapters("other", [{"unet": {"down": 0.2, "mid": 1.5, "up": 0.0}}])


def padded_for_hotswap(pipe):
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    add(pipe, lora(r=3, lora_alpha=7))
    prepare_model_for_compiled_hotswap(pipe.unet, target_rank=6, config=pipe.unet.peft_config)


def wrapped(pipe):
    pipe.unet = get_peft_model(pipe.unet, lora(lora_alpha=7))
    draw_factors(factors_of(pipe.unet))


def quantized(pipe):
    quantize_linears(pipe.unet, "int8", torch.device("cpu"), torch.float32, smallest=1)
    add(pipe, lora(lora_alpha=7))


def in_half_precision(pipe):
    add(pipe, lora(lora_alpha=7))
    for name, parameter in pipe.unet.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)


PATTERNS = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"to_k": 3.5, "attn2.to_out.0": 9}}
CARRIED = {
    "alpha": lambda pipe: add(pipe, lora(lora_alpha=12)),
    "rslora": lambda pipe: add(pipe, lora(r=16, use_rslora=True)),
    "patterns": lambda pipe: add(pipe, lora(**PATTERNS)),
    "patterns and rslora": lambda pipe: add(pipe, lora(**PATTERNS, use_rslora=True)),
    "convolutions": lambda pipe: add(pipe, lora(lora_alpha=7, target_modules=["conv1", "conv_shortcut", "conv_in"])),
    "a pattern as target": lambda pipe: add(pipe, lora(target_modules=r".*attn1.*to_(q|k)")),
    "all-linear": lambda pipe: add(pipe, lora(lora_alpha=7, target_modules="all-linear")),
    "excluded": lambda pipe: add(pipe, lora(exclude_modules=r"mid_block.*")),
    "layers": lambda pipe: add(pipe, lora(layers_to_transform=[1], layers_pattern="attentions")),
    "orthogonal": lambda pipe: add(pipe, lora(init_lora_weights="orthogonal")),
    "two adapters": style_and_reward,
    "a name that paths have": lambda pipe: add(pipe, lora(lora_alpha=7), "mid_block"),
    "a text encoder's beside": with_text_encoder,
    "weight": weighted,
    "weights by block": weighted_by_block,
    "padded rank": padded_for_hotswap,
    "PEFT's wrapper": wrapped,
    "quantised base": quantized,
    "bf16": in_half_precision,
}


@pytest.mark.parametrize("make", CARRIED.values(), ids=CARRIED)
def test_diffusers_makes_of_the_file_what_peft_adds(make, loaded, tiny_sd, tmp_path):
    make(tiny_sd)
    name = the_adapter(tiny_sd)
    save_lora(tiny_sd, tmp_path)
    other = fresh(loaded)
    other.load_lora_weights(tmp_path, adapter_name=name)
    assert_same(deltas(tiny_sd, name), deltas(other, name))
    read = {module.replace(".text_model.", "."): factors.delta() for module, factors in read_lora(tmp_path).items()}
    assert_same(deltas(other, name), read)


@pytest.mark.parametrize("make", CARRIED.values(), ids=CARRIED)
def test_diffusers_makes_of_kohyas_file_what_peft_adds(make, loaded, tiny_sd, tmp_path):
    make(tiny_sd)
    name = the_adapter(tiny_sd)
    save_kohya_lora(tiny_sd, tmp_path)
    other = fresh(loaded)
    other.load_lora_weights(tmp_path, weight_name=KOHYA_NAME, adapter_name=name)
    assert_same(deltas(tiny_sd, name), deltas(other, name))


@pytest.mark.parametrize(
    "model",
    [
        *("tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_chroma", "tiny_z_image", "tiny_flux2_klein", "tiny_qwen_image"),
        *("tiny_krea2", "tiny_lumina2", "tiny_sana"),
    ],
)
def test_of_other_models_too(model, request, tmp_path):
    pipe = request.getfixturevalue(model)
    other = fresh(pipe)
    add(pipe, lora(r=6, use_rslora=True, rank_pattern={"to_q": 2}), "reward")
    for part in set(pipe._lora_loadable_modules) & {"text_encoder", "text_encoder_2"}:
        encoder = pipe.components[part]
        if "CLIP" in type(encoder).__name__:
            encoder.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "text_projection"]), "reward")
            draw_factors(factors_of(encoder))
    save_lora(pipe, tmp_path)
    other.load_lora_weights(tmp_path, adapter_name="reward")
    assert_same(deltas(pipe, "reward"), deltas(other, "reward"))


def test_a_module_whose_name_ends_others(tiny_flux, tmp_path):
    """FLUX has its own proj_out besides the one in each block."""
    other = fresh(tiny_flux)
    add(tiny_flux, lora(r=3, lora_alpha=7, target_modules="proj_out"))
    save_lora(tiny_flux, tmp_path)
    other.load_lora_weights(tmp_path, adapter_name="default")
    assert set(deltas(tiny_flux, "default")) == {"transformer.proj_out"}
    assert_same(deltas(tiny_flux, "default"), deltas(other, "default"))


def fused(pipe):
    add(pipe, lora())
    pipe.fuse_lora()


def in_an_embedding(pipe):
    add(pipe, lora())
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["token_embedding"]), "default")


def with_tokens(pipe):
    add(pipe, lora())
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"token_embedding": [1, 2]})
    pipe.text_encoder.add_adapter(config, "default")


def in_another_part(pipe):
    add(pipe, lora())
    pipe.vae.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "default")


def style_of_pissa(pipe):
    add(pipe, lora(init_lora_weights="pissa"), "style")
    add(pipe, lora(), "reward")


REFUSED = {
    "pissa": (lambda pipe: add(pipe, lora(init_lora_weights="pissa")), "pissa.*changes the base model.*gaussian"),
    "pissa by iterations": (lambda pipe: add(pipe, lora(init_lora_weights="pissa_niter_2")), "changes the base model"),
    "olora": (lambda pipe: add(pipe, lora(init_lora_weights="olora")), "olora.*changes the base model"),
    "pissa of another adapter": (style_of_pissa, "'style' has init_lora_weights='pissa'"),
    "bias of adapters": (lambda pipe: add(pipe, lora(lora_bias=True)), "lora_bias in its LoraConfig.*make it without"),
    "bias of the base": (lambda pipe: add(pipe, lora(bias="lora_only")), "bias in its LoraConfig"),
    "dora": (lambda pipe: add(pipe, lora(use_dora=True)), "use_dora in its LoraConfig"),
    "modules to save": (lambda pipe: add(pipe, lora(modules_to_save=["conv_out"])), "modules_to_save in its"),
    "parameters": (lambda pipe: add(pipe, lora(target_parameters=["linear_1.weight"])), "target_parameters in its"),
    "tokens": (with_tokens, "trainable_token_indices in its LoraConfig"),
    "loha": (lambda pipe: add(pipe, LoHaConfig(target_modules=["to_q"])), "type LOHA.*use peft.LoraConfig"),
    "lokr": (lambda pipe: add(pipe, LoKrConfig(target_modules=["to_q"])), "type LOKR"),
    "adalora": (lambda pipe: add(pipe, AdaLoraConfig(target_modules=["to_q"], total_step=9)), "type ADALORA"),
    "fused": (fused, r"fused into the weights of unet \('default'\): call unfuse_lora"),
    "an embedding": (in_an_embedding, "lora_embedding_A in .*token_embedding"),
    "a part that diffusers does not load": (in_another_part, "is in vae, where diffusers loads no adapters"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_file_carries_is_refused_by_name(make, words, tiny_sd, tmp_path):
    make(tiny_sd)
    name = "reward" if "reward" in tiny_sd.unet.peft_config else "default"
    for refusing in (
        lambda: train_adapter(tiny_sd, name),
        lambda: save_lora(tiny_sd, tmp_path, adapter=name),
        lambda: save_kohya_lora(tiny_sd, tmp_path, adapter=name),
    ):
        with pytest.raises(ValueError, match=words):
            refusing()
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_takes_no_part_is_refused(tiny_sd):
    style_and_reward(tiny_sd)
    tiny_sd.set_adapters("style")
    with pytest.raises(ValueError, match=r"'reward' is not active.*set_adapters\(\['reward'"):
        train_adapter(tiny_sd, "reward")
    tiny_sd.set_adapters(["style", "reward"], [1.0, 0.0])
    with pytest.raises(ValueError, match="'reward' has weight 0"):
        train_adapter(tiny_sd, "reward")
    tiny_sd.set_adapters(["style", "reward"])
    tiny_sd.disable_lora()
    with pytest.raises(ValueError, match=r"adapters of unet are switched off.*enable_lora"):
        train_adapter(tiny_sd, "reward")


def test_a_text_encoders_part_that_takes_no_part_is_refused(tiny_sd):
    with_text_encoder(tiny_sd)
    tiny_sd.text_encoder.disable_adapters()
    with pytest.raises(ValueError, match="adapters of text_encoder are switched off"):
        train_adapter(tiny_sd)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd3"])
def test_attention_that_goes_past_its_adapters_is_refused(model, request):
    pipe = request.getfixturevalue(model)
    add(pipe, lora())
    pipe.fuse_qkv_projections() if model == "tiny_sd" else pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call unfuse_qkv_projections\(\)"):
        train_adapter(pipe)


def test_one_of_several_is_chosen_by_gradient_or_by_name(tiny_sd, tmp_path):
    style_and_reward(tiny_sd)
    assert the_adapter(tiny_sd) == "reward" and the_adapter(tiny_sd, "style") == "style"
    with pytest.raises(ValueError, match=r"no adapter 'rewrad': choose one of 'reward', 'style'"):
        the_adapter(tiny_sd, "rewrad")
    tiny_sd.set_adapters(["style", "reward"])  # which lets both require grad
    with pytest.raises(ValueError, match=r"'reward', 'style' require grad: choose one"):
        save_lora(tiny_sd, tmp_path)
    tiny_sd.unet.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'reward', 'style' exist and none requires grad: choose one"):
        the_adapter(tiny_sd)
    train_adapter(tiny_sd, "reward")
    learning = {n for n, p in tiny_sd.unet.named_parameters() if p.requires_grad}
    assert learning and all(".reward." in name for name in learning)
    assert set(tiny_sd.get_active_adapters()) == {"style", "reward"}


def test_one_of_another_kind_is_found_and_refused(tiny_sd):
    add(tiny_sd, lora(target_modules=["to_q"]), "style")
    tiny_sd.unet.requires_grad_(False)
    tiny_sd.unet.add_adapter(LoHaConfig(target_modules=["to_k"]), "reward")
    with pytest.raises(ValueError, match="'reward' has PEFT's type LOHA"):
        train_adapter(tiny_sd)


def test_a_frozen_adapter_alone_is_not_trained(tiny_sd):
    add(tiny_sd, lora(), "style")
    tiny_sd.unet.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'style' does not require grad: name it"):
        train_adapter(tiny_sd)
    assert train_adapter(tiny_sd, "style") == "style"


def test_values_are_overwritten_in_place_and_nothing_else(tiny_sd, tmp_path):
    """A checkpoint's file loads into the trained adapter; a file with another scale fits no adapter."""
    style_and_reward(tiny_sd)
    save_lora(tiny_sd, tmp_path)
    expected = {name: p.detach().clone() for name, p in tiny_sd.unet.named_parameters()}
    with torch.no_grad():
        for name, parameter in tiny_sd.unet.named_parameters():
            if ".reward." in name:
                parameter.add_(1)
    load_lora(tiny_sd, tmp_path)
    assert all(torch.equal(p, expected[name]) for name, p in tiny_sd.unet.named_parameters())
    tiny_sd.set_adapters(["style", "reward"], [1.0, 1.0001])
    with pytest.raises(ValueError, match="another rank, scale or other modules"):
        load_lora(tiny_sd, tmp_path, "reward")
