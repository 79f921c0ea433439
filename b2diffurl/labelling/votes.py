"""What people answer about a stage's images, and the score that each image gets from it.

G groups, K images (siblings) in a group, N = G*K images; image n is number n % K of group n // K, counted from 0

There are two ways to judge. Each keeps its own answers, because their scores do not mean the same; a stage is scored in one.

pick  The best and the worst of each group. They score 1 and -1, the others 0; all score 0 if none is better. So the mean of
      each group is 0, and that of a prompt: `selection.advantage` prompt and group do the same, and groups are not compared.
rate  Every image, from 1 (bad) to 5 (good), which is its score. It means the same in all groups of a prompt, so
      `selection.advantage=prompt` compares them, too.

Images of a group with equal scores are not told apart; if all of a prompt's images are equal nothing is learnt from them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from b2diffurl.configuration.limits import shown

MODES = ("pick", "rate")
WORST_RATING, BEST_RATING = 1, 5
NO_DIFFERENCE = ()

Pick = tuple[int | None, ...]  # (best, worst), numbers in the group, None while it is open; or NO_DIFFERENCE


@dataclass(frozen=True)
class Votes:
    """The answers about a stage's G groups of K images. `changed` makes new ones of them."""

    num_groups: int
    num_siblings: int
    mode: str  # one of MODES: the way in which the stage will be scored
    picks: Mapping[int, Pick] = field(default_factory=dict)  # by group; a group that was not answered is not in it
    ratings: Mapping[int, int] = field(default_factory=dict)  # by image

    @classmethod
    def none(cls, num_groups: int, num_siblings: int) -> "Votes":
        """No answers yet. Of a group of one image there is no best and worst, so it is rated."""
        return cls(num_groups, num_siblings, "pick" if num_siblings > 1 else "rate")

    def changed(self, change: Any) -> "Votes":
        """These answers with one more, another, or one less (null); a ValueError if it is none of the three forms

        {"mode": "rate"}, {"group": 3, "pick": [best, worst], [] or null}, {"image": 17, "rating": 1 to 5 or null}.
        """
        match change:
            case {"mode": mode, **rest} if not rest:
                return replace(self, mode=self.checked_mode(mode))
            case {"group": group, "pick": pick, **rest} if not rest:
                return replace(self, picks=put(self.picks, self.checked_group(group), pick, self.checked_pick))
            case {"image": image, "rating": rating, **rest} if not rest:
                return replace(self, ratings=put(self.ratings, self.checked_image(image), rating, checked_rating))
        raise ValueError(f"{shown(change)} is no answer: a mode, a group and its pick, or an image and its rating")

    def checked_mode(self, mode: Any) -> str:
        if mode not in MODES:
            raise ValueError(f"the mode is {shown(mode)}; there are {' and '.join(MODES)}")
        if mode == "pick" and self.num_siblings < 2:
            raise ValueError("a group of one image has no best and worst; the images of this stage can only be rated")
        return mode

    def checked_group(self, group: Any) -> int:
        return number("group", group, range(self.num_groups))

    def checked_image(self, image: Any) -> int:
        return number("image", image, range(self.num_groups * self.num_siblings))

    def checked_pick(self, pick: Any) -> Pick:
        if not isinstance(pick, list | tuple) or len(pick) not in (0, 2):
            raise ValueError(f"the pick is {shown(pick)}; it must be [best, worst], or [] for no difference")
        pick = tuple(None if one is None else number("picked image", one, range(self.num_siblings)) for one in pick)
        if pick and pick[0] == pick[1]:
            raise ValueError(f"the pick is {shown(pick)}; best and worst must be two images, or [] for no difference")
        return pick

    def is_picked(self, group: int) -> bool:
        """Whether best and worst of a group are both picked, or that there is no difference."""
        return group in self.picks and None not in self.picks[group]

    @property
    def open_groups(self) -> list[int]:
        """The groups that still lack an answer, or of which an image lacks its rating, in the present mode."""
        if self.mode == "pick":
            return [group for group in range(self.num_groups) if not self.is_picked(group)]
        rated = [n in self.ratings for n in range(self.num_groups * self.num_siblings)]
        starts = range(0, len(rated), self.num_siblings)
        return [group for group, start in enumerate(starts) if not all(rated[start : start + self.num_siblings])]

    def scores(self) -> list[int]:
        """The score of each image [N], in the present mode; a ValueError if a group is open."""
        if self.open_groups:
            raise ValueError(f"{len(self.open_groups)} of {self.num_groups} groups are still open")
        if self.mode == "rate":
            return [self.ratings[n] for n in range(self.num_groups * self.num_siblings)]
        scores = [0] * (self.num_groups * self.num_siblings)
        for group, pick in self.picks.items():
            for sibling, score in zip(pick, (1, -1), strict=False):
                scores[group * self.num_siblings + sibling] = score
        return scores

    def to_json(self) -> dict[str, Any]:
        """As `read` takes it."""
        return {"mode": self.mode, "picks": dict(sorted(self.picks.items())), "ratings": dict(sorted(self.ratings.items()))}

    def read(self, content: Mapping[str, Any]) -> "Votes":
        """These answers, and those that `to_json` gave and a JSON file kept; a ValueError for any that cannot be."""
        picks = {self.checked_group(as_number(group)): self.checked_pick(pick) for group, pick in content["picks"].items()}
        rated = content["ratings"].items()
        ratings = {self.checked_image(as_number(image)): checked_rating(rating) for image, rating in rated}
        return replace(self, mode=self.checked_mode(content["mode"]), picks=picks, ratings=ratings)


def put(answers: Mapping[int, Any], place: int, answer: Any, checked: Callable[[Any], Any]) -> dict[int, Any]:
    """Answers with one at this place; None takes back the one that is there."""
    others = {one: given for one, given in answers.items() if one != place}
    return others if answer is None else others | {place: checked(answer)}


def checked_rating(rating: Any) -> int:
    return number("rating", rating, range(WORST_RATING, BEST_RATING + 1))


def number(name: str, value: Any, allowed: range) -> int:
    """A whole number of a JSON file; a ValueError if it is none, or not allowed."""
    if type(value) is not int or value not in allowed:
        raise ValueError(f"the {name} is {shown(value)}; it must be a number from {allowed.start} to {allowed.stop - 1}")
    return value


def as_number(key: str) -> int | str:
    """The key of a JSON object as the number that it stands for; another text stays what it is."""
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
