"""The trainer: the same numbers as trl's algorithm in plain PyTorch, and every outcome of a step."""

import json
import random
import shutil

import numpy as np
import pytest
import torch

from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.models.lean.surgery import put_ops_in, take_ops_out

from .tiny_trainer import PROMPTS, draw_prompt, make_config, make_trainer, ramp_reward, same, weights


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_device_is_examined_before_the_model_takes_its_memory(
    monkeypatch, tiny_sd_folder, tmp_path, precision, dtype
):
    class Placed(Exception):
        pass

    def place(*arguments):
        raise Placed

    examined = []
    monkeypatch.setattr("alignprop_fast.training.trainer.examine_once", lambda *arguments: examined.append(arguments))
    monkeypatch.setattr("alignprop_fast.training.trainer.prepare_model", place)
    with pytest.raises(Placed):
        make_trainer(tiny_sd_folder, make_config(tmp_path, mixed_precision=precision))
    ((device, asked),) = examined
    assert isinstance(device, torch.device) and asked is dtype


class Recorded:
    """A reward that records its scores, batch by batch."""

    def __init__(self):
        self.scores = []

    def __call__(self, images_BCHW, prompts, metadata):
        assert all(entry == {"drawn": True} for entry in metadata)
        scores, info = ramp_reward(images_BCHW, prompts, metadata)
        self.scores.append(scores.tolist())
        return scores, info


def reference_scores(folder, config):
    """trl 0.23.1's algorithm in plain PyTorch: every step with its graph, every draw in trl's order."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    random.seed(config.seed), np.random.seed(config.seed), torch.manual_seed(config.seed)
    pipe.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    )
    trainable = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.train_learning_rate, weight_decay=1e-4)

    def encode(texts):
        ids = pipe.tokenizer(list(texts), padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            return pipe.text_encoder(ids.input_ids)[0]

    def sample(texts):
        embeds = torch.cat([encode([config.negative_prompts or ""]).repeat(len(texts), 1, 1), encode(texts)])
        x = torch.randn(len(texts), 4, 8, 8)
        pipe.scheduler.set_timesteps(config.sample_num_steps)
        for i, t in enumerate(pipe.scheduler.timesteps):
            predicted = pipe.unet(torch.cat([x, x]), t, embeds).sample
            if i < random.randint(*config.truncated_rand_backprop_minmax):
                predicted = predicted.detach()
            without, with_text = predicted.chunk(2)
            predicted = without + config.sample_guidance_scale * (with_text - without)
            noise = torch.randn(x.shape)  # trl draws it at eta = 0 too
            noise = noise if config.sample_eta else None
            x = pipe.scheduler.step(predicted, t, x, eta=config.sample_eta, variance_noise=noise).prev_sample
        return (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    scores = []
    for _ in range(config.num_epochs):
        for _ in range(config.train_gradient_accumulation_steps):
            texts = [draw_prompt()[0] for _ in range(config.train_batch_size)]
            rewards = ramp_reward(sample(texts), texts, None)[0]
            ((10 - rewards.mean()) / config.train_gradient_accumulation_steps).backward()
            scores.append(rewards.tolist())
        torch.nn.utils.clip_grad_norm_(trainable, config.train_max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return scores


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sample_eta": 0.0, "seed": 5, "negative_prompts": "red"},
        {
            "train_gradient_accumulation_steps": 2,
            "train_batch_size": 1,
            "train_max_grad_norm": 1e-3,
            "truncated_rand_backprop_minmax": (0, 2),  # the last step always has gradient; trl crashes if none has
        },
    ],
    ids=["defaults", "eta 0", "accumulation"],
)
def test_rewards_equal_the_plain_algorithm(tiny_sd_folder, tmp_path, options):
    """Rewards after updates depend on every draw and every gradient. fp32 rounding over the chain is about 1e-7, but
    Adam's first steps amplify tiny differences of tiny gradients, hence 1e-4."""
    config = make_config(tmp_path, train_learning_rate=1e-2, **options)
    reward = Recorded()
    make_trainer(tiny_sd_folder, config, reward).train()
    expected = reference_scores(tiny_sd_folder, config)
    torch.testing.assert_close(torch.tensor(reward.scores), torch.tensor(expected), rtol=1e-4, atol=0)
    assert np.std(expected) > 1e-3, "the reward must tell images apart"


def test_learns(tiny_sd_folder, tmp_path):
    """A dozen updates on one prompt and one noise raise the reward well beyond what noise would."""
    config = make_config(tmp_path, truncation="full", train_learning_rate=2e-2, sample_eta=0.0)
    trainer = make_trainer(tiny_sd_folder, config)
    trainer.prompt_fn = lambda: ("the red cat", {})
    rewards = []
    for epoch in range(12):
        torch.manual_seed(7)
        trainer.step(epoch, epoch)
        rewards.append(trainer.metrics.reward_mean)
    assert rewards[-1] > rewards[0] + 0.01, rewards


def test_each_noising_of_a_picture_is_a_reward_query_and_counts_alike(tiny_sd_folder, tmp_path):
    reward = Recorded()
    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path, truncation="lv:2"), reward)
    trainer.step(0, 0)
    assert [len(scores) for scores in reward.scores] == [2, 2, 2]
    assert trainer.metrics.loss == pytest.approx(10 - np.mean(reward.scores), rel=1e-6)
    assert trainer.metrics.reward_mean == pytest.approx(np.mean(reward.scores[0]), rel=1e-6)
    assert (trainer.metrics.gradient_steps, trainer.metrics.status) == (3, "ok")


@pytest.mark.parametrize("rule", ["drtune", "refl"])
def test_chains_that_end_early_train(tiny_sd_folder, tmp_path, rule):
    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path, truncation=rule))
    before = weights(trainer)
    trainer.step(0, 0)
    assert trainer.metrics.status == "ok" and not same(before, weights(trainer))


def test_the_regulariser_is_in_the_loss_and_holds_the_model_back(tiny_sd_folder, tmp_path):
    moved = []
    for weight in (0.0, 1e3):
        config = make_config(tmp_path, truncation="last:2", kl_weight=weight, num_epochs=3, train_learning_rate=1e-2)
        trainer = make_trainer(tiny_sd_folder, config)
        trainer.train()
        metrics = trainer.metrics
        base_mse = metrics.base_mse if weight else 0.0
        assert metrics.loss == pytest.approx(10 - metrics.reward_mean + weight * base_mse, rel=1e-5)
        assert ("base_mse" in metrics.to_log()) == bool(weight)
        assert (metrics.base_mse is None) != bool(weight)
        trainer.sampler.compare_with_base = True
        torch.manual_seed(0)
        trainer.sampler(list(PROMPTS), truncation="full")
        moved.append(trainer.sampler.base_mse.item())
        shutil.rmtree(config.output_dir)
    assert moved[0] > 3 * moved[1] > 0


def test_step_reports_what_happened(tiny_sd_folder, tmp_path):
    config = make_config(tmp_path, train_gradient_accumulation_steps=2, truncation="last:2")
    trainer = make_trainer(tiny_sd_folder, config)
    assert trainer.step(0, 0) == 1
    metrics = trainer.metrics
    assert (metrics.step, metrics.status, metrics.gradient_steps) == (1, "ok", 4)
    assert metrics.loss == pytest.approx(10 - metrics.reward_mean, rel=1e-6)
    assert metrics.reward_parts == {"left": pytest.approx(2 * metrics.reward_mean, rel=1e-6)}
    assert metrics.grad_norm > 0 and metrics.reward_std > 0
    assert metrics.images_per_second == pytest.approx(4 / metrics.seconds)
    assert metrics.peak_bytes > 2**20
    assert json.loads(json.dumps(metrics.to_dict()))["step"] == 1


def test_steps_can_be_left_and_entered_again(tiny_sd_folder, tmp_path):
    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path, num_epochs=4))
    for metrics in trainer.steps():
        if metrics.step == 2:
            break
    assert trainer.steps_done == trainer.global_step == 2
    assert trainer.save_checkpoint().name == "checkpoint_2"


def test_hook_without_tracker_sees_detached_pairs(tiny_sd_folder, tmp_path):
    seen = []
    config = make_config(tmp_path, log_image_freq=2, num_epochs=4)
    make_trainer(tiny_sd_folder, config, hook=lambda *arguments: seen.append(arguments)).train()
    assert [step for _, step, _ in seen] == [2, 4]
    pairs, _, tracker = seen[0]
    assert tracker is None
    assert pairs["images"].shape == (2, 3, 16, 16) and pairs["images"].numpy().max() <= 1
    assert pairs["rewards"].shape == (2,) and len(pairs["prompts"]) == len(pairs["prompt_metadata"]) == 2


def test_tensorboard_takes_the_options_and_the_numbers(tiny_sd_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = []
    config = make_config(tmp_path, log_with="tensorboard", logdir=str(tmp_path / "logs"), num_epochs=2)
    trainer = make_trainer(tiny_sd_folder, config, hook=lambda pairs, step, tracker: trackers.append(tracker))
    trainer.train()
    trainer.accelerator.end_training()
    assert [tracker.name for tracker in trackers] == ["tensorboard"] * 2
    events = EventAccumulator(str(tmp_path / "logs" / "trl")).Reload()
    assert [event.step for event in events.Scalars("reward_mean")] == [0, 1]
    assert {"loss", "reward_std", "grad_norm", "learning_rate", "reward/left"} <= set(events.Tags()["scalars"])


def test_a_reward_without_gradient_is_refused(tiny_sd_folder, tmp_path):
    def cut(images, prompts, metadata):
        return images.detach().mean((1, 2, 3)), {}

    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path, truncation="full"), cut)
    with pytest.raises(ValueError, match="reward 'cut' returned scores without gradient"):
        trainer.step(0, 0)


def test_no_open_gate_is_counted_not_a_crash(tiny_sd_folder, tmp_path):
    config = make_config(tmp_path, truncated_rand_backprop_minmax=(2, 10**9))
    trainer = make_trainer(tiny_sd_folder, config)
    before = weights(trainer)
    trainer.step(0, 0)
    assert (trainer.metrics.status, trainer.metrics.gradient_steps) == ("no_gradient", 0)
    assert same(before, weights(trainer)), "weight decay must not act without a gradient"


class Broken:
    """ramp_reward, with the given defect in the given steps."""

    def __init__(self, defect, when):
        self.defect, self.when, self.calls = defect, when, 0

    def __call__(self, images_BCHW, prompts, metadata):
        scores, info = ramp_reward(images_BCHW, prompts, metadata)
        broken, self.calls = self.calls in self.when, self.calls + 1
        if broken and self.defect == "gradient":
            return scores + (scores - scores.detach()).abs().sqrt(), info  # value 0, slope infinite
        return scores * float(self.defect) if broken else scores, info


@pytest.mark.parametrize("defect", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(tiny_sd_folder, tmp_path, defect):
    config = make_config(tmp_path, truncation="full", lr_scheduler="linear")
    trainer = make_trainer(tiny_sd_folder, config, Broken(defect, {1}))
    trainer.step(0, 0)
    before = weights(trainer)
    trainer.step(1, 1)
    assert trainer.metrics.status == "not_finite" and trainer.skipped_steps == 1
    assert same(before, weights(trainer))
    trainer.step(2, 2)
    assert trainer.metrics.status == "ok" and trainer.skipped_steps == 1
    assert trainer.metrics.learning_rate == pytest.approx(1e-3 * 2 / 3)
    assert not same(before, weights(trainer))
    assert all(torch.isfinite(weight).all() for weight in weights(trainer))


def test_bad_steps_in_a_row_stop_the_training(tiny_sd_folder, tmp_path):
    config = make_config(tmp_path, max_bad_steps=2, num_epochs=9)
    trainer = make_trainer(tiny_sd_folder, config, Broken("nan", {0, 2, 3, 4}))
    with pytest.raises(ValueError, match="2 steps in a row: lower the learning rate") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.steps_done == 4


def test_sdxl_trains(tiny_sdxl_folder, tmp_path):
    trainer = make_trainer(tiny_sdxl_folder, make_config(tmp_path, num_epochs=1, truncation="full"))
    before = weights(trainer)
    trainer.train()
    assert trainer.metrics.status == "ok" and not same(before, weights(trainer))


def test_unknown_truncation_is_refused(tiny_sd_folder, tmp_path):
    with pytest.raises(ValueError, match=r"unknown truncation .* last:K"):
        make_trainer(tiny_sd_folder, make_config(tmp_path, truncation="first:2"))


def test_no_gradient_sampling_and_given_prompts(tiny_sd_folder, tmp_path):
    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path))
    pairs = trainer._generate_samples(2, with_grad=False, prompts=["a dog", "red"])
    assert not pairs["images"].requires_grad
    assert pairs["prompts"] == ("a dog", "red")
    assert torch.equal(trainer.compute_rewards({**pairs}), ramp_reward(pairs["images"], None, None)[0])


def test_save_pretrained_gives_a_pipeline_that_loads_and_goes_on(tiny_sd_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path, train_learning_rate=1e-2, truncation="full"))
    trainer.train()
    trainer.save_pretrained(tmp_path / "saved")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    saved.scheduler = trainer.sd_pipeline.scheduler

    def images(pipe):
        generator = torch.Generator().manual_seed(1)
        return pipe("red", num_inference_steps=3, generator=generator, eta=1.0, output_type="pt").images

    untrained = images(saved)
    saved.load_lora_weights(tmp_path / "saved")
    # only one model is channels_last, which changes the order of sums
    torch.testing.assert_close(images(saved), images(trainer.sd_pipeline), rtol=0, atol=1e-5)
    assert (images(saved) - untrained).abs().max() > 1e-3
    card = (tmp_path / "saved" / "README.md").read_text()
    assert (
        card.startswith("---\n") and "load_lora_weights" in card and str(tmp_path) not in card.split("## Training")[0]
    )
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["sample_num_steps"] == 3
    again = DefaultDDPOStableDiffusionPipeline(tmp_path / "saved")
    again.get_trainable_layers()
    assert same(weights(trainer), [p for p in again.unet.parameters() if p.requires_grad])


def test_model_card_goes_to_the_output_folder(tiny_sd_folder, tmp_path):
    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path))
    trainer.create_model_card(model_name="mine", tags="cats")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "# mine" in card and "- cats" in card and "- alignprop" in card


def test_the_curve_is_the_same_with_and_without_the_frozen_aware_ops(tmp_path):
    """Three steps of the bundled model. Tolerance: fp32 rounding through a chain and updates; measured 1e-6."""
    curves = []
    for swap in (put_ops_in, take_ops_out):
        recorded = Recorded()
        random.seed(0)
        config = make_config(tmp_path / swap.__name__, train_learning_rate=1e-3, num_epochs=3)
        trainer = make_trainer("demo", config, recorded)
        swap(trainer.sd_pipeline.unet)
        swap(trainer.sd_pipeline.vae.decoder)
        trainer.train()
        curves.append(np.array(recorded.scores))
    assert np.ptp(curves[0]) > 1e-3
    assert np.allclose(curves[0], curves[1], rtol=1e-4)
