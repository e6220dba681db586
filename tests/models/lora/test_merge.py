"""Mixed LoRA files: the same function as weights mixed by hand, and the reported error against the direct one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_fast.models.lora.factors import Factors
from alignprop_fast.models.lora.file import WEIGHTS_NAME, lora_content, lora_file, read_lora
from alignprop_fast.models.lora.load_save import save_lora
from alignprop_fast.models.lora.merge import merge_loras
from alignprop_fast.models.lora.mix import load_loras, set_lora_weights

from ...adapters import draw_factors, factors_of

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")


def made(folder, pipe_folder, seed, rank, alpha, targets=ATTENTION):
    """A LoRA folder with random factors: as `train` writes it or, with places of our choice, in PEFT's naming."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(pipe_folder, local_files_only=True)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    draw_factors(factors_of(pipe.unet), seed=seed)
    if targets is ATTENTION:
        save_lora(pipe, folder)
    else:
        state = get_peft_model_state_dict(pipe.unet, adapter_name="default")
        config = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": list(targets)}
        folder.mkdir()
        tensors = {f"unet.{name}": tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS_NAME, {"lora_adapter_metadata": json.dumps(config)})
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_sd_folder):
    """Two adapters with different ranks, scales and places: only the second has convolutions, only the first `to_q`."""
    folder = tmp_path_factory.mktemp("adapters")
    first = made(folder / "first", tiny_sd_folder, 1, 4, 8)
    second = made(folder / "second", tiny_sd_folder, 2, 3, 3, ("to_k", "to_v", "to_out.0", "conv1", "proj_in"))
    return first, second


def merge(folder, loras, rank=None):
    merged = merge_loras([(read_lora(path), weight) for path, weight in loras], rank)
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS_NAME).write_bytes(lora_content(merged.factors))
    return merged


def by_hand(path):
    """{module: alpha / rank * B A} from the tensors and the header's plain numbers, without the code under test."""
    from safetensors import safe_open

    with safe_open(path / WEIGHTS_NAME, framework="pt") as stream:
        config = json.loads(stream.metadata()["lora_adapter_metadata"])
    scale = config["unet.lora_alpha"] / config["unet.r"]
    deltas: dict = {}
    for key, tensor in load_file(path / WEIGHTS_NAME).items():
        name, _, kind = key.removeprefix("unet.").partition(".lora")
        deltas.setdefault(name, {})["a" if kind in ("_A.weight", ".down.weight") else "b"] = tensor
    products = {name: (pair["a"], pair["b"]) for name, pair in deltas.items()}
    return {name: scale * torch.einsum("or...,r...->o...", b.flatten(1), a) for name, (a, b) in products.items()}


def prediction(unet):
    generator = torch.Generator().manual_seed(3)
    x_BCHW = torch.randn(1, 4, 8, 8, generator=generator)
    text_BLC = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(x_BCHW, 500, text_BLC, return_dict=False)[0]


def with_weights(unet, mixture):
    """The prediction of a UNet whose weights have moved by sum weight * delta."""
    for deltas, weight in mixture:
        for name, delta in deltas.items():
            module = unet.get_submodule(name)
            module.weight.data += weight * delta
    return prediction(unet)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.7), (0.7, 0.0)])
def test_the_merged_file_is_the_linear_mix_of_weights(adapters, tiny_sd, tiny_sd_folder, tmp_path, weights):
    from diffusers import StableDiffusionPipeline

    merged = merge(tmp_path / "merged", list(zip(adapters, weights, strict=True)))
    assert merged.relative_error == 0
    plain = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True).unet
    base = prediction(plain)
    expected = with_weights(plain, list(zip(map(by_hand, adapters), weights, strict=True)))
    tiny_sd.load_lora_weights(tmp_path / "merged")
    # fp32 through two orders of summation; the mix moves the prediction ten thousand times as far.
    torch.testing.assert_close(prediction(tiny_sd.unet), expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.1


def test_one_adapter_is_scaled_toward_the_base_model(adapters, tiny_sd, tmp_path):
    merge(tmp_path / "merged", [(adapters[0], 0.7)])
    names = load_loras(tiny_sd, [adapters[0], tmp_path / "merged"])
    base = prediction(tiny_sd.unet)
    set_lora_weights(tiny_sd, {names[0]: 0.7})
    expected = prediction(tiny_sd.unet)
    set_lora_weights(tiny_sd, {names[1]: 1.0})
    torch.testing.assert_close(prediction(tiny_sd.unet), expected, rtol=1e-5, atol=1e-5)
    set_lora_weights(tiny_sd, {})
    assert torch.equal(prediction(tiny_sd.unet), base) and not torch.allclose(base, expected, atol=1e-2)


def test_weights_in_one_pipeline_are_the_merged_file(adapters, tiny_sd, tiny_sd_folder, tmp_path):
    """Pictures along a path are drawn with both adapters at once, also at places that one lacks."""
    from diffusers import StableDiffusionPipeline

    merge(tmp_path / "merged", [(adapters[0], 0.25), (adapters[1], 0.75)])
    names = load_loras(tiny_sd, adapters)
    set_lora_weights(tiny_sd, {names[0]: 0.25, names[1]: 0.75})
    other = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    other.load_lora_weights(tmp_path / "merged")
    torch.testing.assert_close(prediction(tiny_sd.unet), prediction(other.unet), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5, 100])
def test_the_reported_error_is_the_direct_one(adapters, rank):
    loras = [(read_lora(adapters[0]), 0.6), (read_lora(adapters[1]), 0.4)]
    whole, cut = merge_loras(loras).factors, merge_loras(loras, rank)
    lost = {name: float((whole[name].delta() - cut.factors[name].delta()).norm()) for name in whole}
    norms = {name: float(whole[name].delta().norm()) for name in whole}
    for name, error in cut.errors.items():
        # The stored factors are fp32; the error is computed in fp64.
        assert error == pytest.approx(lost[name] / norms[name], rel=1e-4, abs=1e-6)
        assert cut.factors[name].rank == min(rank, whole[name].rank)
        best = torch.linalg.svdvals(whole[name].delta().flatten(1))[rank:].norm()
        assert lost[name] == pytest.approx(float(best), rel=1e-4, abs=1e-4), "a nearer matrix of that rank exists"
    in_all = sum(value**2 for value in lost.values()) ** 0.5 / sum(value**2 for value in norms.values()) ** 0.5
    assert cut.relative_error == pytest.approx(in_all, rel=1e-4, abs=1e-6)
    assert cut.relative_error > 0.05 if rank < 4 else cut.relative_error >= 0


def test_a_refactored_file_loads_with_the_scale_that_it_was_made_for(adapters, tiny_sd, tmp_path):
    """Ranks differ between modules here (3, 4 and 5), so the header's patterns have to be right."""
    cut = merge(tmp_path / "cut", [(adapters[0], 1.0), (adapters[1], 1.0)], rank=5)
    assert {factors.rank for factors in cut.factors.values()} == {3, 4, 5}
    expected = with_weights(
        tiny_sd.unet, [({name.removeprefix("unet."): f.delta() for name, f in cut.factors.items()}, 1.0)]
    )
    for name, factors in cut.factors.items():
        tiny_sd.unet.get_submodule(name.removeprefix("unet.")).weight.data -= factors.delta()
    tiny_sd.load_lora_weights(tmp_path / "cut")
    torch.testing.assert_close(prediction(tiny_sd.unet), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fields, scale", [({}, 1.0), ({"lora_alpha": 6}, 3.0), ({"use_rslora": True}, 2**0.5)])
def test_scale_of_a_file(tmp_path, fields, scale):
    """Without alpha the scale is 1, as in diffusers."""
    tensors = {"unet.a.to_q.lora_A.weight": torch.randn(2, 8), "unet.a.to_q.lora_B.weight": torch.randn(6, 2)}
    config = json.dumps({f"unet.{key}": value for key, value in fields.items()})
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": config} if fields else None)
    delta = tensors["unet.a.to_q.lora_B.weight"] @ tensors["unet.a.to_q.lora_A.weight"]
    read = read_lora(tmp_path / "x.safetensors")["unet.a.to_q"]
    torch.testing.assert_close(read.delta(), scale * delta)


def test_scale_by_pattern(tmp_path):
    names = ("mid.to_q", "x.mid.to_q", "mid.to_k")
    tensors = {f"unet.{name}.lora_{ab}.weight": torch.ones(2, 2) for name in names for ab in "AB"}
    config = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"^mid.to_q": 4, "to_k": 8}}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    read = read_lora(tmp_path / "x.safetensors")
    assert [float(read[f"unet.{name}"].scaled_up()[0, 0]) for name in names] == [2, 1, 4]


def square(size=4, rank=2):
    return Factors(torch.ones(rank, size), torch.ones(size, rank))


@pytest.mark.parametrize(
    ("loras", "rank", "match"),
    [
        ([({"a": square()}, 1.0), ({"b": square()}, 1.0)], None, "no module in common"),
        ([({"a": square()}, 1.0), ({"a": square(5)}, 1.0)], None, "a has 4 x 4 weights in one adapter and 5 x 5"),
        ([({"a": square()}, 0.0)], None, "every weight is 0"),
        ([({"a": square()}, float("nan"))], None, "not all finite"),
        ([({"a": square()}, 1.0)], 0, "at least 1"),
    ],
)
def test_refused_mixtures(loras, rank, match):
    with pytest.raises(ValueError, match=match) as caught:
        merge_loras(loras, rank)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "config", "match"),
    [
        ({"unet.conv.weight": torch.ones(2, 2)}, "{}", "no LoRA factor"),
        ({"a.lora_A.weight": torch.ones(2, 2), "a.alpha": torch.ones(1)}, "{}", "the LoRA factor up is missing"),
        ({"a.lora_A.weight": torch.ones(2, 3)}, "{}", "do not fit each other"),
        ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 4)}, "{}", "do not fit each other"),
        ({"a.lora_A.weight": torch.ones(2, 3) / 0, "a.lora_B.weight": torch.ones(3, 2)}, "{}", "not finite"),
        ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}, "{", "are damaged"),
        (
            {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)},
            '{"unet.use_dora": true}',
            "is a DoRA",
        ),
    ],
)
def test_refused_files(tmp_path, tensors, config, match):
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(ValueError, match=match) as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_missing_damaged_and_foreign_files(adapters, tiny_sd, tmp_path):
    with pytest.raises(FileNotFoundError, match="give a LoRA file"):
        lora_file(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes((adapters[0] / WEIGHTS_NAME).read_bytes()[:-5])
    for read in (read_lora, lambda path: load_loras(tiny_sd, [path])):
        with pytest.raises(ValueError, match="damaged"):
            read(tmp_path)
    place = "unet.mid_block.attentions.0.proj_in"
    for name in (place, "unet.mid_block.attentions.7.proj_in", "x"):  # another shape, another depth, no layer
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 3), f"{name}.lora_B.weight": torch.ones(3, 2)}
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="do not fit this model"):
            load_loras(tiny_sd, [tmp_path / "x.safetensors"])
