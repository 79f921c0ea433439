"""The plan of a run for people: what `bash run_process.sh --dry_run` prints. Nothing here writes, or loads a model."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from ml_collections import ConfigDict

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
from b2diffurl.models import Sizes, family
from b2diffurl.reporting.forecast import judging_left, num_done, number, time_text
from b2diffurl.runtime.device import choose_device


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
    base = family(plan.settings.model).sizes(plan.settings.model)
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


def disk_text(config: ConfigDict, root: Path, base: Sizes, volumes: Sequence[int]) -> str:
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


def trajectory_bytes(config: ConfigDict, base: Sizes, num_trained_steps: int, num_prompts: int, embedding_bytes: int) -> int:
    """Of a stage's samples/, but for the files' headers.

    These are S + 1 states and S log-probabilities of each trajectory, in float32, and of each batch timesteps, prompt ids
    and the embeddings of its prompts and the empty one, with `embedding_bytes` a number.
    """
    numbers = (num_trained_steps + 1) * math.prod(base.latent_shape) + num_trained_steps
    prompts = min(config.sample.batch_size, num_prompts) + 1
    batch = 8 * (num_trained_steps + config.sample.batch_size) + prompts * base.embedding * embedding_bytes
    return 4 * numbers * num_images(config) + batch * config.sample.num_batches_per_epoch


def checkpoint_bytes(config: ConfigDict, base: Sizes) -> int:
    """Of one checkpoint, but for the files' headers: the LoRA in float32, and AdamW's two moments."""
    moment = 1 if config.train.use_8bit_adam else 4
    return config.train.lora_rank * base.lora * (4 + 2 * moment)


def image_bytes(root: Path, base: Sizes) -> float:
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
