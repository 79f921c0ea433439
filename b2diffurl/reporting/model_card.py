"""The model card of an export: what it is, how to use it, what it was judged to be, how it was trained.

What is said of training comes from the experiment's files, and no path of this machine is in it.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from b2diffurl.configuration.recorded import recorded_settings
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.experiment.checkpoints import read_state
from b2diffurl.experiment.evaluation_table import (
    SETS,
    describe_sampler,
    evaluation_rows,
    every_evaluation,
    set_title,
    with_error,
)
from b2diffurl.experiment.folder import checkpoint_name, relative_to
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.experiment.stage_table import Row, stage_rows
from b2diffurl.models import Description, family
from b2diffurl.runtime import files

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
MODEL_KEYS = ("model", "clip", "head", "captioner", "scorer")  # settings of a reward that name its models
NUM_PROMPTS, NUM_PICTURES = 6, 4  # shown


@dataclass(frozen=True)
class Exported:
    """A checkpoint that is exported: LoRA file `lora` of the experiment in folder `root`, or from elsewhere."""

    root: Path
    lora: Path
    form: str
    model: ModelSettings  # the base model as it was given
    repository: str  # OWNER/NAME on the hub, or ""

    @property
    def base(self) -> str:
        return self.model.name

    @cached_property
    def family(self) -> Description:
        """The base model's family in words."""
        return family(self.model).describe()

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors" if self.form == "kohya" else LORA_FILE

    @cached_property
    def config(self) -> dict[str, Any]:
        return files.read_json(self.root / "config.json")["config"]

    @property
    def checkpoint(self) -> str:
        return public(checkpoint_name(self.root, self.lora))

    @property
    def stage(self) -> Stage | None:
        """The stage that trained it; None for a LoRA from elsewhere."""
        match = re.match(r"stage(\d+)/", relative_to(self.root, self.lora))
        return Stage(self.root, int(match[1])) if match else None

    @property
    def base_sha256(self) -> str:
        return (read_state(self.lora) or {}).get("base_model_sha256", "")

    def facts(self) -> dict[str, str]:
        """What an export is of, for a program to read."""
        named = {"experiment": self.name, "checkpoint": self.checkpoint, "lora_sha256": files.sha256(self.lora)}
        return named | {"format": self.form, "base_model": public(self.base), "base_model_sha256": self.base_sha256}


def public(name: str) -> str:
    """A hub id, or a relative path, as it is; of a path that says where on a machine something lies, its last part."""
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def on_hub(name: str) -> bool:
    return name.count("/") == 1 and public(name) == name and not name.startswith("model/") and not Path(name).exists()


def write_card(folder: Path, exported: Exported) -> None:
    """README.md, and the pictures that it shows under images/, into the export's folder."""
    from huggingface_hub import ModelCard, ModelCardData

    config, judged = exported.config, judged_rows(exported)
    shown = show_pictures(folder / "images", exported, judged)
    base = exported.base if on_hub(exported.base) else None
    tags = ["text-to-image", *exported.family.tags, "reinforcement-learning", "b2-diffurl"]
    optional = {"widget": shown} if shown else {}
    if results := evaluation_results(exported, judged):
        optional |= {"eval_results": results, "model_name": exported.name}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base,
        base_model_relation=base and ("finetune" if exported.form == "pipeline" else "adapter"),
        tags=tags if exported.form == "pipeline" else ["lora", *tags],
        **optional,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        e=exported,
        base=public(exported.base),
        base_on_hub=bool(base),
        reward=reward_with_models(config["reward"]),
        prompt=shown[0]["text"] if shown else (drawn_prompts(exported) or ["a photo"])[0],
        use=usage(exported),
        grids=copy_grids(folder / "images", exported),
        judged=[table(row, before) for row, before in judged],
        judge=config["eval"]["judge"] if config["eval"]["judge"] not in weights(config["reward"]) else "",
        training=training(exported) if exported.stage else {},
        prompts=drawn_prompts(exported)[:NUM_PROMPTS],
    )
    files.write_bytes(folder / "README.md", (str(card).strip() + "\n").encode())


# ---- before and after ----


def judged_rows(exported: Exported) -> list[tuple[Row, Row]]:
    """The evaluations of this checkpoint, each with the base model's under the same conditions ({} if there is none)."""
    rows = every_evaluation(exported.root)
    base = {row["conditions"]: row for row in rows if row["checkpoint"] == "base"}
    lora = relative_to(exported.root, exported.lora)
    mine = [(row, base.get(row["conditions"], {})) for row in rows if row["lora"] == lora]
    return sorted(mine, key=lambda pair: [*SETS, pair[0]["prompts"]].index(pair[0]["prompts"]))


def table(row: Row, before: Row) -> dict[str, Any]:
    """One evaluation for the template: a title, and lines for reward, accuracy, watched rewards and diversity."""
    measures = [key.removesuffix("_se") for key in row if key.endswith("_se") and not key.endswith("_gain_se")]
    measures = [key for key in measures if "/" not in key or re.fullmatch(r"diversity/[^_]+", key)]
    prompts = set_title(row["prompts"])
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
    """Reward and accuracy in the hub's form."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{prompt_file(exported, row['prompts'])} ({set_title(row['prompts'])})",
            dataset_split=row["prompts"] if row["prompts"] in SETS else None,
            metric_type=key,
            metric_name=f"{key} ({describe_sampler(row)})",
            metric_value=round(row[key], 6),
        )
        for row, _ in judged
        for key in ("reward", "accuracy")
        if row[key] is not None
    ]


def prompt_file(exported: Exported, prompts: str) -> str:
    """Its name; directories are this machine's business."""
    config = exported.config
    if prompts == "train" and config["prompt"]:
        return "one prompt"
    return Path({"train": config["prompt_file"], "test": config["eval"]["prompt_file"]}.get(prompts, prompts)).name


def show_pictures(folder: Path, exported: Exported, judged: list[tuple[Row, Row]]) -> list[dict[str, Any]]:
    """The hub's widget: the first pictures of one evaluation, the deployed sampler's if there is one, copied."""
    for row, _ in sorted(judged, key=lambda pair: pair[0]["sampler"] != "deployed"):
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
    """{prompts: file name} of the report's before-and-after pictures that show this checkpoint, copied."""
    found = {}
    for prompts, title in SETS.items():
        rows = evaluation_rows(exported.root, prompts=prompts, sampler="training")
        path = exported.root / "report" / f"before_after_{prompts}.png"
        if rows and rows[-1]["lora"] == relative_to(exported.root, exported.lora) and path.is_file():
            found[title] = copy(path, folder).name
    return found


def copy(path: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(path, folder / path.name))


# ---- use, and training ----


def usage(exported: Exported) -> dict[str, Any]:
    """How pictures are made with it: the deployed sampler, or for an experiment from before there was one training's."""
    config, deployed = exported.config, exported.config["eval"].get("deployed", {})
    sample = config["sample"]
    chosen = {key: deployed.get(key) or sample[key] for key in ("num_steps", "guidance_scale")}
    eta = deployed.get("eta", sample["eta"])
    scheduler = deployed.get("scheduler", "DDIMScheduler")
    size = exported.model.resolution
    options = {"num_inference_steps": chosen["num_steps"], "guidance_scale": chosen["guidance_scale"]}
    options |= {"eta": eta} if eta else {}
    options |= {"height": size, "width": size} if size else {}
    return {
        "scheduler": scheduler if scheduler.endswith("Scheduler") else f"{scheduler}Scheduler",
        "options": ", ".join(f"{key}={value}" for key, value in options.items()),
        "where": exported.repository or f"path/to/{exported.form}",
        "load": "from_single_file" if exported.base.endswith(".safetensors") else "from_pretrained",
    }


def reward_with_models(settings: Mapping) -> str:
    """Names, weights and models: `clip` (`laion/…`)."""
    parts = []
    for name, weight in weights(settings).items():
        own = settings.get(name) or {}
        named = [public(own[key]) for key in MODEL_KEYS if own.get(key)]
        models = f" ({', '.join(f'`{model}`' for model in named)})" if named else ""
        parts.append(f"`{name}`{models}" if weight == 1 else f"{weight:g} × `{name}`{models}")
    return " + ".join(parts)


def weights(settings: Mapping) -> dict[str, float]:
    """The rewards that were trained on, with their weights, from the section `reward` of a recorded configuration."""
    return dict(settings.get("weights") or {settings["name"]: 1.0})


def drawn_prompts(exported: Exported) -> list[str]:
    """The prompts that this checkpoint and those before it were trained on, in the order in which they were drawn."""
    last = exported.stage.index if exported.stage else -1
    stages = [stage for stage in finished_stages(exported.root, "sample") if stage.index <= last]
    return list(dict.fromkeys(prompt for stage in stages for prompt in files.read_json(stage.prompts)))


def training(exported: Exported) -> dict[str, str]:
    """What is said of the training, by what it is about."""
    stage, config = exported.stage, exported.config
    settings = recorded_settings(config)
    rows = [row for row in stage_rows(exported.root) if row["stage"] <= stage.index]
    earlier = sum(row.get("num_updates", 0) for row in rows if row["stage"] < stage.index)
    queries, updates = rows[-1]["queries"], earlier + read_state(exported.lora)["num_updates"]
    steps = [row["num_trained_steps"] for row in rows]
    num_steps, objective = settings["sample.num_steps"], settings["train.objective"]
    found = {
        "checkpoint": f"{exported.checkpoint}, of stage0 to stage{settings['stage_cnt'] - 1}",
        "budget": f"{queries:,} images scored, {updates:,} updates (stages: {len(rows)})",
        "reward": reward_with_models(config["reward"]),
        "prompts": f"{len(drawn_prompts(exported)):,} drawn from `{prompt_file(exported, 'train')}`",
        "schedule": f"{settings['curriculum']}: the last {span(steps)} of {num_steps} steps are trained",
        "sampling": f"{settings['sampling']}, {settings['split_time']} images a group; DDIM, η {settings['sample.eta']:g}, "
        f"guidance {settings['sample.guidance_scale']:g}",
        "selection": f"{settings['eval.selection']}, advantage by {settings['eval.advantage']}",
        "objective": f"{objective}, clip range {settings['train.eps']:g}" if objective in ("ddpo", "dpok") else objective,
        "optimizer": f"AdamW, learning rate {settings['train.learning_rate']:g}",
        "LoRA": f"rank {settings['train.lora_rank']} = alpha, on the attention of the {exported.family.network}, float32",
        "seed": str(settings["seed"]),
    }
    if settings["resume_from"]:
        found["started from"] = f"`{public(settings['resume_from'])}`"
    if stage.finished("train"):
        versions = stage.manifest("train")["versions"]
        found["software"] = ", ".join(f"{key} {versions[key]}" for key in ("torch", "diffusers", "transformers", "peft"))
    return found


def span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
