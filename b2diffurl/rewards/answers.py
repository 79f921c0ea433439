"""What a vision-language model has answered, as a number from 0 to 1, or NaN where it cannot be read."""

import math
import re
from collections.abc import Mapping

LONGEST = 2_000  # characters of an answer that are kept, and that are read of its end
LEAST_CHANCE = 0.01  # of yes and no together; below, the model was about to say something else
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
SCORE = rf"""["']score["']\s*:\s*["']?({NUMBER})["']?\s*[,}}]"""  # so a number that was cut off is not read
# Around a word: blanks, Markdown, brackets, quotes. Ġ and Ċ are a blank and a line's end where a server shows bytes.
AROUND = re.compile(r"^[\W_ĠĊ]+|[\W_]+$")


def word(token: str) -> str:
    """The word in a token, in small letters, without what stands around it: yes of "Yes", " yes", "**Yes", "Ġyes"."""
    return AROUND.sub("", token).lower()


def yes_probability(first_token: Mapping[str, float]) -> float:
    """The probability of yes, if the answer is yes or no; `first_token` has log-probabilities of its possible first tokens.

    Tokens that are the same `word` are added up. NaN if neither yes nor no is likely.
    """
    chances = {"yes": 0.0, "no": 0.0}
    for token, log_prob in first_token.items():
        if word(token) in chances and math.isfinite(log_prob):
            chances[word(token)] += math.exp(min(log_prob, 0.0))
    total = sum(chances.values())
    return chances["yes"] / total if total >= LEAST_CHANCE else math.nan


def rating(text: str, lowest: float, highest: float, *, is_cut: bool = False) -> float:
    """The number from `lowest` to `highest` that the text gives, as a share of the way from one to the other.

    It is the entry "score" of a JSON object anywhere in the text. A text without an object must have a single number in it,
    as in "Score: 7" or "7/10"; if it `is_cut`, that number must be all of it. What the model has thought before, up to
    </think>, does not count. NaN if there is no number, if there are several, or if it lies outside.
    """
    said = text.rpartition("</think>")[2]
    is_cut = is_cut or len(said) > LONGEST
    said = re.sub(r"[*`]", "", said[-LONGEST:])  # Markdown
    # Of "7/10" and "7 out of 10" the first, if the second is the highest rating.
    said = re.sub(rf"({NUMBER})\s*\(?(?:/|out of)\s*{highest:g}(?![\d.]*\d)", r"\1", said)
    found = re.findall(SCORE, said, re.IGNORECASE)
    if not found and "{" not in said and not (is_cut and not re.fullmatch(NUMBER, said.strip())):
        found = re.findall(NUMBER, said)
    values = {float(number) for number in found}
    value = values.pop() if len(values) == 1 else math.nan
    return (value - lowest) / (highest - lowest) if lowest <= value <= highest else math.nan


def shortened(text: str) -> str:
    """An answer as it is kept: of a long one the beginning and the end, where the number is."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[1 - LONGEST // 2 :]}"
