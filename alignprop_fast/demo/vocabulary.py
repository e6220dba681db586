"""What the demo model can draw (things, colours, counts, backgrounds), and the words for it in a caption."""

from dataclasses import dataclass

COUNT_WORDS = {2: "two", 3: "three", 4: "four"}

# Plain backgrounds by name, as RGB. White is the default, which captions do not name.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "blue": (70, 130, 225),
    "green": (90, 185, 105),
    "yellow": (250, 220, 90),
    "pink": (250, 175, 205),
    "black": (25, 25, 30),
}


@dataclass(frozen=True)
class Thing:
    """One drawable thing. `colour` is "" if it has only one; `codepoint` names its emoji (hexadecimal)."""

    noun: str
    plural: str
    colour: str
    codepoint: str
    default_colour: bool = True  # without a colour word, the noun means this one


THINGS = (
    Thing("apple", "apples", "red", "1f34e"),
    Thing("apple", "apples", "green", "1f34f", default_colour=False),
    Thing("banana", "bananas", "", "1f34c"),
    Thing("strawberry", "strawberries", "", "1f353"),
    Thing("carrot", "carrots", "", "1f955"),
    Thing("mushroom", "mushrooms", "", "1f344"),
    Thing("cat", "cats", "", "1f431"),
    Thing("dog", "dogs", "", "1f436"),
    Thing("panda", "pandas", "", "1f43c"),
    Thing("frog", "frogs", "", "1f438"),
    Thing("fish", "fish", "", "1f41f"),
    Thing("sun", "suns", "", "2600"),
    Thing("star", "stars", "", "2b50"),
    Thing("moon", "moons", "", "1f319"),
    Thing("heart", "hearts", "red", "2764"),
    Thing("heart", "hearts", "blue", "1f499", default_colour=False),
    Thing("car", "cars", "red", "1f697"),
    Thing("car", "cars", "blue", "1f699", default_colour=False),
    Thing("boat", "boats", "", "26f5"),
    Thing("tree", "trees", "", "1f333"),
    Thing("flower", "flowers", "", "1f337"),
    Thing("house", "houses", "", "1f3e0"),
    Thing("balloon", "balloons", "", "1f388"),
)


def noun_phrase(thing: Thing, count: int, name_colour: bool) -> str:
    """ "a red apple", "two cats": article or count word, colour word, noun."""
    colour = thing.colour if name_colour or not thing.default_colour else ""
    words = [word for word in (colour, thing.noun if count == 1 else thing.plural) if word]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([COUNT_WORDS.get(count, article), *words])


def all_words() -> list[str]:
    """Every word that a caption can contain: the corpus of the tokenizer."""
    words = {"a", "an", "and", "on", "background", *COUNT_WORDS.values(), *BACKGROUNDS}
    for thing in THINGS:
        words.update(word for word in (thing.noun, thing.plural, thing.colour) if word)
    return sorted(words)
