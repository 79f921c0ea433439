"""The plan of a run for people: what `bash run_process.sh --dry_run` prints. Nothing here writes, or loads a model."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ml_collections import ConfigDict
from safetensors import safe_open

from b2diffurl.configuration.budget import (
    at_most,
    most_selected,
    most_updates,
    num_evaluations,
    num_groups,
    num_images,
    planned_steps,
)
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.configuration.settings import describe_reward, read_settings
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.reporting.forecast import judging_left, num_done, number, time_text
from b2diffurl.runtime import files
from b2diffurl.runtime.device import choose_device

LORA_WEIGHTS = r"\.to_(q|k|v|out\.0)\.weight$"  # what carries a LoRA


@dataclass(frozen=True)
class Base:
    """What the sizes of files follow from."""

    latent_shape: tuple[int, int, int]  # C, h, w
    image_px: int
    embedding: int  # numbers in a prompt's embedding
    lora: int  # numbers in a LoRA of rank 1


def describe(config: ConfigDict, plan: Plan) -> str:
    """The plan, for people."""
    root = plan.stage.root
    steps = planned_steps(config, root)
    device, precision = device_text(config, plan.settings.compute.num_threads)
    watched = f"; watched: {', '.join(config.reward.watch)}" if config.reward.watch else ""
    trained = repr(config.prompt) if config.prompt else config.prompt_file
    held_out = len(load_prompts(config.eval.prompt_file))
    in_one = config.train.batch_size * config.train.gradient_accumulation_steps
    facts = {
        "experiment": f"{config.exp_name} in {root}, {state_text(config, root)}",
        "preset": config.preset or "none",
        "base model": f"{config.pretrained.model}, LoRA of rank {config.train.lora_rank}",
        "starts from": config.resume_from or "a fresh LoRA",
        "reward": describe_reward(config.reward) + watched,
        "prompts": f"{len(plan.prompts)} of {trained}; held-out: {held_out} of {config.eval.prompt_file}",
        "device": f"{device}, {precision}",
        "seeds": f"{config.seed} of the experiment, {config.eval.seed} of the evaluations",
        "a stage": f"{num_groups(config)} groups of {config.split_time} images; trained on {at_most(config)}"
        f"{most_selected(config)}, {in_one} an update, epochs: {config.train.num_epochs}",
    }
    base = find_base(config.pretrained)
    embedding_bytes = 4 if precision == "float32" else 2
    volumes = [trajectory_bytes(config, base, S, len(plan.prompts), embedding_bytes) for S in steps] if base else []
    lines = [f"{name:<13}{fact}" for name, fact in facts.items()]
    lines += ["", *stage_table(config, steps, volumes), ""]
    lines += [f"{'disk':<13}{disk_text(config, root, base, volumes) if base else 'unknown until the base model is here'}"]
    lines += [f"{'time':<13}{time_text(config, root)}"]
    return "\n".join(lines)


def device_text(config: ConfigDict, num_threads: int) -> tuple[str, str]:
    """Where a run takes place, and in which precision the network's weights are."""
    cuda, precision = choose_device(read_settings(config).compute)
    names = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
    threads = f"CPU, threads: {num_threads or torch.get_num_threads()}"
    return torch.cuda.get_device_name(config.dev_id) if cuda else threads, names[precision]


def state_text(config: ConfigDict, root: Path) -> str:
    """How far an experiment is."""
    stages = [Stage(root, index) for index in range(config.stage_cnt)]
    if not (root / "config.json").is_file():
        return "new"
    following = next((stage for stage in stages if not stage.finished("train")), None)
    if following is None:
        return f"all {config.stage_cnt} stages finished"
    phase = next(phase for phase in PHASES if not following.finished(phase))
    return f"{num_done(config, root)} of {config.stage_cnt} stages finished; goes on with {phase} of stage{following.index}"


def stage_table(config: ConfigDict, steps: Sequence[int], volumes: Sequence[int]) -> list[str]:
    """Lines: a row for each S, with what one of its stages asks for, and one for all."""
    stages = defaultdict(list)
    for index, num_steps in enumerate(steps):
        stages[num_steps].append(index)
    updates = f"updates{', at most' if at_most(config) else ''}"
    rows = [["a stage", f"S of {config.sample.num_steps}", "images", "network evaluations", updates, "trajectories"]]
    for num_steps, members in sorted(stages.items()):
        volume = size(volumes[members[0]]) if volumes else "?"
        counts = [num_images(config), num_evaluations(config, num_steps), most_updates(config)]
        rows.append([stages_text(members), str(num_steps), *(f"{count:,}" for count in counts), volume])
    totals = [len(steps) * num_images(config), sum(num_evaluations(config, one) for one in steps)]
    totals.append(len(steps) * most_updates(config))
    rows.append(["in all", "", *(f"{count:,}" for count in totals), size(sum(volumes)) if volumes else "?"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def stages_text(members: Sequence[int]) -> str:
    """Such as `stage3`, `stages 0-14`, or of stages that do not follow one another `7 stages`."""
    if len(members) == 1:
        return f"stage{members[0]}"
    together = members[-1] - members[0] == len(members) - 1
    return f"stages {members[0]}-{members[-1]}" if together else f"{len(members)} stages"


# ---- disk ----


def disk_text(config: ConfigDict, root: Path, base: Base, volumes: Sequence[int]) -> str:
    """What is kept, and what the experiment takes up at most while it runs; evaluations keep their pictures, too."""
    images, one = num_images(config), image_bytes(root, base)
    kept = images if config.keep.images < 0 else min(images, config.keep.images)
    checkpoints = math.ceil(config.train.num_epochs / config.train.save_interval)
    written = checkpoints * checkpoint_bytes(config, base)
    volume = sum(volumes) if config.keep.samples else max(volumes)  # all stages', or one's until it is trained
    trajectories = volume + volume * most_selected(config) // images  # the latter are copies
    judged = judging_left(config, range(config.stage_cnt)).images
    total = trajectories + config.stage_cnt * (written + kept * one) + (images - kept + judged) * one
    return (
        f"at most {size(total)}, and about a kilobyte of JSON an image. A stage keeps {kept} images ({size(kept * one)}), "
        f"checkpoints: {checkpoints} ({size(written)}), trajectories: {'all' if config.keep.samples else 'none'}"
    )


def find_base(pretrained: ConfigDict) -> Base | None:
    """From the base model's files if they are here, in a directory or in the hub's cache; nothing is downloaded."""
    model = local_model(pretrained.model, pretrained.revision)
    single = model is not None and model.is_file()
    configs = local_model(pretrained.config, "main") if single else model
    if configs is None:
        return None
    weights = [model] if single else sorted((configs / "unet").glob("*.safetensors"))
    paths = [configs / part / "config.json" for part in ("unet", "vae", "text_encoder")]
    if not weights or not all(path.is_file() for path in paths):
        return None
    unet, vae, text = (files.read_json(path) for path in paths)
    side = pretrained.resolution // 8 or unet["sample_size"]
    return Base(
        latent_shape=(unet["in_channels"], side, side),
        image_px=side * 2 ** (len(vae["block_out_channels"]) - 1),
        embedding=text["max_position_embeddings"] * text["hidden_size"],
        lora=lora_numbers(weights),
    )


def local_model(name: str, revision: str) -> Path | None:
    """Where a model is on this machine: its file, its directory, or its snapshot in the hub's cache."""
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "unet/config.json", revision=revision)
    return Path(found).parents[1] if isinstance(found, str) else None


def lora_numbers(weights: Sequence[Path]) -> int:
    """Numbers of a LoRA of rank 1, by the shapes [out,in] of the attention's weights; only headers are read."""
    shapes = {}
    for path in weights:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if re.search(LORA_WEIGHTS, name)]  # noqa: SIM118
            shapes |= {name: file.get_slice(name).get_shape() for name in names}
    return sum(rows + columns for rows, columns in shapes.values())


def trajectory_bytes(config: ConfigDict, base: Base, num_trained_steps: int, num_prompts: int, embedding_bytes: int) -> int:
    """Of a stage's samples/, but for the files' headers.

    These are S + 1 states and S log-probabilities of each trajectory, in float32, and of each batch timesteps, prompt ids
    and the embeddings of its prompts and the empty one, with `embedding_bytes` a number.
    """
    numbers = (num_trained_steps + 1) * math.prod(base.latent_shape) + num_trained_steps
    prompts = min(config.sample.batch_size, num_prompts) + 1
    batch = 8 * (num_trained_steps + config.sample.batch_size) + prompts * base.embedding * embedding_bytes
    return 4 * numbers * num_images(config) + batch * config.sample.num_batches_per_epoch


def checkpoint_bytes(config: ConfigDict, base: Base) -> int:
    """Of one checkpoint, but for the files' headers: the LoRA in float32, and AdamW's two moments."""
    moment = 1 if config.train.use_8bit_adam else 4
    return config.train.lora_rank * base.lora * (4 + 2 * moment)


def image_bytes(root: Path, base: Base) -> float:
    """Of a picture on average in the latest stage, or before there is one uncompressed."""
    sampled = finished_stages(root, "sample")
    if not sampled:
        return 3 * base.image_px**2
    described = sampled[-1].manifest("sample")["files"]
    found = [file["bytes"] for name, file in described.items() if name.startswith("images/")]
    return sum(found) / len(found)


def size(num_bytes: float) -> str:
    """Such as 640 kB, 3.2 MB or 15 GB."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= one:
            return number(num_bytes / one, unit)
    return number(num_bytes / 1e3, "kB")
