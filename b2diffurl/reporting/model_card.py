"""The model card of an export: what it is, how to use it, how it was judged, how it was trained.

Everything comes from the experiment's files. A card is published, so no path of this machine may be in it (`public`).
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from yaml import YAMLError

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.recorded import recorded_settings, setting_changes
from b2diffurl.configuration.settings import ModelSettings, combined_text, read_tree, reward_weights
from b2diffurl.experiment.checkpoints import read_state
from b2diffurl.experiment.evaluation_table import (
    SETS,
    describe_sampler,
    evaluation_rows,
    every_evaluation,
    set_title,
    with_error,
)
from b2diffurl.experiment.folder import checkpoint_name, is_average, relative_to
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.experiment.stage_table import Row, stage_rows
from b2diffurl.models import Description, family
from b2diffurl.runtime import files
from b2diffurl.runtime.hub import find_local
from b2diffurl.runtime.paths import resource

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
MODEL_KEYS = ("model", "clip", "head", "captioner", "scorer")  # keys of a reward's settings that name its models
NUM_PROMPTS, NUM_PICTURES = 6, 4  # how many the card shows


@dataclass(frozen=True)
class Exported:
    """A checkpoint to export: the LoRA file `lora`, of the experiment in folder `root` or from elsewhere."""

    root: Path
    lora: Path
    form: str  # one of export.FORMATS
    model: ModelSettings  # the base model as it was given
    repository: str  # OWNER/NAME on the hub, or ""
    dtype: str = "float32"  # of a pipeline's weights
    license: str = ""  # as the hub writes it; "": not known

    @property
    def base(self) -> str:
        """The base model's name: a hub id, or a path of this machine.

        A copy on this machine has the hub id that was recorded in training, if it was compared with that model.
        """
        recorded = self.config["pretrained"]["model"]
        moved = self.base_sha256 and on_hub(recorded) and not on_hub(self.model.name)
        return recorded if moved else self.model.name

    @cached_property
    def family(self) -> Description:
        """The base model's family in words."""
        return family(self.model).describe(self.model)

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def file(self) -> str:
        """The name of the exported LoRA file."""
        return f"{self.name}.safetensors" if self.form == "kohya" else LORA_FILE

    @cached_property
    def config(self) -> dict[str, Any]:
        """The experiment's recorded configuration."""
        return files.read_json(self.root / "config.json")["config"]

    @property
    def checkpoint(self) -> str:
        """What results call the checkpoint: `stage3`, `stage3/checkpoint_1`."""
        return public(checkpoint_name(self.root, self.lora))

    @property
    def stage(self) -> Stage | None:
        """The stage that trained the checkpoint; None for a LoRA from elsewhere."""
        match = re.match(r"stage(\d+)/", relative_to(self.root, self.lora))
        return Stage(self.root, int(match[1])) if match else None

    @property
    def base_sha256(self) -> str:
        """The fingerprint of the base model that it was trained on; "" for a LoRA from elsewhere."""
        return (read_state(self.lora) or {}).get("base_model_sha256", "")

    def facts(self) -> dict[str, str]:
        """What was exported, for programs: the content of export.json."""
        source = {"experiment": self.name, "checkpoint": self.checkpoint, "lora_sha256": files.sha256(self.lora)}
        return source | {"format": self.form, "base_model": public(self.base), "base_model_sha256": self.base_sha256}


def public(name: str) -> str:
    """A model's name without the folders of this machine: of an absolute path, or one that begins with `~` or `.`, its last
    part; a hub id or another relative path unchanged."""
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def one_line(text: str) -> str:
    """A user's text, such as a prompt, without lines and marks that are not printed, such as those a terminal obeys."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def inline(text: str) -> str:
    """A user's text as Markdown may show it between backticks, in a list or in a table's cell."""
    return one_line(text).replace("`", "'").replace("|", "¦")


def string_literal(text: str) -> str:
    """The text as a string of Python on one line, without backticks: three of them would end the card's block of code."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() and c != "`" else f"\\U{ord(c):08x}" for c in quoted)


def base_license(model: ModelSettings) -> str:
    """The license that the base model's own card names, as the hub writes it; "" if no such card is on this machine."""
    from huggingface_hub import ModelCard

    root = find_local(model.name, "README.md", revision=model.revision)
    if root is None or not (root / "README.md").is_file():
        return ""
    try:
        license = ModelCard.load(root / "README.md").data.get("license")
    except (ValueError, OSError, YAMLError):  # somebody else's file: without it no license is known
        return ""
    return license if isinstance(license, str) else ""


def on_hub(name: str) -> bool:
    """Whether a base model's name reads like a hub id and is not a path of this machine. The hub is not asked."""
    return name.count("/") == 1 and public(name) == name and not name.startswith("model/") and not resource(name).exists()


def write_card(folder: Path, exported: Exported) -> None:
    """Write README.md into the export's folder, and the pictures that it shows into images/ below it."""
    from huggingface_hub import ModelCard, ModelCardData

    config, judged = exported.config, checkpoint_evaluations(exported)
    shown = show_pictures(folder / "images", exported, judged)
    base = exported.base if on_hub(exported.base) else None  # the hub refuses a card whose base_model is no hub id
    tags = ["text-to-image", *exported.family.tags, "reinforcement-learning", "b2-diffurl"]
    prompt = shown[0]["text"] if shown else (drawn_prompts(exported) or ["a photo"])[0]
    # Entries without content are left out of the metadata. Results need a model_name beside them.
    optional = {"widget": [row | {"text": one_line(row["text"])} for row in shown]} if shown else {}
    if results := evaluation_results(exported, judged):
        optional |= {"eval_results": results, "model_name": exported.name}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base,
        license=exported.license or None,
        base_model_relation=base and ("finetune" if exported.form == "pipeline" else "adapter"),
        tags=tags if exported.form == "pipeline" else ["lora", *tags],
        **optional,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        e=exported,
        base=inline(public(exported.base)),
        base_on_hub=bool(base),
        reward=reward_with_models(config["reward"]),
        prompt=string_literal(prompt),
        use=usage(exported),
        grids=copy_grids(folder / "images", exported),
        judged=[table(row, before) for row, before in judged],
        judge=config["eval"]["judge"] if config["eval"]["judge"] not in reward_weights(config["reward"]) else "",
        training=training(exported) if exported.stage else {},
        prompts=[inline(prompt) for prompt in drawn_prompts(exported)[:NUM_PROMPTS]],
    )
    files.write_bytes(folder / "README.md", (str(card).strip() + "\n").encode())


# ---- before and after ----


def checkpoint_evaluations(exported: Exported) -> list[tuple[Row, Row]]:
    """(evaluation of this checkpoint, the base model's under the same conditions or {}), held-out prompts first."""
    rows = every_evaluation(exported.root)
    base = {row["conditions"]: row for row in rows if row["checkpoint"] == "base"}
    lora = relative_to(exported.root, exported.lora)
    mine = [(row, base.get(row["conditions"], {})) for row in rows if row["lora"] == lora]
    return sorted(mine, key=lambda pair: [*SETS, pair[0]["prompts"]].index(pair[0]["prompts"]))


def table(row: Row, before: Row) -> dict[str, Any]:
    """One evaluation for the template: a title, and a line (figure, base, tuned, gain) for each reward and diversity."""
    measures = [key.removesuffix("_se") for key in row if key.endswith("_se") and not key.endswith("_gain_se")]
    # Neither parts of rewards (clip/part) nor further figures of a diversity (diversity/clip_vendi): the report has them.
    measures = [key for key in measures if "/" not in key or re.fullmatch(r"diversity/[^_]+", key)]
    prompts = set_title(row)
    return {
        "title": f"{prompts} ({row['n_prompts']}), {row['n_images']} images, {describe_sampler(row)}",
        "lines": [
            [
                key.replace("diversity/", "diversity, "),
                with_error(before, key) or "–",
                with_error(row, key) or "–",
                with_error(row, f"{key}_gain", signed=True) or "–",
            ]
            for key in measures
            if row[key] is not None
        ],
    }


def evaluation_results(exported: Exported, judged: list[tuple[Row, Row]]) -> list[Any]:
    """Reward and accuracy in the form in which the hub shows results."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{prompt_file(exported, row['prompts'])} ({set_title(row)})",
            dataset_split=row["prompts"] if row["prompts"] in SETS else None,  # a prompt file is no split
            metric_type=key,
            metric_name=f"{key} ({describe_sampler(row)})",
            metric_value=round(row[key], 6),
        )
        for row, _ in judged
        for key in ("reward", "accuracy")
        if row[key] is not None
    ]


def prompt_file(exported: Exported, prompts: str) -> str:
    """The name of a prompt set's file, without its folders, which are this machine's business."""
    config = exported.config
    if prompts == "train" and config["prompt"]:
        return "one prompt"
    named = {"train": config["prompt_file"], "test": config["eval"]["prompt_file"]}.get(prompts, prompts)
    return inline(Path(named).name)


def show_pictures(folder: Path, exported: Exported, judged: list[tuple[Row, Row]]) -> list[dict[str, Any]]:
    """Copy an evaluation's first pictures to `folder`; returns them in the form of the hub's widget, [] if there are none.

    The deployed sampler's evaluation comes first: that is how readers will sample.
    """
    for row, _ in sorted(judged, key=lambda pair: pair[0]["sampler"] != "deployed"):  # stable: held-out prompts stay first
        source = exported.root / row["folder"]
        pictures = sorted(source.glob("[0-9]*.png"))[:NUM_PICTURES]
        if pictures:
            prompts = files.read_json(source / "result.json")["shown_prompts"]
            urls = [f"images/{copy(path, folder).name}" for path in pictures]
            return [
                {"text": prompts[int(path.stem)], "output": {"url": url}} for path, url in zip(pictures, urls, strict=True)
            ]
    return []


def copy_grids(folder: Path, exported: Exported) -> dict[str, str]:
    """Copy the report's before-and-after pictures if they show this checkpoint; returns {prompt set's title: file name}.

    They show the newest evaluated stage, so for another checkpoint there are none.
    """
    copied = {}
    for prompts in SETS:
        rows = evaluation_rows(exported.root, prompts=prompts, sampler="training")
        path = exported.root / "report" / f"before_after_{prompts}.png"
        if rows and rows[-1]["lora"] == relative_to(exported.root, exported.lora) and path.is_file():
            copied[set_title(rows[-1])] = copy(path, folder).name
    return copied


def copy(path: Path, folder: Path) -> Path:
    """Copy a file into `folder`, which is made if it is missing; returns the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(path, folder / path.name))


# ---- use, and training ----


def usage(exported: Exported) -> dict[str, Any]:
    """How to sample with it, for the template: the deployed sampler's settings.

    Experiments of earlier versions recorded none, so settings that are missing are those of training.
    """
    config, deployed = exported.config, exported.config["eval"].get("deployed", {})
    sample = config["sample"]
    chosen = {key: deployed.get(key) or sample[key] for key in ("num_steps", "guidance_scale")}
    eta = deployed.get("eta", sample["eta"])
    scheduler = deployed.get("scheduler") or exported.family.scheduler
    size = exported.model.resolution
    options = {"num_inference_steps": chosen["num_steps"], "guidance_scale": chosen["guidance_scale"]}
    is_flow = exported.family.is_flow
    options |= {"eta": eta} if eta and not is_flow else {}  # 0 is the pipeline's default; those of flow matching have none
    options |= {"height": size, "width": size} if size else {}  # else the pipeline's own size, which is training's
    tokens = exported.model.max_sequence_length
    options |= {"max_sequence_length": tokens} if is_flow and tokens >= 0 else {}  # of effect there alone
    single = exported.base.endswith(".safetensors")
    # Without it transformers takes the type that is stored, and diffusers float32. Older diffusers know no `dtype`.
    dtype = {"torch_dtype": f"torch.{exported.dtype}"} | dict.fromkeys(exported.family.absent)
    # Only a model of several files has variants, and only one on the hub has revisions.
    which = {} if single or not exported.model.variant else {"variant": string_literal(exported.model.variant)}
    if on_hub(exported.base) and exported.model.revision != "main":
        which |= {"revision": string_literal(exported.model.revision)}
    return {
        "scheduler": scheduler if scheduler.endswith("Scheduler") else f"{scheduler}Scheduler",
        "options": keywords(options),
        # A placeholder: the folder's path must not be published.
        "where": string_literal(exported.repository or f"path/to/{exported.form}"),
        "base": string_literal(public(exported.base)),
        "file": string_literal(exported.file),
        "dtype": keywords(dtype),
        "load_options": keywords(which | dtype),
        "load": "from_single_file" if single else "from_pretrained",
    }


def keywords(options: Mapping[str, Any]) -> str:
    """Arguments of a call, in Python."""
    return ", ".join(f"{key}={value}" for key, value in options.items())


def reward_with_models(settings: Mapping) -> str:
    """The rewards with their weights and models, in Markdown: `` `clip` (`laion/…`) + 0.1 × `aesthetic` ``."""
    parts = []
    for name, weight in reward_weights(settings).items():
        own = settings.get(name) or {}
        named = [inline(public(own[key])) for key in MODEL_KEYS if own.get(key)]
        models = f" ({', '.join(f'`{model}`' for model in named)})" if named else ""
        parts.append(f"`{name}`{models}" if weight == 1 else f"{weight:g} × `{name}`{models}")
    return " + ".join(parts) + combined_text(settings.get("combine", "sum"))  # older experiments have no such key


def drawn_prompts(exported: Exported) -> list[str]:
    """The distinct prompts of all stages up to this checkpoint's, in the order in which they were drawn."""
    last = exported.stage.index if exported.stage else -1
    stages = [stage for stage in finished_stages(exported.root, "sample") if stage.index <= last]
    return list(dict.fromkeys(prompt for stage in stages for prompt in files.read_json(stage.prompts)))


def training(exported: Exported) -> dict[str, str]:
    """The rows of the card's table "Training", {heading: text}: of the training up to this checkpoint and not after it."""
    stage, config = exported.stage, exported.config
    # The stage's own: config.json has those of the newest stage.
    settings = recorded_settings(config) | flatten(stage.manifest("sample").get("settings", {}))
    rows = [row for row in stage_rows(exported.root) if row["stage"] <= stage.index]
    earlier = sum(row.get("num_updates", 0) for row in rows if row["stage"] < stage.index)
    # The checkpoint's own stage may have gone on after it, so its updates are counted by its state.json.
    queries, updates = rows[-1]["queries"], earlier + read_state(exported.lora)["num_updates"]
    num_steps, tree = settings["sample.num_steps"], read_tree(settings)
    windows = [Stage(exported.root, row["stage"]).sampled_window(num_steps) for row in rows]
    layers = "attention and MLPs" if settings.get("train.lora_mlp") else "the attention"
    entries = {
        "checkpoint": f"{exported.checkpoint}, of stage0 to stage{settings['stage_cnt'] - 1}",
        "budget": f"{queries:,} images scored, {updates:,} updates (stages: {len(rows)})",
        "reward": reward_with_models(config["reward"]),
        "prompts": f"{len(drawn_prompts(exported)):,} drawn from `{prompt_file(exported, 'train')}`",
        "schedule": f"{settings['curriculum']}: {trained_text(windows, num_steps)} are trained",
        "sampling": f"{settings['sampling']}, {tree.num_leaves} images a group{tree.text}; "
        f"{sampler_text(settings, exported.family)}, guidance {settings['sample.guidance_scale']:g}",
        "selection": f"{settings['selection.images']}, advantage by {settings['selection.advantage']}",
        "objective": objective_text(settings),
        "optimizer": f"AdamW, learning rate {rate_text(settings)}",
        **({"weights": average_text(settings["train.ema"])} if is_average(exported.checkpoint) else {}),
        "LoRA": f"rank {settings['train.lora_rank']} = alpha, on {layers} of the {exported.family.network}, float32",
        "seed": str(settings["seed"]),
    }
    sampled = [one for one in finished_stages(exported.root, "sample") if one.index <= stage.index]
    recorded = {one.index: one.manifest("sample").get("settings") for one in sampled}
    if changes := setting_changes(recorded, files.read_json(exported.root / "config.json")):
        entries["changed"] = "; ".join(f"from stage{row['stage']} on {row['change']}" for row in changes)
    if settings["resume_from"]:
        entries["started from"] = f"`{inline(public(settings['resume_from']))}`"
    if stage.finished("train"):
        versions = stage.manifest("train")["versions"]
        entries["software"] = ", ".join(f"{key} {versions[key]}" for key in ("torch", "diffusers", "transformers", "peft"))
    return entries


def trained_text(windows: list[Window], num_steps: int) -> str:
    """Which of T steps the stages trained: `the last 14 to 20 of 20 steps`, or `steps 1-2 to 7-8 of 8`."""
    if all(window.stop == num_steps for window in windows):
        return f"the last {span([window.num_steps for window in windows])} of {num_steps} steps"
    ends = dict.fromkeys(f"{window.start + 1}-{window.stop}" for window in (windows[0], windows[-1]))
    return f"steps {' to '.join(ends)} of {num_steps}"


def sampler_text(settings: Mapping[str, Any], family: Description) -> str:
    """What sampled the images that were trained on."""
    steps = settings["sample.sde"] if family.is_flow else "DDIM"
    return settings.get("sample.scheduler") or f"{steps}, η {settings['sample.eta']:g}"


def objective_text(settings: Mapping[str, Any]) -> str:
    """The objective with its clip range, and with what guidance it trains if a guidance of its own was given."""
    name = settings["train.objective"]
    clip = {"ddpo": "train.eps", "dpok": "train.eps", "awm": "train.awm_clip"}.get(name)
    trained = settings.get("train.guidance_scale")
    guided = {None: "", 0: "", 1: ", trained without guidance"}.get(trained, f", trained at guidance {trained}")
    return name + (f", clip range {settings[clip]:g}" if clip else "") + guided


def rate_text(settings: Mapping[str, Any]) -> str:
    """The learning rate, and to what it falls in the last stage of the run."""
    first, factor = settings["train.learning_rate"], settings.get("train.final_rate", 1.0)
    falls = factor != 1 and settings["stage_cnt"] > 1
    return f"{first:g}" + (f", falling to {first * factor:g} in the last stage" if falls else "")


def average_text(decay: float) -> str:
    """What an averaged LoRA is."""
    return f"the exponential average of the LoRA over its updates, decay {decay:g}; not the LoRA after the last one"


def span(numbers: list[int]) -> str:
    """Smallest and largest in words, `2 to 5`, or the one value that all have."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
