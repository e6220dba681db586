"""What counts depend on: their file names say it, and what cannot be known is not kept."""

import pytest

from alignprop_fast.cli import counting
from alignprop_fast.cli.kept_counts import Part, archive, shipped
from alignprop_fast.cli.plan_options import PlanOptions


def model(**options):
    return Part.model(PlanOptions(**options), 1).kept


def reward(size=(512, 512), **options):
    return Part.reward(PlanOptions(**options), 1, size).kept


def test_a_model_is_counted_again_for_what_changes_its_steps_alone():
    assert model() == model(gpu="A10") == model(reward="hpsv2", prompts="other") == model(memory_budget="8GiB")
    assert model() == model(deterministic=True) and model(kl_weight=0.1) == model(kl_weight=0.2)
    assert len({model(), model(lora_rank=8), model(kl_weight=0.1), model(optimizer="adamw8bit")}) == 4
    assert model(sampling_precision="fp8", gpu="A10") != model(sampling_precision="fp8", gpu="L4")


def test_of_guidance_it_matters_whether_there_is_any():
    assert model() == model(guidance_scale=5.0) == model(guidance_scale=7.5) == model(negative_prompt="x")
    assert model(model="sdxl", guidance_scale=1.0) != model(model="sdxl") == model(model="sdxl", guidance_scale=3.0)
    assert model(model="z-image-turbo", guidance_scale=0.0) != model(model="z-image-turbo", guidance_scale=3.0)
    true = {"model": "flux-dev", "true_cfg_scale": 4.0}
    assert model(**true, negative_prompt="x") == model(**true, negative_prompt="y") != model(**true)
    assert model(**true, negative_prompt="x") != model(model="flux-dev", negative_prompt="x") == model(model="flux-dev")


def test_a_reward_is_counted_again_for_what_changes_its_scores_alone():
    assert reward() == reward(gpu="A10") == reward(lora_rank=8)
    assert len({reward(), reward((512, 768)), reward(reward="hpsv2"), reward(watch_reward="clip")}) == 4


def test_an_archive_gives_back_its_texts(tmp_path):
    texts = {"1-b": '{"a":[1,2]}', "1-a": "{}"}
    (tmp_path / "x.xz").write_bytes(archive(texts))
    assert shipped(tmp_path / "x.xz") == texts and shipped(tmp_path / "none.xz") == {}
    (tmp_path / "cut.xz").write_bytes(archive(texts)[:-8])
    assert shipped(tmp_path / "cut.xz") == {}


@pytest.mark.parametrize("text", ["a" * 5000, "~nobody-of-this-name/x", "\0"])
def test_any_text_may_stand_where_a_file_may(text):
    assert model(scheduler=text) != model()


@pytest.mark.parametrize(
    ("known", "options"),
    {
        "built in": (True, {"reward": "clip:1,colorfulness:2", "watch_reward": "hpsv2"}),
        "a function": (False, {"reward": "clip,my:score"}),
        "watched": (False, {"watch_reward": "my:score"}),
        "a detector": (False, {"reward": "count:apple=2", "reward_model": ("count=my:detector",)}),
        "the only model": (False, {"reward": "count:apple=2", "reward_model": ("my:detector",)}),
    }.values(),
)
def test_rewards_with_code_of_the_user_are_not_kept(known, options):
    assert counting.Counting(None, PlanOptions(**options), None, None)._reward_is_known() is known
