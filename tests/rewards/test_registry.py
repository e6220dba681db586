"""Names of rewards, weighted sums, users' own functions, and the messages about errors in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignprop_fast.rewards import get_reward, reward_names

ONE = ([""], [None])
USER_MODULE = """
import helper_beside_it

def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) * helper_beside_it.GAIN

def with_info(images, prompts, metadata):
    return brightness(images, prompts, metadata), {"anything": 1}

def tells_more(images, prompts, metadata):
    return brightness(images, prompts, metadata), {
        "anything": 2, "largest": images.amax((1, 2, 3)), "colorfulness": images.amin((1, 2, 3))
    }

def one_number(images, prompts, metadata):
    return images.mean()

def column(images, prompts, metadata):
    return images.mean((1, 2, 3))[:, None]

def a_list(images, prompts, metadata):
    return [1.0] * len(images)

def no_gradient(images, prompts, metadata):
    return images.detach().mean((1, 2, 3))

not_a_function = 3
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A working directory with `my_rewards.py`, what it imports, and two modules that cannot be imported."""
    (tmp_path / "my_rewards.py").write_text(USER_MODULE)
    (tmp_path / "helper_beside_it.py").write_text("GAIN = 2.0\n")
    (tmp_path / "half_written.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in ("my_rewards", "helper_beside_it", "half_written", "needs_more"):
        sys.modules.pop(name, None)


def test_names():
    assert reward_names() == [
        *("aesthetic", "clip", "colorfulness", "compressibility", "count", "hpsv2", "imagereward"),
        *("incompressibility", "pickscore", "remove"),
    ]


def test_weighted_sum_and_its_info(pictures):
    images = pictures("demo", 64)[:3].requires_grad_()
    arguments = (images, [""] * 3, [None] * 3)
    scores, info = get_reward("compressibility:0.3, colorfulness:-2e-2")(*arguments)
    compressibility, _ = get_reward("compressibility")(*arguments)
    colorfulness, _ = get_reward("colorfulness:1")(*arguments)
    torch.testing.assert_close(scores, 0.3 * compressibility - 0.02 * colorfulness)
    assert list(info) == ["compressibility", "colorfulness"]
    assert torch.equal(info["compressibility"], compressibility)
    assert scores.requires_grad and not any(part.requires_grad for part in info.values())
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    (expected,) = torch.autograd.grad((0.3 * compressibility - 0.02 * colorfulness).sum(), images)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("spec", "factor"), [("my_rewards:brightness", 2), ("my_rewards:with_info:0.25", 0.5)])
def test_a_function_in_the_working_directory(user_folder, spec, factor):
    images = torch.rand(4, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    scores, info = get_reward(spec)(images, [""] * 4, [None] * 4)
    torch.testing.assert_close(scores, factor * images.detach().mean((1, 2, 3)).float(), rtol=1e-2, atol=0)
    assert scores.dtype == torch.float32 and scores.requires_grad
    own = ["anything"] if "with_info" in spec else []
    assert list(info) == [":".join(spec.split(":")[:2]), *own]


def test_an_installed_function_mixes_with_a_named_reward(user_folder):
    scores, info = get_reward("my_rewards:brightness,colorfulness")(torch.rand(1, 3, 8, 8), *ONE)
    torch.testing.assert_close(scores, info["my_rewards:brightness"] + info["colorfulness"])


def test_what_rewards_tell_about_themselves_is_kept(user_folder):
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    spec = "my_rewards:with_info,my_rewards:tells_more,colorfulness:0.5"
    _, info = get_reward(spec)(images, [""] * 2, [None] * 2)
    assert list(info)[:3] == ["my_rewards:with_info", "my_rewards:tells_more", "colorfulness"]
    assert info["my_rewards:with_info/anything"] == 1  # two parts have this key
    assert info["my_rewards:tells_more/anything"] == 2
    assert torch.equal(info["largest"], images.detach().amax((1, 2, 3)))
    assert not info["largest"].requires_grad
    assert not torch.equal(info["my_rewards:tells_more/colorfulness"], info["colorfulness"])  # a part is called so
    assert len(info) == 7


@pytest.mark.parametrize(
    ("spec", "head", "argument", "weight"),
    [
        ("count:apple=3", "Count", 3, 1.0),
        ("count:apple=3:0.5", "Count", 3, 0.5),
        ("count: apple = 0 :-1", "Count", 0, -1.0),
        ("remove:cat:2", "Remove", None, 2.0),
    ],
)
def test_arguments_and_weights(spec, head, argument, weight):
    (part,) = get_reward(spec).parts
    assert (type(part.reward).__name__, getattr(part.reward, "number", None), part.weight) == (head, argument, weight)


def test_several_models_are_told_apart_by_name(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "a=b")
    reward = get_reward(
        "clip,pickscore:0.1,colorfulness", model=[f"pickscore={tmp_path / 'a=b'}", f"clip={clip_folder}"]
    )
    assert [type(part.reward).__name__ for part in reward.parts] == ["ClipScore", "PickScore", "Colorfulness"]
    get_reward("clip", model=tmp_path / "a=b")  # a path may hold the sign


@pytest.mark.parametrize(
    ("spec", "models", "message"),
    [
        ("clip,pickscore", ["x"], "which of clip, pickscore is x for. Give it as NAME=PATH"),
        ("clip,pickscore", ["clip=x", "clip=y"], "two models were given for the reward 'clip'"),
        ("clip", ["pickscore=x"], "nothing in 'clip' uses pickscore"),
        ("count:apple=1,remove:cat", ["x"], "which of count, remove"),
        ("hpsv2", [], "'hpsv2' needs its published weights: give --reward-model hpsv2=PATH"),
    ],
)
def test_models_that_do_not_fit_are_refused_in_one_line(spec, models, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_reward(spec, model=models)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("colourfulness", "no reward 'colourfulness'; did you mean 'colorfulness'.*aesthetic, clip, colorfulness"),
        ("beauty:0.5", "no reward 'beauty'. Rewards by name: aesthetic, clip"),
        ("", "empty part"),
        ("clip,", "empty part"),
        ("colorfulness:nan", "weight of reward 'colorfulness:nan' is not a finite number"),
        ("colorfulness:1,colorfulness:2", "'colorfulness' twice"),
        ("colorfulness:cat:2", "'colorfulness:cat' must be written 'colorfulness'"),
        ("count", "'count' must be written 'count:CLASS=N' .and :WEIGHT"),
        ("count:apple", "must be written KIND=N, for example count:apple=3, not 'apple'"),
        ("count:apple=many", "must be written KIND=N"),
        ("count:=3", "must be written KIND=N"),
        ("remove", "'remove' must be written 'remove:CLASS'"),
        ("remove:zebra", "bundled counter does not know 'zebra', only apple, banana"),
        ("clip:", "'clip:' must be written 'clip'"),
        ("no_such_module:f", "no module 'no_such_module' in .* nor installed. Rewards by name"),
        ("my_rewards:missing", "'missing' does not exist in .*my_rewards.py"),
        ("my_rewards:not_a_function", "'not_a_function' is not a function in"),
        ("my_rewards:", "'' does not exist"),
        (":f", "importing '' failed with ValueError: Empty module name"),
        ("half_written:f", "importing 'half_written' failed with SyntaxError"),
        ("needs_more:f", "importing 'needs_more' failed with .*a_package_that_nobody_has"),
    ],
)
def test_wrong_specifications_are_named_in_one_line(user_folder, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_model_that_nothing_uses_is_refused():
    with pytest.raises(ValueError, match="nothing in 'colorfulness' uses one"):
        get_reward("colorfulness", model="somewhere")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("one_number", r"shape \[4\], one score per image.*returned a float32 tensor of shape \[\]"),
        ("column", r"returned a float32 tensor of shape \[4, 1\]"),
        ("a_list", "returned a list"),
        ("no_gradient", "scores without gradient"),
    ],
)
def test_what_a_users_reward_returns_is_checked(user_folder, function, message):
    reward = get_reward(f"my_rewards:{function}")
    with pytest.raises(ValueError, match=message) as caught:
        reward(torch.rand(4, 3, 8, 8, requires_grad=True), [""] * 4, [None] * 4)
    assert "\n" not in str(caught.value)
    assert f"my_rewards:{function}" in str(caught.value)


def test_scores_without_gradient_will_do_for_evaluation(user_folder):
    with torch.no_grad():
        get_reward("my_rewards:no_gradient")(torch.rand(1, 3, 8, 8, requires_grad=True), *ONE)


def test_images_and_prompts_are_checked():
    reward = get_reward("colorfulness")
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], not a float32 tensor of shape \[3, 8, 8\]"):
        reward(torch.rand(3, 8, 8), *ONE)
    with pytest.raises(ValueError, match="one prompt per image, not 1 for 2"):
        reward(torch.rand(2, 3, 8, 8), *ONE)


def test_listing_and_building_weightless_rewards_imports_no_model_library():
    code = (
        "import sys; from alignprop_fast.rewards import get_reward; get_reward('compressibility,colorfulness'); "
        "sys.exit(bool({'transformers', 'diffusers', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
