"""The two prompt sets are what they claim: speakable by the model, and apart from each other."""

import pytest

from alignprop_fast.demo import prompts_path
from alignprop_fast.demo.vocabulary import THINGS, all_words

NOUNS = {form: thing.noun for thing in THINGS for form in (thing.noun, thing.plural)}
FILLERS = {"a", "an", "and", "on", "background"}


def read(heldout: bool) -> list[str]:
    return prompts_path(heldout).read_text(encoding="utf-8").splitlines()


def combinations(prompt: str) -> set[tuple[str, str]]:
    """Pairs (noun, what is said of it): a count, colour or background word, or the other noun."""
    words = [word for word in prompt.split() if word not in FILLERS]
    nouns = [NOUNS[word] for word in words if word in NOUNS]
    said = [NOUNS.get(word, word) for word in words]
    return {(noun, word) for noun in nouns for word in said if word != noun}


@pytest.mark.parametrize("heldout", [False, True])
def test_prompts_use_known_words_only(heldout):
    prompts = read(heldout)
    assert len(prompts) == len(set(prompts)) >= 16
    assert {word for prompt in prompts for word in prompt.split()} <= set(all_words())


def test_heldout_prompts_are_new_combinations():
    seen = set().union(*(combinations(prompt) for prompt in read(heldout=False)))
    for prompt in read(heldout=True):
        assert combinations(prompt), f"{prompt!r} combines nothing"
        assert combinations(prompt) - seen, f"every part of {prompt!r} is in the training prompts"
