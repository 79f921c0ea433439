"""What a vision-language model has answered, as a number from 0 to 1, or NaN where it cannot be read."""

import json
import math
import re
from collections.abc import Mapping

WORD = re.compile(r"^[^a-z]*(yes|no)[^a-z]*$")
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"


def yes_probability(first_token: Mapping[str, float]) -> float:
    """The probability of yes, if the answer is yes or no; `first_token` has log-probabilities of its possible first tokens.

    Tokens count whatever their case and what stands around them: "Yes", " yes" and "\u2581yes." are added up. NaN if neither
    yes nor no is among the tokens.
    """
    chances = {"yes": 0.0, "no": 0.0}
    for token, log_prob in first_token.items():
        word = WORD.search(token.lower())
        if word and math.isfinite(log_prob):
            chances[word[1]] += math.exp(log_prob)
    total = sum(chances.values())
    return chances["yes"] / total if total > 0 else math.nan


def rating(text: str, lowest: float, highest: float) -> float:
    """The number from `lowest` to `highest` that the text gives, as a share of the way from one to the other.

    It is the entry "score" of a JSON object anywhere in the text. A text without one must have a single number in it, as in
    "Score: 7" or "7/10". NaN if there is none, if there are several, or if the number lies outside.
    """
    found = [one for one in json_scores(text)] or plain_numbers(text, highest)
    value = found[-1] if len(set(found)) == 1 else math.nan
    return (value - lowest) / (highest - lowest) if lowest <= value <= highest else math.nan


def json_scores(text: str) -> list[float]:
    """The entry "score" of each JSON object in the text; NaN for one that is no number."""
    scores = []
    for part in re.findall(r"\{[^{}]*\}", text):
        try:
            entries = json.loads(part, parse_constant=lambda _: math.nan)
        except ValueError:
            continue
        if "score" in entries:
            scores.append(as_number(entries["score"]))
    return scores


def as_number(value: object) -> float:
    """A number, or a text that is one, as a float; else NaN."""
    if isinstance(value, str) and re.fullmatch(NUMBER, value.strip()):
        return float(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def plain_numbers(text: str, highest: float) -> list[float]:
    """The numbers in a text; of "7/10" and "7 out of 10" the first, if the second is `highest`."""
    out_of = rf"\s*(?:/|out of)\s*{highest:g}(?![\d.]*\d)"
    return [float(number) for number in re.findall(NUMBER, re.sub(rf"({NUMBER}){out_of}", r"\1", text))]
