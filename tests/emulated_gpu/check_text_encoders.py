"""With cached text, text encoders are never on the device beside the model if the budget has no room for both."""

import pytest
import torch

from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.prepare import make_sampler, prepare_model

pytestmark = pytest.mark.usefixtures("plain_kernels")

GPU = torch.device("cuda")
KIB = 2**10


def size_of(*modules):
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum(-(-t.numel() * t.element_size() // 512) * 512 for t in tensors)


class Nothing:
    """A reward without weights."""

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3)), {}


@pytest.fixture(params=["tiny_sdxl_folder", "tiny_flux_folder"])
def pipeline(request, emulated):
    """Its text encoders are large: several times the model's size."""
    pipeline = DefaultDDPOStableDiffusionPipeline(str(request.getfixturevalue(request.param)))
    pipeline.text_encoder.register_parameter("ballast", torch.nn.Parameter(torch.zeros(2**22), requires_grad=False))
    return pipeline


def size_of_blocks(sampler):
    return sum(-(-t.numel() * t.element_size() // 512) * 512 for t in sampler.text.cache._block_weights())


def embeddings_and_peak(sampler, prompt):
    collect_garbage()
    torch.cuda.reset_peak_memory_stats()
    cond = sampler._encode(prompt, None, None)[1]
    return [cond.embeds, *(cond.added or {}).values()], torch.cuda.max_memory_allocated()


def warnings(caplog):
    return [record.message for record in caplog.records if record.name == "alignprop_fast.models.text_cache"]


def test_set_up_and_new_prompts_keep_to_what_the_model_takes(emulated, pipeline, caplog):
    collect_garbage()
    start = torch.cuda.memory_allocated()
    config = AlignPropConfig(mixed_precision="bf16", base_dtype="int8", lora_rank=2, sample_num_steps=2)
    emulated.reset_peak()
    prepare_model(pipeline, GPU, config)
    sampler = make_sampler(pipeline, config, Nothing())
    collect_garbage()
    there = torch.cuda.memory_allocated()
    encoders = size_of(*pipeline.text_encoders)
    assert there - start <= size_of(pipeline.unet, pipeline.vae) + 8 * KIB
    assert torch.cuda.max_memory_allocated() < there + encoders // 4, "one dense weight that is being packed"

    assert sampler._room_bytes() > encoders
    with_room, peak = embeddings_and_peak(sampler, "a dog")
    assert peak > there + encoders and not warnings(caplog)
    trained = {n: p.data_ptr() for n, p in pipeline.unet.named_parameters() if p.requires_grad}
    before = {name: t.clone() for name, t in pipeline.unet.state_dict().items()}
    there_bytes, blocks = torch.cuda.memory_allocated() - there, size_of_blocks(sampler)
    sampler.budget_bytes = there + there_bytes + encoders // 2
    sampler.text.cache._kept.clear()
    without, lower_peak = embeddings_and_peak(sampler, "a dog")
    assert lower_peak == peak + there_bytes - blocks and blocks > 64 * KIB
    assert all(torch.equal(a, b) for a, b in zip(with_room, without, strict=True))
    embeddings_and_peak(sampler, "another")
    assert warnings(caplog) == [
        "the text encoders do not fit beside the model: it moves to host memory while they encode"
    ]
    after = pipeline.unet.state_dict()
    assert all(after[name].is_cuda and torch.equal(after[name], t) for name, t in before.items())
    assert trained == {n: p.data_ptr() for n, p in pipeline.unet.named_parameters() if p.requires_grad}
