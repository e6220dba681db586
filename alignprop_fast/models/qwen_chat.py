"""How Z-Image and FLUX.2-klein give a text to Qwen3: as a user's message in a chat."""

from typing import Any

QWEN_TOKENS = 512  # that are read, with the chat's marks


def in_chat(text: str, tokenizer: Any, thinking: bool) -> str:
    """The text in the tokenizer's chat template. thinking: whether the answer may begin with a thought."""
    message = {"role": "user", "content": text}
    return tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
