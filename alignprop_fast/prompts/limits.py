"""Reports prompts that are longer than a text encoder reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

logger = logging.getLogger(__name__)

_SHOWN = 40  # characters of a text that a message shows


@dataclass(frozen=True)
class TextReader:
    """The tokenizer of a text encoder and its limit.

    name: of the encoder. limit: tokens that it reads, including the special tokens at the ends of a text. converted:
    changes the text before tokenizing, if a pipeline writes learned tokens into it. in_chat: writes the text into a
    chat, whose marks count too, and whose last ones a long text pushes out.
    """

    name: str
    tokenizer: Any
    limit: int
    converted: Callable[[str, Any], str] | None = None
    in_chat: Callable[[str, Any], str] | None = None

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """All tokens of each text, without truncation."""
        if self.converted is not None and self._has_learned():
            texts = [self.converted(text, self.tokenizer) for text in texts]
        texts = list(texts) if self.in_chat is None else [self.in_chat(text, self.tokenizer) for text in texts]
        return self.tokenizer(texts, truncation=False)["input_ids"]

    def unsure(self, texts: Sequence[str]) -> list[str]:
        """The texts that may be longer than the limit, found without tokenizing each.

        A token has at least one character, except the special tokens and the space that T5 puts before a text. This
        holds for ASCII only, because tokenizers normalise other characters, some to many (NFC makes three of U+1D160).
        """
        if self._has_learned():
            return list(texts)
        (marks,) = self.tokens([""])
        most = self.limit - len(marks) - 1
        return [text for text in texts if len(text) > most or not text.isascii()]

    def _has_learned(self) -> bool:
        """Whether tokens were added; a pipeline writes `token_1` and so on after the first."""
        special = set(self.tokenizer.all_special_tokens)
        return any(token not in special or token.endswith("_1") for token in self.tokenizer.added_tokens_encoder)

    def says(self, text: str) -> str:
        """Says how much of the text is read."""
        (tokens,) = self.tokens([text])
        if len(tokens) <= self.limit:
            return f"{self.name} reads all of its {len(tokens)} tokens"
        # A cut text ends with its mark all the same, but not in a chat.
        left_out = self.tokenizer.decode(tokens[self.limit :] if self.in_chat else tokens[self.limit - 1 : -1])
        return f"{self.name} reads {self.limit} of its {len(tokens)} tokens, nothing from {_begin(left_out)} on"


class CutTexts:
    """Logs one line that says how many texts are cut, and what is cut from the longest.

    Texts of several calls are counted together. The line is logged again when more are cut, up to `one_by_one`; after
    that, when ten times as many are cut.

    Args:
        readers: each reads every text.
        what: the word for the texts in the line, in the plural.
    """

    def __init__(self, readers: Sequence[TextReader], what: str, one_by_one: int = 10):
        self._readers, self._what, self._one_by_one = readers, what, one_by_one
        self._seen: set[str] = set()
        self._cut = 0
        self._longest = (0, "")  # tokens, text
        self._said_from = 1  # log from this number on

    def look_at(self, texts: Iterable[str]) -> None:
        """Count these texts; known ones cost nothing."""
        new = [text for text in dict.fromkeys(texts) if text not in self._seen]
        if not new or not self._readers:
            return
        self._seen.update(new)
        unsure = list(dict.fromkeys(text for reader in self._readers for text in reader.unsure(new)))
        if not unsure:
            return
        by_reader = [[(len(tokens), reader.limit) for tokens in reader.tokens(unsure)] for reader in self._readers]
        for text, lengths in zip(unsure, zip(*by_reader, strict=True), strict=True):
            if any(length > limit for length, limit in lengths):
                self._cut += 1
                self._longest = max(self._longest, (max(lengths)[0], text), key=itemgetter(0))
        if self._cut >= self._said_from:
            self._said_from = self._cut + 1 if self._cut < self._one_by_one else 10 * self._cut
            _, longest = self._longest
            says = dict.fromkeys(reader.says(longest) for reader in self._readers)
            logger.warning(
                "%s longer than the text encoder reads: %d of %d; of the longest, %s, %s: put first what matters, or "
                "shorten",
                self._what,
                self._cut,
                len(self._seen),
                _begin(longest),
                "; ".join(says),
            )


def _begin(text: str) -> str:
    """The beginning of a text without line breaks and control characters."""
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + "\u2026")
