"""One declaration per option: its effect on the command line, in YAML and in the trainer's config."""

import inspect
from dataclasses import MISSING, fields, replace
from math import inf, isfinite, nextafter

import pytest
import typer
import yaml

from alignprop_fast.cli import app as commands
from alignprop_fast.cli.options import command_line, make_config
from alignprop_fast.cli.parts import resolved
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.models.lora.targets import TARGETS
from alignprop_fast.planner.optimizer_state import OPTIMIZERS
from alignprop_fast.training.config import AlignPropConfig, TrlFields, config_field
from alignprop_fast.training.declaration import Command, Panel, declared, flag, option, taken, values
from alignprop_fast.training.options import TrainOptions
from alignprop_fast.training.trainer_options import TrainerOptions

DEFAULTS = TrainOptions()
RESOLVED = resolved(DEFAULTS, "no")
SHARED = sorted(values(DEFAULTS, Command.TRAIN).keys() & {field.name for field in fields(AlignPropConfig)})
OTHER = {
    "adapter_dtype": "bf16",
    "base_dtype": "int8",
    "cfg_truncation": 0.5,
    "cuda_graphs": "off",
    "ema_decay": 0.5,
    "host_memory": 3 * 2**30,
    "log_with": "tensorboard",
    "lora_targets": "all",
    "lr_scheduler": "cosine",
    "memory_budget": 9 * 2**30,
    "mixed_precision": "bf16",
    "optimizer": "adafactor",
    "sampling_precision": "bf16",
    "truncation": "full",
}
# Every bound of train's options, with the nearest value outside it.
BOUNDS = {
    (each.name, word): value
    for each, option in taken(DEFAULTS, Command.TRAIN)
    for word, bound, value in (
        ("at_least", option.at_least, option.at_least - 1),
        ("at_most", option.at_most, option.at_most + 1),
        ("above", option.above, option.above),
        ("below", option.below, option.below),
    )
    if isfinite(bound)
}
CHOICES = {(each.name, "choice"): "sgdd" for each, option in taken(DEFAULTS, Command.TRAIN) if option.choices}


def test_every_option_is_in_the_help_of_exactly_its_commands(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for name in typer.main.get_command(commands.app).commands:
        code, out, err = command(name, "--help")
        assert (code, err) == (0, "")
        shown = {line.split()[1] for line in out.splitlines() if line.startswith("│ --")}
        options = taken(getattr(commands, name).defaults, Command[name.upper()])
        own = {flag(each.name) for each, declaration in options if not declaration.argument}
        assert shown == {"--help", *own}, name


@pytest.mark.parametrize("name", [name for name in SHARED if name not in ("output_dir", "lora_alpha")])
def test_an_option_of_the_same_name_is_passed_on(name):
    default = getattr(DEFAULTS, name)
    value = OTHER.get(name) or (not default if isinstance(default, bool) else 16 + (default or 0))
    assert getattr(make_config(replace(RESOLVED, **{name: value}), "cuda", ""), name) == value


def test_sizes_become_bytes_at_the_door():
    config = make_config(replace(RESOLVED, memory_budget="9GiB", host_memory="3 GiB"), "cpu", "")
    assert (config.memory_budget, config.host_memory) == (9 * 2**30, 3 * 2**30)
    words = [make_config(replace(RESOLVED, memory_budget=word), "cpu", "") for word in ("none", "auto")]
    assert [config.memory_budget for config in words] == [None, "auto"]


@pytest.mark.parametrize(("name", "word"), [*BOUNDS, *CHOICES])
def test_bounds_are_the_same_on_the_command_line_in_yaml_and_in_python(train, tmp_path, name, word):
    value = (BOUNDS | CHOICES)[name, word]
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {value}\n")
    for arguments in ((f"{flag(name)}={value}",), ("--config", file)):
        with pytest.raises(typer.BadParameter) as caught:
            train(*arguments)
        assert flag(name) in caught.value.format_message()
    if field := config_field(name, {each.name: declaration for each, declaration in declared(DEFAULTS)}[name]):
        with pytest.raises(ValueError, match=f"^{field} is {value!r}.*: use ") as error:
            AlignPropConfig(**{field: value})
        assert "--" not in str(error.value)


def test_just_inside_the_bounds_is_taken(train):
    for each, d in taken(DEFAULTS, Command.TRAIN):
        for bound, value in ((d.at_least,) * 2, (d.at_most,) * 2, (d.above, 1e-9), (d.below, nextafter(d.below, 0))):
            if isfinite(bound):
                assert getattr(train(f"{flag(each.name)}={value}"), each.name) == value


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_is_refused(train, value):
    for each, declaration in taken(DEFAULTS, Command.TRAIN):
        if isinstance(each.default, float) and not (declaration.may_be_infinite and value == "inf"):
            with pytest.raises(typer.BadParameter) as caught:
                train(flag(each.name), value)
            assert flag(each.name) in caught.value.format_message()
            with pytest.raises(ValueError, match=f"^x is {value}: use "):
                declaration.check("x", float(value))


@pytest.mark.parametrize(("name", "value"), [("cuda_graphs", "on"), ("compiled", True)])
def test_what_needs_a_gpu_is_refused_on_the_cpu_by_its_flag(name, value):
    options = replace(RESOLVED, **{name: value})
    with pytest.raises(ValueError, match=f"^{flag(name)} needs a GPU, .*: leave it out$"):
        make_config(options, "cpu", "")
    assert getattr(make_config(options, "cuda", ""), name)


def test_an_infinite_norm_is_taken_also_as_yaml_writes_it(train, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"max_grad_norm": inf}))
    for arguments in (("--max-grad-norm", "inf"), ("--config", file)):
        assert train(*arguments) == replace(DEFAULTS, max_grad_norm=inf)
    with pytest.raises(typer.BadParameter, match=r"--max-grad-norm is 0\.0: use a number above 0, or inf"):
        train("--max-grad-norm", "0")


def test_every_command_reads_every_type(train):
    given = ("--reward-model", "a", "--reward-model", "b", "--no-cache-text", "--log-with", "wandb", "--height", 64)
    given = (*given, "--scheduler", "DPM++2M", "--lora-alpha", "3", "--memory-budget", "9GiB", "--cuda-graphs", "off")
    expected = {"reward_model": ("a", "b"), "cache_text": False, "log_with": "wandb", "height": 64, "lora_alpha": 3.0}
    expected |= {"scheduler": "dpm++2m", "memory_budget": "9GiB", "cuda_graphs": "off"}
    assert train(*given) == replace(DEFAULTS, **expected)
    assert train() == DEFAULTS


def test_a_new_option_needs_its_declaration_alone(tmp_path):
    """As in `TrainOptions`, from which it gets its flag, bound, default and place in the help."""
    from dataclasses import dataclass

    @dataclass
    class More(TrainOptions):
        brightness: float = option(0.5, "How bright.", commands=Command.SAMPLE, panel=Panel.SAMPLING, at_most=1)

    got = []

    @command_line(Command.SAMPLE, More(output_dir="elsewhere"))
    def sample(ctx, options):
        got.append(options)

    app = typer.Typer()
    app.command()(sample)
    own = typer.main.get_command(app)
    own.invoke(own.make_context("sample", ["--brightness", "0.75"]))
    assert got[0].brightness == 0.75 and got[0].output_dir == "elsewhere"
    with pytest.raises(typer.BadParameter):
        own.make_context("sample", ["--brightness", "2"])


def test_plan_takes_what_changes_a_plan():
    changes = {each.name for each, option in declared(DEFAULTS) if option.changes_plan}
    assert changes == {each.name for each, _ in taken(DEFAULTS, Command.PLAN)} - {"output_dir", "allow_pickle"}
    assert changes < {each.name for each, _ in taken(PlanOptions(), Command.PLAN)}
    assert changes < set(inspect.signature(commands.plan).parameters)


def test_choices_are_those_of_what_implements_them():
    from alignprop_fast.models.load.pipeline import SCHEDULERS

    choices = {each.name: option.choices for each, option in declared(DEFAULTS)}
    assert choices["optimizer"] == OPTIMIZERS and choices["lora_targets"] == TARGETS
    assert choices["scheduler"] == SCHEDULERS


def test_the_config_has_trls_fields_and_then_those_that_are_declared():
    names = [field.name for field in fields(AlignPropConfig)]
    assert names == [*(f.name for f in fields(TrlFields)), *(f.name for f in fields(TrainerOptions))]
    assert list(inspect.signature(AlignPropConfig).parameters) == names
    own = {f.name: f.default for f in fields(TrainerOptions)} | {"lora_alpha": 4}
    assert own == {f.name: f.default for f in fields(AlignPropConfig)[33:]} and MISSING not in own.values()


def test_the_files_of_earlier_runs_are_read(train, tmp_path):
    """config.yaml of version 0.1, with its names and order."""
    old = {"output_dir": "o", "model": "demo", "model_config": None, "reward": "clip", "reward_model": ["a"]}
    old |= {"allow_pickle": False, "normalise_rewards": False, "prompts": "demo", "steps": 7, "num_inference_steps": 50}
    old |= {"guidance_scale": 5.0, "true_cfg_scale": 1.0, "scheduler": "auto", "eta": 1.0, "batch_size": 4}
    old |= {"gradient_accumulation_steps": 1, "learning_rate": 0.001, "lora_rank": 4, "lora_alpha": 4.0}
    old |= {"lora_targets": "attention", "base_dtype": "auto", "adapter_dtype": "fp32", "optimizer": "adamw"}
    old |= {"cache_text": True, "mixed_precision": "no", "memory_budget": None, "truncation": "uniform"}
    old |= {"kl_weight": 0.0, "watch_reward": None, "watch_reward_model": [], "watch_prompts": None}
    old |= {"watch_pictures": 16, "diversity_model": None, "patience": None, "max_drop": 0.0, "negative_prompt": None}
    old |= {"height": None, "width": None, "seed": 0, "save_every": 10, "sample_every": 10, "log_with": None}
    old |= {"device": "auto", "deterministic": False, "host_memory": None}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(old, sort_keys=False))
    expected = {"output_dir": "o", "reward_model": ("a",), "steps": 7, "lora_alpha": 4.0, "mixed_precision": "no"}
    expected |= {"num_inference_steps": 50, "guidance_scale": 5.0, "true_cfg_scale": 1.0, "truncation": "uniform"}
    assert train("--config", file) == replace(DEFAULTS, **expected, memory_budget="none")
