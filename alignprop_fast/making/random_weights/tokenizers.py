"""The tokenizers of the pipelines: small, in the real formats of CLIP, T5 and Qwen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTEXT_LENGTH = 77
QWEN_LENGTH = 2048
_MERGES = ("t h", "th e</w>", "r e", "re d</w>", "c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>")


def _byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in the vocabularies of GPT-2, CLIP and Qwen."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def clip_vocabulary() -> dict[str, int]:
    """Token to id in the order of CLIP's vocabulary: bytes, bytes that end a word, merges, the two special tokens."""
    letters = _byte_letters()
    merged = [merge.replace(" ", "") for merge in _MERGES]
    tokens = letters + [letter + "</w>" for letter in letters] + merged + ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def end_id() -> int:
    return clip_vocabulary()["<|endoftext|>"]


def clip_tokenizer(folder: Path, pad_token: str) -> Any:
    from transformers import CLIPTokenizer

    write_clip_tokenizer(folder, pad_token)
    return CLIPTokenizer.from_pretrained(folder)


def write_clip_tokenizer(folder: Path, pad_token: str) -> None:
    """The four files of a published CLIP tokenizer, which transformers 4 and 5 both read."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES]) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces of a Unigram model with their scores, in T5's order: the three special tokens, then pieces."""
    words = ["▁" + word for word in ("the", "red", "cat", "dog", "and")]
    letters = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    return [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((word, -2.0) for word in words),
        *((x, -4.0) for x in letters),
    ]


def t5_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer in the two files that all versions of transformers read without sentencepiece."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    marks = ("<pad>", "</s>", "<unk>")
    tokenizer = Tokenizer(models.Unigram(t5_vocabulary(), unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": 512,
        "extra_ids": 0,
        **dict(zip(("pad_token", "eos_token", "unk_token"), marks, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return T5TokenizerFast.from_pretrained(folder)


# In byte-level BPE a letter G with a dot stands for the space before a word.
_QWEN_MERGES = (
    *("h e", "t he", "e d", "r ed", "a t", "c at", "o g", "d og", "n d", "a nd"),
    *("Ġ the", "Ġ red", "Ġ cat", "Ġ dog", "Ġ and"),
)
QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Krea 2 counts five tokens in the end of its chat, of which this word is one.
KREA_MARKS = (*QWEN_MARKS, "assistant")
_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}{{ part.text }}{% endfor %}"
    "[/{{ message.role }}]{% endfor %}"
)


def qwen_vocabulary() -> dict[str, int]:
    """Token to id in the order of Qwen's vocabulary: bytes, then merges; the marks come after them."""
    merged = [merge.replace(" ", "") for merge in _QWEN_MERGES]
    return {token: index for index, token in enumerate(dict.fromkeys([*_byte_letters(), *merged]))}


def qwen_tokenizer(folder: Path, chat: str = _QWEN_CHAT, marks: tuple[str, ...] = QWEN_MARKS) -> Any:
    """A tokenizer like that of Qwen3. chat: the template; the default writes what Qwen3's writes for one message."""
    from transformers import Qwen2TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": QWEN_LENGTH,
        "added_tokens_decoder": {
            str(len(qwen_vocabulary()) + index): {"content": mark, "special": True, "normalized": False}
            for index, mark in enumerate(marks)
        },
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "bos_token": None,
        "chat_template": chat,
    }
    (folder / "vocab.json").write_text(json.dumps(qwen_vocabulary(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_QWEN_MERGES]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Qwen2TokenizerFast.from_pretrained(folder)


def gemma_tokenizer(folder: Path) -> Any:
    """Qwen's tokenizer with a mark before each text, as Gemma's has, so that an empty text has a token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begin, qwen = "<|im_start|>", qwen_tokenizer(folder)
    inner = qwen.backend_tokenizer
    inner.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, qwen.convert_tokens_to_ids(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=begin, pad_token="<|endoftext|>", model_max_length=QWEN_LENGTH
    )
