"""What a run refuses before its first image: one list of checks, which the sample phase makes and --dry_run shows.

The sample phase raises the first error, in every stage: what a later phase would refuse is refused before hours of work are
lost. The dry run makes all checks and lists every fault. There nothing is downloaded (`hub.only_looking`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.keys import KEYS
from b2diffurl.configuration.limits import ModelName
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import named_prompts
from b2diffurl.configuration.settings import ModelSettings, Settings
from b2diffurl.evaluation.features import check_features
from b2diffurl.evaluation.generate import SAMPLERS
from b2diffurl.evaluation.measure import named_scorers
from b2diffurl.experiment import lock
from b2diffurl.experiment.origin import history_stages, require_origin
from b2diffurl.models import base_sizes, check_base, family_of
from b2diffurl.models.known import expected_family
from b2diffurl.phases.inputs import check_sampler, identified, reward_checksums
from b2diffurl.rewards import check_rewards, probe_rewards, reward_module
from b2diffurl.runtime import files, hub
from b2diffurl.runtime.device import choose_device
from b2diffurl.runtime.hub import DownloadNeededError, MissingModelError

QUICK_BYTES = 500e6  # files of a model that are read for their checksums in a dry run, at most
NAMES_A_SETTING = re.compile(r"\b(reward|eval|pretrained|train|sample)\.[a-z]|prompt_file")

# What is wrong with settings, files, packages, servers and, RuntimeError, a module of the user's.
FAULTS = (ValueError, OSError, ImportError, SafetensorError, RuntimeError)


@dataclass(frozen=True)
class Check:
    """One check."""

    run: Callable[[], object]  # raises one of FAULTS
    about: str = ""  # what it is about, if others need that in order
    needs: tuple[str, ...] = ()  # if one of these has failed, this check would only say the same again


@dataclass
class Findings:
    """What a dry run has found."""

    faults: list[str] = field(default_factory=list)  # a sentence for each reason why the run would not start
    downloads: dict[str, tuple[str, int]] = field(default_factory=dict)  # {model: (the setting that asks for it, bytes)}


def check_later_phases(plan: Plan) -> None:
    """Raise the error that selecting, training or judging would raise later, as far as it shows without loading a model."""
    for check in later_phases(plan):
        check.run()


def inspect(plan: Plan) -> Findings:
    """Make all checks of the run's first minute, without writing or downloading anything. `plan` is the next stage's.

    A server that a reward asks is tried as the run tries it (`rewards.probe_rewards`).
    """
    return carry_out((*later_phases(plan), *first_stage(plan), *models(plan.settings)))


def inspect_settings(settings: Settings) -> Findings:
    """Make those checks that need no plan, where none can be made: of a prompt file that is missing, for example."""
    return carry_out((*parts(settings), *rewards_made(settings), *models(settings)))


def carry_out(checks: Iterable[Check]) -> Findings:
    """Make all checks, but for those that would only repeat what another has said."""
    found, failed, seen = Findings(), set(), set()
    with hub.only_looking() as looking:
        for check in checks:
            if failed.isdisjoint(check.needs):
                try:
                    check.run()
                except FAULTS as error:
                    failed.add(check.about)
                    note(found, error, seen)
    found.downloads = {name: (key, looking.num_bytes.get(name, 0)) for name, (key, _) in found.downloads.items()}
    return found


def note(found: Findings, error: BaseException, seen: set[str]) -> None:
    """Add what a check has found, once for each model that is missing and once for each sentence."""
    said = sentence(error)
    about = error.model if isinstance(error, MissingModelError) else said
    if isinstance(error, DownloadNeededError):
        found.downloads.setdefault(error.model, (error.setting, 0))
    elif about not in seen:
        found.faults.append(said)
    seen.add(about)


def sentence(error: BaseException) -> str:
    """What an error says, with its notes, in a line."""
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", ())]).split())


# ---- the checks ----


def later_phases(plan: Plan) -> Iterator[Check]:
    """What every sample phase checks, even of a finished stage, because a later phase may not be finished."""
    settings = plan.settings
    # A finished stage need not wait for this. Whatever loads the model later refuses the same.
    yield from (check for check in parts(settings) if check.about != "pretrained.model" or not plan.stage.finished("train"))
    yield from rewards_made(settings)
    yield from rewards_fit(plan)
    for name in settings.judging.diversity:
        yield Check(partial(check_features, name, settings.judging, settings.rewards, plan.prompts))
    yield Check(partial(check_windows, plan), needs=("pretrained.model",))
    for sampler in SAMPLERS.values():  # for the error that it raises if diffusers has no such scheduler
        yield Check(partial(sampler, settings), needs=("pretrained.model",))


def parts(settings: Settings) -> Iterator[Check]:
    """Base model, device and optimizer."""
    yield Check(partial(check_base, settings.model), "pretrained.model")
    yield Check(partial(choose_device, settings.compute))
    yield Check(partial(check_optimizer, settings))


def rewards_made(settings: Settings) -> Iterator[Check]:
    """Whether each reward, and the judge, can be made."""
    rewards, judge = settings.rewards, settings.judging.judge
    trained = (*rewards.weights, *rewards.watched)
    for name in dict.fromkeys((*trained, *([judge] if judge else ()))):
        made = partial(check_reward, settings, name, ()) if name in trained else partial(check_judge, settings, ())
        yield Check(made, f"reward {name}")


def rewards_fit(plan: Plan) -> Iterator[Check]:
    """Whether each reward can score the training prompts and the held-out ones."""
    settings, rewards, judge = plan.settings, plan.settings.rewards, plan.settings.judging.judge
    for name in (*rewards.weights, *rewards.watched):
        yield Check(partial(check_reward, settings, name, plan.prompts), needs=(f"reward {name}",))
    yield Check(partial(check_judge, settings, plan.prompts), needs=(f"reward {judge}",))
    for name in named_scorers(settings):
        yield Check(partial(check_held_out_prompts, settings, [name]), needs=(f"reward {name}",))


def first_stage(plan: Plan) -> Iterator[Check]:
    """What else the run checks before the first batch of its next stage."""
    settings, stage = plan.settings, plan.stage
    yield Check(partial(lock.refuse_another, stage.root))
    yield Check(partial(files.require_writable, stage.folder))
    yield Check(partial(files.require_writable, Path(settings.output.log_path)))
    yield Check(partial(require_origin, stage))
    if stage.finished("sample"):
        return
    for name in named_scorers(settings):
        yield Check(partial(probe_rewards, [name], settings.rewards), needs=(f"reward {name}",))
    yield Check(partial(history_stages, stage, settings.selection.num_history_stages))
    if (stage.root / "config.json").is_file():
        yield Check(partial(compare_quickly, plan), needs=("pretrained.model",))


def models(settings: Settings) -> Iterator[Check]:
    """Whether each model is here or can be downloaded. A check above names the first one that it lacks."""
    yield Check(partial(find_base, settings.model), needs=("pretrained.model",))
    for key, model in asked_models(settings).items():
        yield Check(partial(find_model, key, model))


def find_base(model: ModelSettings) -> None:
    """Raise a MissingModelError if a part of the base model is not here, or, if the hub answers, a DownloadNeededError."""
    if name := expected_family(model):
        family_of(name).locate(model)


def find_model(key: str, model: str) -> None:
    """The same of the model that setting `key` names, of whatever kind it is."""
    with hub.naming_settings({key: model}):
        hub.locate(model, patterns=hub.MODEL_PARTS, weights=("*.safetensors", "*.bin", "*.pth"))


def asked_models(settings: Settings) -> dict[str, str]:
    """{key: model} of the rewards that are used."""
    judge = settings.judging.judge
    used = dict.fromkeys((*settings.rewards.weights, *settings.rewards.watched, *([judge] if judge else ())))
    named = {f"reward.{name}.{key}": value for name in used for key, value in settings.rewards.own.get(name, {}).items()}
    return {key: value for key, value in named.items() if isinstance(KEYS[key].limit, ModelName) and value}


def compare_quickly(plan: Plan) -> None:
    """Compare base model and rewards with those that the experiment was begun with, if their files are small."""
    base = base_sizes(plan.settings.model)
    if base and 4 * sum(base.weights.values()) < QUICK_BYTES:
        identified(plan)
    rewards = plan.settings.rewards
    read = [path for name in rewards.weights for path in reward_module(name).files(name, rewards.own.get(name, {}))]
    if sum(path.stat().st_size for path in read) < QUICK_BYTES:
        reward_checksums(plan)


def check_windows(plan: Plan) -> None:
    """Raise a ValueError if the base model cannot be sampled or trained as any stage of the run does it."""
    windows = [plan.window, *Budget.of(plan.settings).planned_windows(plan.stage.root)]
    check_sampler(plan, Window(min(one.start for one in windows), max(one.stop for one in windows)))


def check_reward(settings: Settings, name: str, prompts: Sequence[str]) -> None:
    """Raise an error that names a setting if a reward that is trained on or watched cannot be made, or score a prompt."""
    rewards = settings.rewards
    try:
        check_rewards([name], rewards, prompts)
    except (ValueError, ImportError) as error:
        if NAMES_A_SETTING.search(str(error)):
            raise
        kind = ImportError if isinstance(error, ImportError) else ValueError
        setting = "reward.watch" if name in rewards.watched else "reward.weights" if rewards.mixed else "reward.name"
        raise kind(f"{setting}: {error}") from None


def check_judge(settings: Settings, prompts: Sequence[str]) -> None:
    """Raise a ValueError that names eval.judge if the judge cannot score one of the training prompts."""
    if judge := settings.judging.judge:
        try:
            check_rewards([judge], settings.rewards, prompts)
        except ValueError as error:
            raise ValueError(
                f"eval.judge, {judge}, cannot score the prompts (--config.eval.judge= is none): {error}"
            ) from None


def check_held_out_prompts(settings: Settings, scorers: Sequence[str]) -> None:
    """Raise a ValueError that names eval.prompt_file if one of the `scorers`, judge or reward, cannot score its prompts.

    All of them do when a checkpoint is judged.
    """
    prompts = [prompt for _, prompt in named_prompts(settings.prompts, "test")]
    try:
        check_rewards(scorers, settings.rewards, prompts)
    except ValueError as error:
        path = settings.prompts.held_out_file
        raise ValueError(f"eval.prompt_file, {path}, has held-out prompts that cannot be scored: {error}") from None


def check_optimizer(settings: Settings) -> None:
    """Raise an ImportError if the optimizer's package is not installed."""
    if settings.training.optimizer.use_8bit and not find_spec("bitsandbytes"):
        raise ImportError("train.use_8bit_adam is True, which needs bitsandbytes: pip install bitsandbytes")
