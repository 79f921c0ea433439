"""The scenes of prompts in GenEval's forms, from their words: `a photo of two clocks`, `a red apple left of a dog`."""

import re
from dataclasses import replace

from b2diffurl.rewards.geneval import COLORS, Scene, Wanted, require_possible

FORMS = (
    '"a clock", "two clocks", "a red apple", "a bench and a cat", "a red apple and a green cup", "a dog left of a bench" '
    '(also right of, above, below), each also after "a photo of"'
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Words that are part of a sentence and not of an object's name.
OF_SENTENCES = {
    "a", "an", "the", "of", "in", "on", "at", "with", "without", "and", "or", "by", "for", "from", "to", "near", "next",
    "under", "over", "behind", "beside", "between", "is", "are", "no", "not", "some", "many",
    *NUMBERS, *(set(COLORS) - {"orange"}),
}  # fmt: skip
MAX_WORDS = 3  # of an object's name
SINGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "knives": "knife", "wolves": "wolf", "leaves": "leaf", "loaves": "loaf",
    "shelves": "shelf", "calves": "calf", "scarves": "scarf", "ties": "tie", "pies": "pie", "cookies": "cookie",
    "lenses": "lens", "shoes": "shoe", "toes": "toe", "canoes": "canoe", "movies": "movie", "zombies": "zombie",
    "skises": "skis", "scissorses": "scissors", "sheep": "sheep", "deer": "deer", "fish": "fish", "skis": "skis",
    "scissors": "scissors",
}  # fmt: skip


def scene_of(prompt: str) -> Scene:
    """The scene that a plain prompt asks for; a ValueError if its form is none of FORMS.

    A number is exact, as in GenEval: three clocks are not two clocks. `a clock` may be two.
    """
    words = " ".join(prompt.lower().split()).rstrip(".")
    words = re.sub(r"^(a|the) (photo|picture|image|photograph) of ", "", words)
    related = re.split(r" (?:to the |on the )?(left of|right of|above|below) ", words)
    if len(related) == 3:
        first, relation, second = related
        # GenEval's order: what it is seen from comes first.
        wanted = [read_thing(second, prompt), read_thing(first, prompt)]
        named = [wanted[0][0], replace(wanted[1][0], relation=relation, target=0)]
    elif len(related) == 1:
        wanted = [read_thing(thing, prompt) for thing in re.split(r",? and |, ", words)]
        named = [one for one, _ in wanted]
    else:
        raise unknown(prompt)
    scene = Scene(tuple(named), tuple((one.name, one.count + 1) for one, exact in wanted if exact))
    try:
        require_possible(scene)
    except ValueError as error:
        raise ValueError(f"the prompt {prompt!r} cannot be judged: {error}") from None
    return scene


def read_thing(words: str, prompt: str) -> tuple[Wanted, bool]:
    """An object of a prompt, and whether exactly so many are meant: `a red apple`, `two clocks`."""
    first, *rest = words.split(" ")
    exact = first in NUMBERS or first in map(str, range(1, len(NUMBERS) + 1))
    if not exact and first not in ("a", "an"):
        raise unknown(prompt)
    count = (NUMBERS.index(first) + 1 if first in NUMBERS else int(first)) if exact else 1
    color = rest[0] if len(rest) > 1 and rest[0] in COLORS else ""  # an orange is a fruit, an orange cup is not
    name = rest[1:] if color else rest
    if not 1 <= len(name) <= MAX_WORDS or not all(map(is_noun, name)) or any(word.endswith("ing") for word in name[1:]):
        raise unknown(prompt)  # a dining table is an object, a cat sleeping is a sentence
    if count > 1:
        name = [*name[:-1], singular(name[-1])]
    return Wanted(" ".join(name), count, color), exact


def is_noun(word: str) -> bool:
    """Whether a word may be part of an object's name, as far as its letters tell."""
    return word not in OF_SENTENCES and bool(re.fullmatch(r"[^\W\d_][\w'-]*", word))


def singular(word: str) -> str:
    """A noun's singular by English rules of thumb: clocks -> clock, buses -> bus, benches -> bench."""
    if word in SINGULAR:
        return SINGULAR[word]
    if re.search(r"(ss|us)$", word):
        return word
    if re.search(r"(ss|sh|ch|x|tz|o|[^o]us)es$", word):
        return word[:-2]
    if re.search(r"[^aeiou]ies$", word):
        return f"{word[:-3]}y"
    return word.removesuffix("s")


def unknown(prompt: str) -> ValueError:
    return ValueError(
        f"reward compose cannot tell what the prompt {prompt!r} asks for. Give a file with its metadata as "
        f"reward.compose.metadata (docs/rewards.md), or write it in one of the forms {FORMS}."
    )
