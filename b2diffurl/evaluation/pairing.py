"""Which evaluations of two experiments pair; if none do, why not, and which commands of run_eval.py would make it so."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from b2diffurl.configuration.commands import judging_command
from b2diffurl.configuration.recorded import exchanged
from b2diffurl.evaluation.comparison import SAMPLER_KEYS, Compared, Judged, compare, judged_of, judged_otherwise, same_noise
from b2diffurl.experiment.evaluation_table import SETS, set_title
from b2diffurl.experiment.folder import short_names
from b2diffurl.experiment.stage import finished_stages
from b2diffurl.runtime import files


@dataclass(frozen=True)
class Pairing:
    """Two experiments: what was compared, or why they could not be, and the commands that would make it so."""

    roots: tuple[Path, Path]
    judged: tuple[Judged, Judged] | None = None
    compared: tuple[Compared, ...] = ()
    others: tuple[str, ...] = ()  # figures that are not the same in both
    reasons: tuple[str, ...] = ()
    commands: dict[Path, tuple[str, ...]] = field(default_factory=dict)  # {experiment to judge: the words of the command}

    @property
    def names(self) -> list[str]:
        """What the two are called."""
        return list(short_names(self.roots).values())


def pair_all(roots: Sequence[Path], prompts: str, sampler: str, damaged: list[str] | None = None) -> list[Pairing]:
    """`pair` of every two experiments. One that has to be judged gets one command: to be judged as the first named was."""
    found, commanded = [], set()
    for both in combinations(roots, 2):
        pairing = pair(both, prompts, sampler, damaged)
        new = {root: words for root, words in pairing.commands.items() if root not in commanded}
        found.append(replace(pairing, commands=new))
        commanded |= new.keys()
    return found


def pair(roots: tuple[Path, Path], prompts: str, sampler: str, damaged: list[str] | None = None) -> Pairing:
    """Compare the newest stages of two experiments on a prompt set by a sampler.

    What pairs is found by content: a file that one calls `test` may have another name in the other.
    """
    first, second = (judged_of(root, damaged) for root in roots)
    wanted = [[one for one in some if is_wanted(one, prompts, sampler)] for some in (first, second)]
    for some, others, turned in ((wanted[0], second, False), (wanted[1], first, True)):
        for one in some:
            for other in sorted(others, key=lambda each: not is_wanted(each, prompts, sampler)):
                if same_noise(one, other):
                    both = (other, one) if turned else (one, other)
                    return Pairing(roots, both, *compare(*both))
    missing = [root for root, some in zip(roots, wanted, strict=True) if not some]
    if missing:
        return not_judged(roots, missing, next((one for some in wanted for one in some), None), prompts, sampler)
    return explained(roots, wanted[0][0], wanted[1][0], prompts, sampler)


def is_wanted(judged: Judged, prompts: str, sampler: str) -> bool:
    return (judged.row["prompts"], judged.row["sampler"]) == (prompts, sampler)


# ---- why not, and what to do ----


def not_judged(
    roots: tuple[Path, Path], missing: Sequence[Path], like: Judged | None, prompts: str, sampler: str
) -> Pairing:
    """The pairing of experiments of which some were not judged; `like` is the other one's evaluation, if it has one."""
    reasons, commands = [], {}
    for root in missing:
        if not finished_stages(root, "train"):
            reasons.append(f"{root.name} has no trained stage yet")
            continue
        reasons.append(f"{root.name} was not judged on {set_title(prompts).lower()} by the {sampler} sampler")
        commands[root] = judging(root, like, prompts, sampler)
    return Pairing(roots, reasons=tuple(reasons), commands=commands)


def explained(roots: tuple[Path, Path], first: Judged, second: Judged, prompts: str, sampler: str) -> Pairing:
    """The pairing of experiments that were judged otherwise: in what, and the command that judges the second so, too."""
    if parts := exchanged(first.record.get("base_model", {}), second.record.get("base_model", {})):
        what = f"they are of different base models ({', '.join(parts)}), whose images are never on the same noise"
        return Pairing(roots, reasons=(what,))
    reasons = judged_otherwise(first, second)
    if reasons:
        return Pairing(roots, reasons=tuple(reasons), commands={second.root: judging(second.root, first, prompts, sampler)})
    unknown = [one for one in (first, second) if not one.base]
    if unknown:
        names = " and ".join(one.root.name for one in unknown)
        why = (
            f"the base model was not judged beside {names}, or by an earlier version, so nothing shows that the noise is one"
        )
    else:
        why = "the base model drew other images in both: on other machines, or by other versions of torch or diffusers"
        unknown = [first, second]
    return Pairing(roots, reasons=(why,), commands={one.root: judging(one.root, first, prompts, sampler) for one in unknown})


def judging(root: Path, like: Judged | None, prompts: str, sampler: str) -> tuple[str, ...]:
    """The command that judges base and newest stage of the experiment in `root`, in all that decides noise as `like` was."""
    record = files.read_json(root / "config.json")
    options: dict[str, Any] = {}
    chosen = prompts
    if like:
        options |= {"eval.num_images": like.result["n_images"], "eval.seed": like.seed, "eval.batch_size": like.batch_size}
        options |= sampler_options(like, record["config"], sampler)
        chosen = prompt_file(like, record["config"], prompts)
    words = judging_command(root, record, options)
    return (*words, "--checkpoint=base,last", f"--prompts={chosen}", f"--sampler={sampler}")


def sampler_options(like: Judged, begun: dict[str, Any], sampler: str) -> dict[str, Any]:
    """The keys by which an experiment that was begun so samples as `like` did, as far as it would not."""
    section, here = ("sample", begun["sample"])
    if sampler == "deployed":
        section, here = "eval.deployed", begun["eval"].get("deployed", {})
    wanted = {key: like.row.get(key) for key in SAMPLER_KEYS}
    return {f"{section}.{key}": value for key, value in wanted.items() if value not in (None, "") and here.get(key) != value}


def prompt_file(like: Judged, begun: dict[str, Any], prompts: str) -> str:
    """What the experiment that was begun so must be given as --prompts to be judged on those of `like`."""
    if prompts not in SETS:
        return prompts
    theirs = {"test": like.config["eval"]["prompt_file"], "train": like.config["prompt_file"]}[prompts]
    own = {"test": begun["eval"]["prompt_file"], "train": begun["prompt_file"]}[prompts]
    return prompts if theirs == own else theirs
