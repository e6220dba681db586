"""`train` and `plan` make a run from the same parts. With the same options they count the same bytes and find the same
plan, on the device and on tensors without data."""

import shutil
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.cli.plan_question import _place, from_model
from alignprop_fast.cli.set_up import Start, open_session
from alignprop_fast.cli.train import TrainCall
from alignprop_fast.demo import clip_path
from alignprop_fast.generate import cost_table
from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.models.lora.load_save import save_lora
from alignprop_fast.planner import CostTable, GraphUse, Operator, Operators, Option, Segment, Stage
from alignprop_fast.training.declaration import Command, declared, taken
from alignprop_fast.training.options import TrainOptions

QUIET = Console(quiet=True)
REWARD = "reward_of_this_test:score"
GUIDED_FLUX = {"model": "{flux}", "true_cfg_scale": 2.0, "negative_prompt": "red", "height": 16, "width": 16}

# Every option of `train` that changes a plan, with a value other than the default and the other options that it needs.
CHANGES = {
    "model": ("{sdxl}", {}),
    "lora_rank": (8, {}),
    "lora_targets": ("all", {}),
    "base_dtype": ("int8", {}),
    "adapter_dtype": ("bf16", {}),
    "reward": ("clip", {}),
    "reward_model": (("{clip}",), {"reward": "clip"}),
    "reward_words": ("sharp|", {"reward": "clip"}),
    "prompts": ("{prompts}", {"reward": REWARD}),
    "negative_prompt": (None, GUIDED_FLUX),
    "num_inference_steps": (3, {}),
    "guidance_scale": (1.0, {}),
    "true_cfg_scale": (1.0, GUIDED_FLUX),
    "cfg_normalization": (1.0, {"model": "{z_image}", "height": 16, "width": 16}),
    "scheduler": ("euler", {}),
    "height": (24, {}),
    "width": (24, {}),
    "batch_size": (2, {}),
    "optimizer": ("adafactor", {}),
    "ema_decay": (0.9, {}),
    "sampling_precision": ("int8", {}),
    "truncation": ("last:1", {}),
    "kl_weight": (0.1, {}),
    "watch_reward": ("clip", {}),
    "watch_reward_model": (("{clip}",), {"watch_reward": "clip"}),
    "watch_prompts": ("demo-heldout", {}),
    "diversity_model": ("{clip}", {"watch_prompts": "demo"}),
    "mixed_precision": ("bf16", {}),
    "memory_budget": ("1GiB", {}),
    "host_memory": ("2GiB", {}),
}
# Those that change it where a GPU is, or that let a model be read at all.
ELSEWHERE = {"cache_text", "cuda_graphs", "deterministic", "model_config"}
# Those that change no plan, and why.
CHANGES_NOTHING = {
    "allow_pickle": "the weights are the same in every file",
    "cfg_truncation": "plans count every step as guided",
    "compiled": "its speed is not measured yet",
    "config": "names a file of other options",
    "device": "plan has --gpu and --measure for it",
    "eta": "a number in the formula of a step",
    "gradient_accumulation_steps": "batches run one after the other, and a plan is of one batch",
    "learning_rate": "a number in the optimizer's formula",
    "log_with": "logs after the step",
    "lora_alpha": "a factor on what the adapters give",
    "lr_scheduler": "changes the learning rate",
    "max_drop": "compares scores after the step",
    "max_grad_norm": "the norm is computed for every value",
    "normalise_rewards": "divides one number for each picture",
    "output_dir": "where files go",
    "patience": "compares scores after the step",
    "resume": "the run goes on with its own plan",
    "resume_from": "the run goes on with its own plan",
    "sample_every": "draws between steps",
    "save_every": "writes between steps",
    "seed": "changes which numbers are drawn",
    "steps": "every step costs the same",
    "warmup_steps": "changes the learning rate",
    "watch_pictures": "are drawn between steps, in batches of --batch-size",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_sd_folder, tiny_sdxl_folder, tiny_flux_folder, tiny_z_image_folder):
    """The files for the names in braces. clip: half as deep as the bundled one."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("parts")
    config = CLIPConfig.from_pretrained(clip_path())
    config.vision_config.num_hidden_layers = 1
    CLIPModel(config).save_pretrained(shutil.copytree(clip_path(), folder / "clip"))
    (folder / "prompts.txt").write_text("a prompt of many letters\n")
    (folder / "reward_of_this_test.py").write_text(
        "def score(images, prompts, metadata):\n"
        "    return images.repeat(1, len(prompts[0]), 1, 1).square().mean((1, 2, 3)), {}\n"
    )
    models = {"sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder, "flux": tiny_flux_folder, "z_image": tiny_z_image_folder}
    return {"": folder, "clip": folder / "clip", "prompts": folder / "prompts.txt", **models}


@pytest.fixture
def options(places, monkeypatch, fresh_process):
    """TrainOptions of a short run on the CPU, with the given ones."""
    monkeypatch.syspath_prepend(places[""])

    def filled(value):
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.format_map(places) if isinstance(value, str) else value

    def make(chosen):
        base = {"model": "{sd}", "reward": "colorfulness", "num_inference_steps": 2, "batch_size": 1}
        base |= {"mixed_precision": "no", "cache_text": False, "memory_budget": "2GiB", "host_memory": "1GiB"}
        base |= {"device": "cpu", "output_dir": str(places[""] / "run"), "prompts": "demo"}
        return TrainOptions(**{name: filled(value) for name, value in {**base, **chosen}.items()})

    return make


@pytest.fixture
def no_runs(monkeypatch):
    """No step or decoder is run or counted. Costs are drawn at random from the table's cache key, because they may
    depend on nothing else."""
    described = {"source", "device", "offload", "alignprop_fast", "torch"}

    def costs(task, origin, *rest):
        known = {name: value for name, value in origin.items() if name not in described}
        size_bytes = int(cost_table._hash(sorted(known.items())), 16) % 2**20
        time = Operators([Operator(1.0, 1, "float32")]) if task.model.device.type == "meta" else 1.0
        segment = Segment("rest", (Option("keep", size_bytes, size_bytes, time),))
        decoders = (Stage("batch", (segment,)),)
        return CostTable({}, size_bytes, size_bytes, (segment,), size_bytes, time, decoders, origin=origin)

    monkeypatch.setattr(cost_table, "_costs", costs)
    monkeypatch.setattr(cost_table, "_remembered", lambda origin, measure: measure())


def trained(options):
    """The prediction of `train` in its set-up."""
    from accelerate.state import AcceleratorState, GradientState

    with OutputFolder(options.output_dir) as folder:
        session = open_session(options, QUIET, folder, Start())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return session.prediction


def planned(options, **how):
    """The prediction of `plan`."""
    known = {each.name: getattr(options, each.name) for each, option in taken(options, Command.TRAIN)}
    question = from_model(QUIET, PlanOptions(**known, **how))
    return replace(question.predict(), largest=None)


def without_seconds(value):
    """A prediction, a table or a part of one as plain data: bytes and choices, without times and places."""
    if isinstance(value, dict):
        drop = ("seconds", "source", "device", "offload", "alignprop_fast", "torch")
        drop += ("workspace", "peak_bytes", "phases")
        return {k: without_seconds(v) for k, v in value.items() if not k.endswith(drop)}
    return [without_seconds(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def found():
    """The remembered predictions, by options."""
    return {}


def predicted(found, options):
    """The predictions of `train`, of `plan` on this device, and of `plan` for a GPU."""
    name = repr(options)
    if name not in found:
        found[name] = trained(options), planned(options, measure=True), planned(options, gpu="4090")
    return found[name]


def leaves(value):
    if isinstance(value, dict | list):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [value]


QUICK = ("lora_rank", "guidance_scale", "ema_decay", "watch_reward")
SLOW = pytest.mark.slow("makes the parts of six runs for each option")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in CHANGES])
def test_train_and_plan_count_the_same(name, options, found, no_runs, steady_clock):
    """Exactly equal, because the same code counts. An estimate has other seconds and an assumed workspace for the GPU's
    libraries. The kept bytes of a reward's attention differ by up to an eighth, because torch's kernel for the CPU
    keeps no probabilities. Only a GPU has CUDA graphs."""
    value, beside = CHANGES[name]
    before, after = predicted(found, options(beside)), predicted(found, options({**beside, name: value}))
    for run, measured, estimated in (before, after):
        assert run == measured
        tables = [without_seconds(asdict(prediction.table)) for prediction in (run, estimated)]
        here, there = (leaves(table.pop("rewards")) for table in tables)
        assert tables[0].pop("graphs") is None and tables[1].pop("graphs") is not None
        assert tables[0] == tables[1]
        assert there == [leaf if isinstance(leaf, str) else pytest.approx(leaf, rel=1 / 8) for leaf in here]
        assert run.worst.budget_bytes == estimated.worst.budget_bytes
    for one, two in zip(before, after, strict=True):
        assert one != two, f"--{name} changes no plan: it belongs to another list"


def test_text_encoders_that_leave_the_gpu_are_not_counted(options, no_runs):
    """On the CPU they have nowhere else to go."""
    cached, kept = (planned(options({"cache_text": cache}), gpu="4090").table.fixed for cache in (True, False))
    encoder = StableDiffusionPipeline.from_pretrained(options({}).model).text_encoder
    encoder_bytes = sum(t.numel() * t.element_size() for t in (*encoder.parameters(), *encoder.buffers()))
    assert kept["weights"] - cached["weights"] == encoder_bytes


def test_training_goes_on_from_a_lora_beside_the_model_and_a_plan_too(options, places, tmp_path, no_runs):
    """It has the file's rank, for every --lora-rank."""
    pipeline = DefaultDDPOStableDiffusionPipeline(places["sd"])
    pipeline.get_trainable_layers(rank=2)
    folder = shutil.copytree(places["sd"], tmp_path / "model")
    save_lora(pipeline.sd_pipeline, folder)
    found = [planned(options({"model": str(model)}), gpu="4090").table for model in (folder, places["sd"])]
    assert found[0].fixed["adapters"] == found[1].fixed["adapters"] // 2


def test_plans_may_use_cuda_graphs_unless_they_are_off(options, no_runs):
    auto, off = (planned(options({"cuda_graphs": way}), gpu="4090").table for way in ("auto", "off"))
    assert off == replace(auto, graphs=None)
    assert auto.graphs.static_bytes > 0
    assert auto.pool_bytes(GraphUse.SAMPLING, 0) == auto.sampling_bytes + auto.graphs.static_bytes


def test_the_options_that_change_a_plan_are_those_that_say_so():
    said = {each.name for each, option in declared(TrainOptions) if option.changes_plan}
    assert said == set(CHANGES) | ELSEWHERE
    assert said <= {each.name for each, _ in taken(PlanOptions, Command.PLAN)}


def test_every_option_of_train_is_in_one_of_the_three_lists():
    listed = [*CHANGES, *ELSEWHERE, *CHANGES_NOTHING]
    assert sorted(listed) == sorted(each.name for each, _ in taken(TrainCall, Command.TRAIN))


def test_a_plan_is_measured_with_the_kernels_of_a_deterministic_run(monkeypatch):
    """Cost tables are remembered by torch's mode."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    try:
        assert _place(PlanOptions(measure=True)).device == "cuda" and not torch.are_deterministic_algorithms_enabled()
        assert _place(PlanOptions(measure=True, deterministic=True)).device == "cuda"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
