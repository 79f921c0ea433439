"""Signs of reward hacking: the trained reward rises, and the judge, a watched reward or the diversity falls.

A look is what is known of the policy at one time: an evaluation's row, or a stage's scores. Each look is compared with those
before it. The limits are such that noise does not warn, however often one looks (docs/evaluation.md).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from b2diffurl.experiment.evaluation_table import set_title, with_error
from b2diffurl.experiment.stage_table import Row

RISE_SE = 2.0  # the trained reward has risen if it has by so many standard errors
FALL_SE = 3.5  # a figure has fallen since the first look if it has by so many standard errors …
FALL_SE_OF_BEST = 4.5  # … since the best of many by more, because that is high by chance, too …
MIN_FALL = 0.15  # … and by so many standard deviations of single images
# Diversity has collapsed if it is below such a share of the base's, by so many standard errors. A model that draws fewer
# wrong images is less diverse for a good reason: so right images count where there is a judge, and else only a fall far
# below that of good runs, which keep two thirds of the one and a quarter of the other.
COLLAPSED = {"_right": 0.5, "": 0.2}
COLLAPSE_SE = 3.0

HACKED, UNIFORM = "Reward hacking", "Diversity"
ADVICE = {
    HACKED: "looking at the images: the reward no longer measures what you want. An earlier checkpoint may be better "
    "(run_eval.py --best, where there is a judge; else --all); in a new experiment mix what has fallen into the reward "
    "(reward.weights), or stay nearer to the base model, by fewer stages or a lower train.learning_rate",
    UNIFORM: "looking at the images: if those of a prompt are all alike take an earlier checkpoint, or a new experiment "
    "with fewer stages or a lower train.learning_rate",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over images, its standard error, the standard deviation of single images; and the error of its difference to
    the base model on the same noise, if that is known."""

    mean: float
    error: float
    deviation: float
    gain_error: float | None = None


Look = Mapping[str, Estimate]  # `reward`, what is trained on, and by name the figures that should not fall with it


@dataclass
class Looks:
    """Looks at a policy one after the other, of which each is compared with those before it."""

    all: list[Look] = field(default_factory=list)
    first: dict[str, int] = field(default_factory=dict)  # of a figure the first look that has it, and a reward …
    highest: dict[str, int] = field(default_factory=dict)  # … and that at which it was highest

    def add(self, look: Look) -> None:
        for name in look.keys() - {"reward"} if "reward" in look else ():
            self.first.setdefault(name, len(self.all))
            best = self.highest.get(name)
            if best is None or look[name].mean > self.all[best][name].mean:
                self.highest[name] = len(self.all)
        self.all.append(look)

    def fallen(self, now: Look) -> list[tuple[str, int]]:
        """(name, index of an earlier look) of each figure that has fallen since then, while the reward has risen.

        A figure is compared with the first look, and with the one at which it was highest. Two looks count as independent,
        which is too careful where they are on the same noise.
        """
        found = []
        for name in now.keys() & self.first.keys() if "reward" in now else ():
            for index in dict.fromkeys([self.highest[name], self.first[name]]):
                was, here = self.all[index], now
                paired = index == 0
                limit = FALL_SE if index == self.first[name] else FALL_SE_OF_BEST
                limit *= error_of_change(was[name], here[name], paired=paired)
                limit = max(limit, MIN_FALL * max(was[name].deviation, here[name].deviation))
                rise = RISE_SE * error_of_change(was["reward"], here["reward"], paired=paired)
                if was[name].mean - here[name].mean > limit and here["reward"].mean - was["reward"].mean > rise:
                    found.append((name, index))
                    break
        return sorted(found)


def fallen(before: Sequence[Look], now: Look) -> list[tuple[str, int]]:
    """`Looks.fallen` of a single look after those `before`."""
    looks = Looks()
    for look in before:
        looks.add(look)
    return looks.fallen(now)


def error_of_change(was: Estimate, here: Estimate, *, paired: bool) -> float:
    """The standard error of here - was; `paired` if `was` is the base, so that the error on the same noise counts."""
    if paired and was.gain_error is None and here.gain_error is not None:  # the base has no gain; a curve may lack it
        return here.gain_error
    return math.hypot(was.error, here.error)


# ---- evaluations ----


def evaluation_warnings(rows: Sequence[Row], apart: Mapping[str, float], parts: Collection[str] = ()) -> list[Row]:
    """The warnings of evaluations: kind, what, advice, and the `stage`, `prompts` and `sampler` that they are about.

    `rows` are those of evaluation_rows: one curve for each prompt set and sampler, in the order of training. `apart` are
    the weights of rewards that are normalised each by itself, by name; {} if it is `reward` that is trained on. `parts` are
    the rewards of a mixture: one of them may fall for the others, which is no hacking, for it is trained on.
    """
    found = []
    for curve in curves(rows):
        units = {name: deviation(curve[0], name) or 1.0 for name in apart}
        looks = Looks()
        for row in curve:
            look = evaluation_look(row, apart, units, parts)
            about = {key: row[key] for key in ("stage", "prompts", "sampler")}
            where = f"{set_title(row['prompts']).lower()}, {row['sampler']} sampler"
            for name, index in looks.fallen(look):
                what = change_in_words(name, curve[index], row, mixed=bool(apart))
                found.append({"kind": HACKED, "what": f"{where}: {what}"} | about)
            for name in collapsed(curve[0], row, looks.all[0], look) if looks.all else ():
                what = change_in_words(name, curve[0], row, mixed=bool(apart))
                found.append({"kind": UNIFORM, "what": f"{where}: {what}"} | about)
            looks.add(look)
    return [row | {"phase": "eval", "advice": ADVICE[row["kind"]]} for row in found]


def curves(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each prompt set and sampler."""
    for key in dict.fromkeys((row["prompts"], row["sampler"]) for row in rows):
        yield [row for row in rows if (row["prompts"], row["sampler"]) == key]


def evaluation_look(row: Row, apart: Mapping[str, float], units: Mapping[str, float], parts: Collection[str] = ()) -> Look:
    """The look that an evaluation's row is: reward, accuracy and watched rewards. A figure without an error is left out."""
    names = [key.removesuffix("_se") for key in row if key.endswith("_se") and "/" not in key]
    names = [name for name in names if not name.endswith("_gain") and deviation(row, name) is not None]
    # The judge may be watched, too, under its own name.
    names = [name for name in names if name in ("accuracy", "reward") or row[name] != row.get("accuracy")]
    figures = {
        name: Estimate(row[name], row[f"{name}_se"], deviation(row, name), row.get(f"{name}_gain_se")) for name in names
    }
    if apart:
        mixed = {name: figures.pop(name) for name in apart if name in figures}
        figures.pop("reward", None)
        if len(mixed) == len(apart):
            figures["reward"] = weighed(mixed, apart, units)
    return {name: figure for name, figure in figures.items() if name not in parts}


def deviation(row: Row, name: str) -> float | None:
    """The standard deviation of a figure over images, from its standard error; None if it has none."""
    error, count = row.get(f"{name}_se"), row.get(f"{name}_n", row["n_images"])
    return None if error is None or row.get(name) is None else error * math.sqrt(count)


def weighed(parts: Mapping[str, Estimate], weights: Mapping[str, float], units: Mapping[str, float]) -> Estimate:
    """What is trained on where each reward is normalised by itself: their weighted sum, each in its own unit."""
    size = math.hypot(*weights.values())
    factors = {name: weight / size / units[name] for name, weight in weights.items()}

    def together(errors: Mapping[str, float | None]) -> float | None:
        if None in errors.values():
            return None
        return math.hypot(*(factors[name] * error for name, error in errors.items()))

    return Estimate(
        sum(factors[name] * part.mean for name, part in parts.items()),
        together({name: part.error for name, part in parts.items()}),
        together({name: part.deviation for name, part in parts.items()}),
        together({name: part.gain_error for name, part in parts.items()}),
    )


def collapsed(base: Row, row: Row, first: Look, look: Look) -> list[str]:
    """The diversities that have collapsed while the reward has risen: of right images where there are any, else of all."""
    if base["checkpoint"] != "base" or "reward" not in first or "reward" not in look:
        return []
    if look["reward"].mean - first["reward"].mean <= RISE_SE * error_of_change(first["reward"], look["reward"], paired=True):
        return []
    found = []
    features = [key for key in row if key.startswith("diversity/") and "_" not in key]
    for feature in features:
        known = [which for which in COLLAPSED if None not in (base.get(feature + which), row.get(feature + which))]
        if not known:
            continue
        name, share = feature + known[0], COLLAPSED[known[0]]
        error = math.hypot(row[f"{name}_se"] or 0.0, share * (base[f"{name}_se"] or 0.0))
        if share * base[name] - row[name] > COLLAPSE_SE * error:
            found.append(name)
    return found


def change_in_words(name: str, before: Row, now: Row, *, mixed: bool) -> str:
    """What a figure has done from one evaluation to the next, and what the reward has."""
    fall = f"{name} fell from {with_error(before, name)} ({before['checkpoint']}) to {with_error(now, name)}"
    rise = "" if mixed else f", from {with_error(before, 'reward')} to {with_error(now, 'reward')}"
    return f"{fall}, while what is trained on rose{rise}"
