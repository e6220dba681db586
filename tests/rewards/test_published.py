"""PickScore, HPS v2, ImageReward and the aesthetic predictors, loaded from files in their published form."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD

from . import published

PROMPTS = ["red cat", "a dog, drawn", "the " * 200]
WORDS = ["[PAD]", *(f"[unused{number}]" for number in range(4)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += [*"abcdefghijklmnopqrstuvwxyz,", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"), "cat", "the"]


@dataclass(frozen=True)
class Case:
    """A published scorer in a folder: its name, the weights file (None: all of the folder), and what it must give."""

    name: str
    folder: Path
    weights: Path | None
    expected: Callable[[Tensor], Tensor]  # images -> scores for PROMPTS


def _pixels(images_BCHW: Tensor, edge: int, clip: bool = True) -> Tensor:
    """CLIP's preprocessing of square images by the plain formula; clip: after each direction, as in PIL."""
    for size in ((images_BCHW.shape[-2], edge), (edge, edge)):
        images_BCHW = F.interpolate(images_BCHW, size=size, mode="bicubic", antialias=True)
        images_BCHW = images_BCHW.clamp(0, 1) if clip else images_BCHW
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images_BCHW - mean_C11) / std_C11


def _pickscore(tmp: Path, clip_folder: Path, tokenizer_folder: Path) -> Case:
    def expected(images_BCHW: Tensor) -> Tensor:
        from transformers import AutoTokenizer, CLIPModel

        model, tokenizer = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
        tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return model(**tokens, pixel_values=_pixels(images_BCHW, 48)).logits_per_image.diagonal()

    shutil.copytree(clip_folder, tmp / "pickscore")
    return Case("pickscore", tmp / "pickscore", None, expected)


def _hpsv2(tmp: Path, clip_folder: Path, tokenizer_folder: Path) -> Case:
    from transformers import AutoTokenizer

    folder = tmp / "hpsv2"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = published.open_clip_state(len(tokenizer))
    save_file(state, folder / "HPS_v2.1_compressed.safetensors")
    ids_BL = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")["input_ids"]

    def expected(images_BCHW: Tensor) -> Tensor:
        return published.open_clip_cosine(state, _pixels(images_BCHW, 28, clip=False), ids_BL)

    return Case("hpsv2", folder, folder / "HPS_v2.1_compressed.safetensors", expected)


def _imagereward(tmp: Path, clip_folder: Path, tokenizer_folder: Path) -> Case:
    from transformers import BertTokenizer

    folder = tmp / "imagereward"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    state = published.imagereward_state(len(WORDS) + 2)  # two marks that scoring never uses
    save_file(state, folder / "ImageReward.safetensors")
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert len(set(tokens["input_ids"].flatten().tolist())) > 8  # words of the vocabulary, not [UNK] alone

    def expected(images_BCHW: Tensor) -> Tensor:
        arguments = (_pixels(images_BCHW, 32), tokens["input_ids"], tokens["attention_mask"])
        return published.imagereward_score(state, *arguments)

    return Case("imagereward", folder, folder / "ImageReward.safetensors", expected)


def _aesthetic(version: int) -> Callable[[Path, Path, Path], Case]:
    def make(tmp: Path, clip_folder: Path, tokenizer_folder: Path) -> Case:
        folder = tmp / f"aesthetic{version}"
        shutil.copytree(clip_folder, folder)
        names = {1: "sa_0_4_vit_l_14_linear", 2: "sac+logos+ava1-l14-linearMSE"}
        linear = {"weight": torch.linspace(-1, 1, 32)[None], "bias": torch.tensor([5.0])}
        state = linear if version == 1 else published.head_state(32, prefix="")
        save_file(state, folder / f"{names[version]}.safetensors")

        def expected(images_BCHW: Tensor) -> Tensor:
            from transformers import CLIPModel

            model = CLIPModel.from_pretrained(clip_folder)
            pooled_BC = model.vision_model(pixel_values=_pixels(images_BCHW, 48)).pooler_output
            embeddings_BE = model.visual_projection(pooled_BC)
            embeddings_BE = embeddings_BE / embeddings_BE.norm(dim=-1, keepdim=True)
            if version == 1:
                return F.linear(embeddings_BE, state["weight"], state["bias"]).squeeze(-1)
            return published.head_score(state, embeddings_BE)

        return Case("aesthetic", folder, folder / f"{names[version]}.safetensors", expected)

    return make


MAKERS = {
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
    "aesthetic v1": _aesthetic(1),
    "aesthetic v2": _aesthetic(2),
}


@pytest.fixture(scope="module", params=MAKERS)
def case(request, tmp_path_factory, clip_folder, tiny_sd_folder) -> Case:
    return MAKERS[request.param](tmp_path_factory.mktemp("published"), clip_folder, tiny_sd_folder / "tokenizer")


def test_scores_equal_the_reference(case, pictures):
    images = pictures("demo", 64)[:3]
    with torch.no_grad():
        expected = case.expected(images)
    scores, info = get_reward(case.name, model=case.folder)(images, PROMPTS, [None] * 3)
    # fp32 through a few layers, on scores of up to about 5; without the scale's digits PickScore has 100 times that.
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-4 and list(info) == [case.name]


def test_gradient_is_the_directional_derivative_and_reaches_no_weight(case, pictures):
    reward = get_reward(case.name, model=case.folder)
    (module,) = (part.reward.double() for part in reward.parts)
    images = pictures("photos", 64)[:3].double().requires_grad_()
    module(images, PROMPTS, [None] * 3)[0].sum().backward()
    parameters = list(module.parameters())
    assert parameters and not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    direction = images.grad / images.grad.norm()
    with torch.no_grad():
        ahead, behind = (module(images + sign * 1e-4 * direction, PROMPTS, [None] * 3)[0].sum() for sign in (1, -1))
    # Float64 throughout: the error is that of the difference quotient, and of pixels clipped on the way.
    assert ((ahead - behind) / 2e-4).item() == pytest.approx(images.grad.norm().item(), rel=1e-3)


def test_two_runs_are_bit_equal(case, pictures):
    images = pictures("demo", 64)[:3]
    found = []
    for _ in range(2):
        x = images.clone().requires_grad_()
        scores, _ = get_reward(case.name, model=case.folder)(x, PROMPTS, [None] * 3)
        found.append((scores.detach(), *torch.autograd.grad(scores.sum(), x)))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_half_precision_weights_give_fp32_scores(case, pictures):
    images = pictures("demo", 64)[:3]
    exact, _ = get_reward(case.name, model=case.folder)(images, PROMPTS, [None] * 3)
    x = images.bfloat16().requires_grad_()
    reward = get_reward(case.name, model=case.folder, dtype=torch.bfloat16)
    assert torch.bfloat16 in {parameter.dtype for part in reward.parts for parameter in part.reward.parameters()}
    scores, _ = reward(x, PROMPTS, [None] * 3)
    scores.sum().backward()
    assert scores.dtype == torch.float32 and x.grad is not None and x.grad.isfinite().all()
    # bf16 has 8 bits: 1/256 a rounding, some tens of them. Scores of PickScore are 100 cosines.
    scale = 100 if case.name == "pickscore" else 1
    assert (scores - exact).abs().max() < 0.05 * scale


def _damage(case: Case, tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "copy"
    shutil.copytree(case.folder, folder)
    return folder, folder / (case.weights.name if case.weights else "model.safetensors")


def test_pickled_weights_are_read_only_where_allowed(case, pictures, tmp_path):
    from safetensors.torch import load_file

    folder, weights = _damage(case, tmp_path)
    state = load_file(weights)
    weights.unlink()
    pickled = folder / ("pytorch_model.bin" if case.weights is None else weights.with_suffix(".pt").name)
    torch.save({"state_dict": state} if case.name == "hpsv2" else state, pickled)
    with pytest.raises(ValueError, match=r"is a pickle.*--allow-pickle") as caught:
        get_reward(case.name, model=folder)
    assert "\n" not in str(caught.value) and str(pickled) in str(caught.value)
    images = pictures("demo", 64)[:3]
    found, _ = get_reward(case.name, model=folder, allow_pickle=True)(images, PROMPTS, [None] * 3)
    expected, _ = get_reward(case.name, model=case.folder)(images, PROMPTS, [None] * 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # where weights lie decides how sums are split


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_pickled_is_never_run(case, tmp_path):
    folder, weights = _damage(case, tmp_path)
    weights.unlink()
    pickled = folder / ("pytorch_model.bin" if case.weights is None else weights.with_suffix(".pt").name)
    torch.save({"state_dict": _Trap(tmp_path / "sprung")}, pickled)
    with pytest.raises(OSError) as caught:
        get_reward(case.name, model=folder, allow_pickle=True)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def _rename(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if name.endswith("bias"))
    state[f"another_{name}"] = state.pop(name)


def _shorten(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if name.endswith("bias"))
    state[name] = torch.zeros(len(state[name]) + 1)


def _drop(state: dict[str, Tensor]) -> None:
    del state[next(name for name in state if name.endswith("weight"))]


@pytest.mark.parametrize("fault", [_rename, _shorten, _drop])
def test_other_weights_are_refused_in_one_line(case, tmp_path, fault):
    from safetensors.torch import load_file

    folder, weights = _damage(case, tmp_path)
    state = load_file(weights)
    fault(state)
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(OSError) as caught:
        get_reward(case.name, model=folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert re.search("is not|does not contain|lacks|cannot load", str(caught.value))


def test_the_weights_file_itself_can_be_given(case, pictures, tmp_path):
    if case.weights is None:
        pytest.skip("a transformers folder as a whole")
    folder, weights = _damage(case, tmp_path)
    own = weights.rename(folder / "of_any_name.safetensors")
    images = pictures("demo", 64)[:3]
    found, _ = get_reward(case.name, model=[f"{case.name}={own}"])(images, PROMPTS, [None] * 3)
    torch.testing.assert_close(found, get_reward(case.name, model=case.folder)(images, PROMPTS, [None] * 3)[0])


def test_missing_files_are_named(case, tmp_path):
    folder, weights = _damage(case, tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match=re.escape(str(folder))) as caught:
        get_reward(case.name, model=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "source"), [("hpsv2", "openai/clip"), ("imagereward", "google-bert/bert-base")])
def test_a_missing_tokenizer_is_named(name, source, tmp_path):
    state = published.open_clip_state(600) if name == "hpsv2" else published.imagereward_state(600)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=f"no tokenizer .tokenizer.json.; copy .* of {source}"):
        get_reward(name, model=tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_another_models_tokenizer_is_refused(name, tmp_path, tiny_sd_folder):
    shutil.copytree(tiny_sd_folder / "tokenizer", tmp_path / "folder")
    state = published.open_clip_state(100) if name == "hpsv2" else published.imagereward_state(100)
    save_file(state, tmp_path / "folder" / "weights.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer in .* has 5\d\d words and the network 100: copy that of"):
        get_reward(name, model=tmp_path / "folder" / "weights.safetensors")


def test_hpsv2_pads_to_a_square_as_published(tmp_path, clip_folder, tiny_sd_folder, pictures):
    """The longer edge to 28, black on both sides, the odd pixel below."""
    case = _hpsv2(tmp_path, clip_folder, tiny_sd_folder / "tokenizer")
    (part,) = get_reward("hpsv2", model=case.folder).parts
    images = pictures("photos", 256)[:2, :, :200]
    found = part.reward.preprocess(images)
    resized = F.interpolate(images, size=(22, 28), mode="bicubic", antialias=True)
    assert resized.min() < 0 or resized.max() > 1
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(found, (F.pad(resized, (0, 0, 3, 3)) - mean_C11) / std_C11, rtol=0, atol=1e-5)


def test_hpsv2_equals_open_clip(tmp_path, clip_folder, tiny_sd_folder, pictures):
    open_clip = pytest.importorskip("open_clip", reason="the optional open_clip_torch is not installed")
    case = _hpsv2(tmp_path, clip_folder, tiny_sd_folder / "tokenizer")
    state = published.open_clip_state(len(part_tokenizer := _tokenizer(case.folder)))
    vision = {"image_size": 28, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14, "mlp_ratio": 2.0}
    text = {"context_length": 77, "vocab_size": len(part_tokenizer), "width": 128, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg={**text, "mlp_ratio": 2.0}).eval()
    model.load_state_dict(state)
    images = pictures("demo", 64)[:3]
    ids_BL = part_tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        image_BE, text_BE, _ = model(_pixels(images, 28, clip=False), ids_BL["input_ids"])
    scores, _ = get_reward("hpsv2", model=case.folder)(images, PROMPTS, [None] * 3)
    torch.testing.assert_close(scores, (image_BE * text_BE).sum(-1), rtol=0, atol=1e-5)


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
