"""What is said of texts that are too long is what the text encoders do with them: diffusers' own, of every model."""

import logging
import random

import pytest
import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch
from alignprop_fast.prompts.limits import CutTexts, TextReader

WORDS = ("the", "red", "cat", "dog", "and")  # a token each, for all tiny tokenizers alike
CLIP, T5_SD3, T5_FLUX = 75, 255, 511  # words beside the marks: the limits of diffusers' pipelines
QWEN_IMAGE, KREA2 = 412, 407  # beside the 134 tokens of the instructions, of which the pipelines drop 34
QWEN = 506  # beside the 6 marks before the text; a text this long leaves no room for the 13 after it
GEMMA = 98  # beside the 158 of the system's prompt
MISTRAL = 330  # beside the 182 of the system's message and the marks


def words(count, seed=0):
    return random.Random(seed).choices(WORDS, k=count)


def other(word):
    return WORDS[WORDS.index(word) - 1]


def encoded(model, texts):
    cond = model.encode(PromptBatch([" ".join(texts)], None, False, (16, 16)))
    return [cond.embeds, *(cond.added or {}).values()]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "alignprop_fast.prompts.limits"]


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("sd", {"CLIP": (CLIP, 77, 602)}),
        ("sdxl", {"CLIP": (CLIP, 77, 602)}),
        ("sd3", {"CLIP": (CLIP, 77, 602), "T5": (T5_SD3, 256, 601)}),
        ("flux", {"CLIP": (CLIP, 77, 602), "T5": (T5_FLUX, 512, 601)}),
        ("chroma", {"T5": (T5_FLUX, 512, 601)}),
        ("lumina2", {"Gemma 2": (GEMMA, 256, 758)}),
        ("sana", {"Gemma 2": (299, 1287, 1588)}),
        ("z_image", {"Qwen3": (QWEN, 512, 619)}),
        ("flux2_klein", {"Qwen3": (QWEN, 512, 638)}),
        ("flux2_dev", {"Mistral 3": (MISTRAL, 512, 789)}),
        ("qwen_image", {"Qwen2.5-VL": (QWEN_IMAGE, 546, 747)}),
        ("krea2", {"Qwen3-VL": (KREA2, 541, 734)}),
    ],
)
def test_a_text_is_read_as_far_as_is_said_and_no_farther(request, caplog, name, limits):
    model, text = adapt(request.getfixturevalue(f"tiny_{name}")), words(600)
    farthest = max(limit for limit, _, _ in limits.values())
    before = encoded(model, text)
    beyond = encoded(model, [*text[:farthest], *map(other, text[farthest:])])
    within = encoded(model, [*text[: farthest - 1], other(text[farthest - 1]), *text[farthest:]])
    assert all(map(torch.equal, before, beyond)) and not all(map(torch.equal, before, within))
    CutTexts(model.text_readers(), "prompts").look_at(["a cat", " ".join(text)])
    (line,) = said(caplog)
    assert line.startswith("prompts longer than the text encoder reads: 1 of 2;") and "\n" not in line
    says = []
    for encoder, (limit, read, count) in limits.items():
        begin = " ".join(text[limit:])[:40].rstrip()
        says.append(f"{encoder} reads {read} of its {count} tokens, nothing from '{begin}\u2026' on")
    assert line.split("\u2026', ", 1)[1] == "; ".join(says) + ": put first what matters, or shorten"


def test_what_is_cut_is_what_diffusers_says(tiny_sd, caplog):
    theirs, text = logging.getLogger("diffusers"), " ".join(words(90))
    CutTexts(adapt(tiny_sd).text_readers(), "prompts").look_at([text])
    before = theirs.level
    theirs.setLevel(logging.WARNING)
    theirs.addHandler(caplog.handler)
    try:
        tiny_sd.encode_prompt(text, torch.device("cpu"), 1, False)
    finally:
        theirs.setLevel(before)
        theirs.removeHandler(caplog.handler)
    (their_line,) = {r.getMessage() for r in caplog.records if "was truncated" in r.getMessage()}
    (ours,) = said(caplog)
    cut = ours.split("nothing from '")[1].split("\u2026'")[0]
    assert f"['{cut}" in their_line


def test_a_text_that_one_encoder_cuts_is_read_whole_by_the_other(tiny_flux, caplog):
    CutTexts(adapt(tiny_flux).text_readers(), "prompts").look_at([" ".join(words(100))])
    (line,) = said(caplog)
    assert "CLIP reads 77 of its 102 tokens" in line and "T5 reads all of its 101 tokens" in line


def test_a_learned_token_counts_as_its_vectors(tiny_sd, caplog):
    """Textual inversion writes several tokens for one; diffusers' pipeline expands them before it cuts."""
    tiny_sd.load_textual_inversion({"<mine>": torch.zeros(80, tiny_sd.text_encoder.config.hidden_size)})
    CutTexts(adapt(tiny_sd).text_readers(), "prompts").look_at(["a <mine> cat"])
    (line,) = said(caplog)
    assert "CLIP reads 77 of its 84 tokens" in line


class Counted:
    """A tokenizer that counts the texts that it is given."""

    def __init__(self, tokenizer):
        self._tokenizer, self.texts = tokenizer, []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **options):
        self.texts += texts
        return self._tokenizer(texts, **options)


def test_texts_that_are_short_for_certain_are_not_tokenized(tiny_sdxl):
    """A start with 100 000 prompts must not take a minute; neither must each look for learned tokens."""
    readers = adapt(tiny_sdxl).text_readers()
    counted = [TextReader(r.name, Counted(r.tokenizer), r.limit, lambda *_: pytest.fail("converted")) for r in readers]
    long = " ".join(words(90))
    CutTexts(counted, "prompts").look_at([*(f"cat {i}" for i in range(100)), long])
    assert [set(reader.tokenizer.texts) for reader in counted] == [{"", long}] * 2


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_no_text_that_is_cut_passes_for_a_short_one(request, name):
    """ASCII in every mixture; and characters of which normalisation makes several."""
    readers, draw = adapt(request.getfixturevalue(f"tiny_{name}")).text_readers(), random.Random(0)
    alphabets = [[*map(chr, range(128))], ["!"], ["a", " "], [" "], [*"<>/s "], ["</s>", "x"], ["A", "!", " ", "\n"]]
    for reader in readers:
        bound = reader.limit - len(reader.tokens([""])[0])
        texts = ["".join(draw.choices(draw.choice(alphabets), k=bound))[:bound] for _ in range(400)]
        grown = ["\U0001d160" * 18, "\u0344" * 38, "\ufdfa" * 30]
        sizes = {text: len(tokens) for text, tokens in zip(texts + grown, reader.tokens(texts + grown), strict=True)}
        cut = {text for text, size in sizes.items() if size > reader.limit}
        assert cut <= set(reader.unsure(list(sizes))) and reader.unsure(["a cat"]) == []


def test_the_sampler_says_it_once_and_of_negative_prompts_that_are_used(tiny_sd, caplog):
    sampler = DifferentiableSampler(tiny_sd, 1, guidance_scale=3.0)
    long, short = " ".join(words(90)), "a cat"
    with torch.no_grad():
        for _ in range(2):
            sampler([long, short], long, grad_steps=())
    assert [line.split(";")[0] for line in said(caplog)] == [
        "prompts longer than the text encoder reads: 1 of 2",
        "negative prompts longer than the text encoder reads: 1 of 1",
    ]
    caplog.clear()
    unguided = DifferentiableSampler(tiny_sd, 1, guidance_scale=1.0)
    unguided.say_what_is_cut([short], long)
    assert said(caplog) == []


def test_nothing_is_said_of_texts_in_whose_place_embeddings_are_given(tiny_sd, caplog):
    sampler, long = DifferentiableSampler(tiny_sd, 1, guidance_scale=3.0), " ".join(words(90))
    embeds, negative = tiny_sd.encode_prompt("a cat", torch.device("cpu"), 1, True)
    with torch.no_grad():
        sampler(long, long, embeddings={"prompt_embeds": embeds, "negative_prompt_embeds": negative})
    assert said(caplog) == []


def test_many_texts_one_after_the_other_are_few_lines(tiny_sd, caplog):
    cut = CutTexts(adapt(tiny_sd).text_readers(), "prompts", one_by_one=3)
    for i in range(40):
        cut.look_at([" ".join(words(80 + i, seed=i)), f"cat {i}"])
    lines = said(caplog)
    assert [line.split(";")[0].split(": ")[1] for line in lines] == ["1 of 2", "2 of 4", "3 of 6", "30 of 60"]
    assert "111 tokens" in lines[3]  # 109 words and two marks: the longest so far


def test_a_line_shows_no_line_break_or_control_character(tiny_sd, caplog):
    CutTexts(adapt(tiny_sd).text_readers(), "prompts").look_at(["a\ncat\x1b[31m " + " ".join(words(90))])
    (line,) = said(caplog)
    assert "\n" not in line and "\x1b" not in line


@pytest.mark.parametrize("bad", [False, 12, ["a", 3], ("a",)])
def test_negative_prompts_that_are_no_texts_are_refused(tiny_sd, bad):
    """As `negative_prompts: no` in YAML: False, which must not be drawn with."""
    with pytest.raises(ValueError, match="negative_prompts must be a text"):
        DifferentiableSampler(tiny_sd, 1)(["a cat", "a dog"], bad)


def test_half_a_character_is_refused(tiny_sd):
    """As a terminal in Latin-1 gives it to the command line; tokenizers answer with a TypeError."""
    with pytest.raises(ValueError, match="use UTF-8"):
        DifferentiableSampler(tiny_sd, 1)(["caf\udce9"])


def test_a_reward_says_what_it_does_not_read(caplog):
    from alignprop_fast.rewards import get_reward

    caplog.set_level(logging.WARNING)
    reward, images = get_reward("clip"), torch.rand(1, 3, 64, 64)
    for _ in range(2):
        reward(images, ["a red apple and " * 60], [{}])
    (line,) = said(caplog)
    length = reward.parts[0].reward.model.config.text_config.max_position_embeddings
    assert f"the reward's CLIP reads {length} of its" in line
