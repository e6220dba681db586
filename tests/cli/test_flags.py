"""Messages name options as the user typed them."""

from dataclasses import replace

import pytest
import typer

from alignprop_fast.cli.flags import in_flags
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.support import setup_errors

from .test_options import RESOLVED


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("cfg_truncation is an option of Z-Image", "--cfg-truncation is an option of Z-Image"),
        ("sample_num_steps, negative_prompts.", "--num-inference-steps, --negative-prompt."),
        ('base_dtype="nf4" or optimizer=adamw', "--base-dtype=nf4 or --optimizer=adamw"),
        ("the seed and the steps", "the seed and the steps"),
        ("give --reward-model clip=PATH", "give --reward-model clip=PATH"),
        ("no 'batch_size' in /runs/lora_rank/x, lora_rank.txt", "no 'batch_size' in /runs/lora_rank/x, lora_rank.txt"),
        ("max_bad_steps, guidance_rescale", "max_bad_steps, guidance_rescale"),  # only for Python
    ],
)
def test_names_of_arguments_and_fields_become_flags(said, shown):
    assert in_flags(said) == shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"memory_budget": "0"}, "--memory-budget '0' must be"),
        ({"host_memory": "much"}, "--host-memory 'much' is not"),
        ({"steps": 3, "warmup_steps": 3}, "--warmup-steps is 3: use fewer than --steps=3\n"),
        ({"adapter_dtype": "bf16", "mixed_precision": "fp16"}, "--adapter-dtype=bf16 does not support --mixed-prec"),
    ],
)
def test_what_the_config_refuses_is_named_by_its_flag(capsys, values, shown):
    with pytest.raises(typer.Exit), setup_errors():
        make_config(replace(RESOLVED, **values), "cuda", "")
    assert capsys.readouterr().err.startswith(f"alignprop-fast: {shown}")


def test_what_the_sampler_refuses_is_named_by_its_flag(command, tiny_sd_folder, tmp_path):
    options = ("--model", tiny_sd_folder, "--cfg-truncation", 0.5, "--device", "cpu", "--prompt", "a cat")
    code, _, err = command("sample", *options, "--output-dir", tmp_path / "out")
    assert (code, err) == (
        2,
        "alignprop-fast: --cfg-truncation is an option of Z-Image: leave it out for other models\n",
    )
