"""The prompt sets are what they claim: of words that the model knows, and held-out prompts combine them anew."""

import pytest

from alignprop_fast.demo.vocabulary import THINGS, all_words
from alignprop_fast.prompts.rows import load_prompts

NOUNS = {form: thing.noun for thing in THINGS for form in (thing.noun, thing.plural)}
FILLERS = {"a", "an", "and", "on", "background"}


def combinations(prompt: str) -> set[tuple[str, str]]:
    """Pairs (noun, what is said of it): a count, colour or background word, or the other noun."""
    words = [word for word in prompt.split() if word not in FILLERS]
    nouns = [NOUNS[word] for word in words if word in NOUNS]
    said = [NOUNS.get(word, word) for word in words]
    return {(noun, word) for noun in nouns for word in said if word != noun}


@pytest.mark.parametrize("name", ["demo", "demo-heldout", "same-colour", "same-colour-heldout"])
def test_prompts_use_known_words_only(name):
    prompts = load_prompts(name)
    assert len(prompts) == len(set(prompts)) >= 16
    assert {word for prompt in prompts for word in prompt.split()} <= set(all_words())


@pytest.mark.parametrize("name", ["demo", "same-colour"])
def test_heldout_prompts_are_new_combinations(name):
    seen = set().union(*(combinations(prompt) for prompt in load_prompts(name)))
    for prompt in load_prompts(f"{name}-heldout"):
        assert combinations(prompt), f"{prompt!r} combines nothing"
        assert combinations(prompt) - seen, f"every part of {prompt!r} is in the training prompts"
