"""The plan of a run for people: what `bash run_process.sh --dry_run` prints. Nothing here writes a file or loads a model."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import named_prompts, overlap_text
from b2diffurl.configuration.settings import ModelSettings, PromptSources, Settings, combined_text
from b2diffurl.experiment.folder import find_lora
from b2diffurl.experiment.stage import LORA_FILE, PHASES, Stage, finished_stages
from b2diffurl.models import Sizes, base_sizes, family_of
from b2diffurl.models.known import expected_family, expected_sizes
from b2diffurl.reporting.forecast import evaluations_left, num_done, time_text
from b2diffurl.runtime.device import Compute, choose_device
from b2diffurl.runtime.logs import number

UNTIMED = (
    "unknown until the run has sampled its first batch; its log then says it. A run can be stopped at any time: the same "
    "command goes on. docs/performance.md has times that were measured."
)


def describe(plan: Plan, downloads: Mapping[str, tuple[str, int]] = MappingProxyType({})) -> str:
    """The whole text: facts, a table of stages, disk and time. `downloads` are as in `downloads_text`."""
    settings, budget = plan.settings, Budget.of(plan.settings)
    windows, base = budget.planned_windows(plan.stage.root), expected_sizes(settings.model)
    volumes = stage_volumes(plan, base) if base else []
    device, precision = device_text(settings.compute)
    facts = plan_facts(plan, budget) | {"device": f"{device}, {precision}", "downloads": downloads_text(downloads)}
    lines = [f"{name:<13}{fact}" for name, fact in facts.items() if fact]
    lines += ["", *stage_table(budget, windows, volumes), ""]
    unknown = "unknown until the base model is here (pretrained.model): its files tell it"
    lines += [f"{'disk':<13}{disk_text(settings, base, volumes) if base else unknown}"]
    lines += [f"{'memory':<13}{memory_text(settings, base) if base else unknown}"]
    begun = bool(finished_stages(settings.output.root, "train"))
    lines += [f"{'time':<13}{time_text(settings) if begun else UNTIMED}"]
    return "\n".join(lines)


def stage_volumes(plan: Plan, base: Sizes) -> list[int]:
    """The bytes of each stage's trajectories."""
    windows = Budget.of(plan.settings).planned_windows(plan.stage.root)
    one = number_bytes(plan.settings)
    return [trajectory_bytes(plan.settings, base, window.num_steps, len(plan.prompts), one) for window in windows]


def number_bytes(settings: Settings) -> int:
    """The bytes of a number in weights, and in the embeddings that are stored."""
    return 4 if device_text(settings.compute)[1] == "float32" else 2


def downloads_text(downloads: Mapping[str, tuple[str, int]]) -> str:
    """What the run will download, {model: (the setting that asks for it, bytes or 0)}; "" if nothing."""
    named = [
        f"{setting} {name} ({size(volume) if volume else 'size unknown'})" for name, (setting, volume) in downloads.items()
    ]
    return f"{'; '.join(named)}; from the hub, when the run starts" if named else ""


def plan_facts(plan: Plan, budget: Budget) -> dict[str, str]:
    """The lines before the table, {heading: text}."""
    settings, prompts = plan.settings, plan.settings.prompts
    watched = f"; watched: {', '.join(settings.rewards.watched)}" if settings.rewards.watched else ""
    trained = repr(prompts.one_prompt) if prompts.one_prompt else prompts.train_file
    return {
        "experiment": f"{settings.output.name} in {plan.stage.root}, {state_text(settings)}",
        "preset": settings.output.preset or "none",
        "base model": f"{settings.model.name} ({base_text(settings.model)})",
        "trained": lora_text(settings.model),
        "starts from": start_text(plan),
        "reward": settings.rewards.description + combined_text(settings.rewards.combine) + watched,
        "prompts": f"{len(plan.prompts)} of {trained}; {held_out_text(prompts)}",
        "device": "",  # `describe` fills it in; it has its place here
        "seeds": f"{settings.schedule.seed} of the experiment, {settings.judging.seed} of the evaluations",
        "a stage": f"{budget.num_groups} groups of {settings.sampling.num_branches} images{settings.sampling.tree.text}; "
        f"trained on {budget.at_most}"
        f"{budget.most_selected:,}, {settings.training.num_trajectories} an update, epochs: {settings.training.num_epochs}",
    }


def held_out_text(prompts: PromptSources) -> str:
    """The prompts of judging, and how many of them are trained on."""
    if not prompts.held_out_file:
        return "judged on these, because none is held out"
    number, overlap = len(named_prompts(prompts, "test")), overlap_text(prompts)
    return f"held-out: {number} of {prompts.held_out_file}" + (f" (warning: {overlap})" if overlap else "")


def base_text(model: ModelSettings) -> str:
    """What kind of model it is."""
    family, here = expected_family(model), base_sizes(model)
    title = family_of(family).describe(model).title if family else ""
    return title if here else f"{title}, not on this machine".removeprefix(", ")


def lora_text(model: ModelSettings) -> str:
    """What is trained, and how many parameters it has, if the base model tells it."""
    base, layers = expected_sizes(model), "attention and MLPs" if model.lora.mlp else "attention"
    lora = f"a LoRA of rank {model.lora.rank} on {layers}"
    if not base:
        return f"{lora}; its size is unknown until the base model is here"
    of_base = sum(base.weights.values())
    return f"{lora}: {model.lora.rank * base.lora:,} parameters, beside the base model's {of_base:,}, which stay as they are"


def device_text(compute: Compute) -> tuple[str, str]:
    """(the GPU's name, or the CPU's number of threads; the precision of the network's weights)."""
    cuda, precision = choose_device(compute)
    names = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
    threads = f"CPU, threads: {compute.num_threads or torch.get_num_threads()}"
    return torch.cuda.get_device_name(compute.dev_id) if cuda else threads, names[precision]


def state_text(settings: Settings) -> str:
    """How far an experiment is: new, or how many stages are finished and what comes next."""
    root, num_stages = settings.output.root, settings.schedule.num_stages
    stages = [Stage(root, index) for index in range(num_stages)]
    if not (root / "config.json").is_file():
        return "new"
    following = next((stage for stage in stages if not stage.finished("train")), None)
    if following is None:
        return f"all {num_stages} stages finished"
    phase = next(phase for phase in PHASES if not following.finished(phase))
    return f"{num_done(settings)} of {num_stages} stages finished; goes on with {phase} of stage{following.index}"


def start_text(plan: Plan) -> str:
    """The LoRA that the next stage to be trained starts from, and whether resume_from is it."""
    root, asked = plan.stage.root, plan.settings.schedule.initial_lora
    trained = finished_stages(root, "train")
    if not trained:
        return plan.start
    goes_on = replace(plan, resume_from=trained[-1].checkpoints()[-1] / LORA_FILE).start
    chosen = bool(asked) and Path(asked).resolve().is_relative_to(trained[-1].folder.resolve())
    if chosen:
        goes_on = replace(plan, resume_from=find_lora(Path(asked))).start
    return goes_on + ("; resume_from has no effect, the experiment has begun" if asked and not chosen else "")


def stage_table(budget: Budget, windows: Sequence[Window], volumes: Sequence[int]) -> list[str]:
    """The table, as lines: a row for each window of S trained steps with the amounts of one stage, and a row of totals.

    `windows` [M] are those of the stages, `volumes` [M] the bytes of its trajectories, or [] if they are unknown.
    """
    stages = defaultdict(list)
    for index, window in enumerate(windows):
        stages[window].append(index)
    updates = f"updates{', at most' if budget.at_most else ''}"
    num_steps = budget.sampling.num_steps
    rows = [["a stage", f"trained steps, of {num_steps}", "images", "network evaluations", updates, "trajectories"]]
    for window, members in sorted(stages.items(), key=lambda row: (row[0].num_steps, row[0].start)):
        volume = size(volumes[members[0]]) if volumes else "?"  # stages of the same S have the same volume
        counts = [budget.num_images, budget.num_evaluations(window), budget.most_updates]
        rows.append([stages_text(members), window.text(num_steps), *(f"{count:,}" for count in counts), volume])
    totals = [len(windows) * budget.num_images, sum(map(budget.num_evaluations, windows))]
    totals.append(len(windows) * budget.most_updates)
    rows.append(["in all", "", *(f"{count:,}" for count in totals), size(sum(volumes)) if volumes else "?"])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def stages_text(members: Sequence[int]) -> str:
    """Stages in few words: `stage3`, `stages 0-14`, or `7 stages` if there are gaps between them."""
    if len(members) == 1:
        return f"stage{members[0]}"
    consecutive = members[-1] - members[0] == len(members) - 1
    return f"stages {members[0]}-{members[-1]}" if consecutive else f"{len(members)} stages"


# ---- disk ----


def disk_bytes(plan: Plan, base: Sizes) -> float:
    """How many bytes the experiment takes at most while it runs, without JSON."""
    return disk_facts(plan.settings, base, stage_volumes(plan, base))[0]


def disk_text(settings: Settings, base: Sizes, volumes: Sequence[int]) -> str:
    """How many bytes the experiment takes at most while it runs, and how many each stage keeps."""
    total, kept, kept_bytes, checkpoints, written = disk_facts(settings, base, volumes)
    return (
        f"at most {size(total)}, and about a kilobyte of JSON an image. "
        f"A stage keeps {kept:,} images ({size(kept_bytes)}), "
        f"checkpoints: {checkpoints} ({size(written)}), trajectories: {'all' if settings.output.keep_samples else 'none'}"
    )


def disk_facts(settings: Settings, base: Sizes, volumes: Sequence[int]) -> tuple[float, int, float, int, int]:
    """(bytes in all; images that a stage keeps, their bytes; its checkpoints, their bytes)."""
    budget, output, num_stages = Budget.of(settings), settings.output, settings.schedule.num_stages
    images, per_image = budget.num_images, image_bytes(output.root, base)
    kept = images if output.keep_images < 0 else min(images, output.keep_images)
    checkpoints = math.ceil(settings.training.num_epochs / settings.output.save_interval)
    written = checkpoints * checkpoint_bytes(settings, base)
    volume = sum(volumes) if output.keep_samples else max(volumes)  # all stages', or one's until it is trained
    # Batches, and the copies of the selected ones. In a tree few leaves may already be on all shared edges.
    trajectories = volume + (volume if settings.sampling.tree.after else volume * budget.most_selected // images)
    judged = evaluations_left(settings, finished=set()).judged  # of which keep.eval_images may delete some
    # The stage at work has all its images, finished ones have `kept`.
    total = trajectories + num_stages * (written + kept * per_image) + (images - kept + judged) * per_image
    return total, kept, kept * per_image, checkpoints, written


def memory_text(settings: Settings, base: Sizes, one: int | None = None) -> str:
    """How many bytes are loaded in training and sampling, without activations. `one` are those of a weight."""
    parts = weight_bytes(settings, base, one)
    named = ", ".join(f"{part} {size(volume)}" for part, volume in parts.items())
    total, trained = size(sum(parts.values())), size(optimizer_bytes(settings, base))
    encoders = ", text encoders only while prompts are encoded" if settings.model.offload else ""
    rest = "and activations and the reward's model, which only the run can tell"
    return f"weights {total} ({named}){encoders}, LoRA and optimizer {trained}; {rest}"


def weight_bytes(settings: Settings, base: Sizes, one: int | None = None) -> dict[str, int]:
    """{part of the base model: bytes of its weights}; `one` are those of a number, by default as the run has them."""
    one = one or number_bytes(settings)
    return {part: count * (4 if part in base.float32 else one) for part, count in base.weights.items()}


def optimizer_bytes(settings: Settings, base: Sizes) -> int:
    """Bytes of the LoRA with its gradients, float32, and of AdamW's two moments."""
    moment = 1 if settings.training.optimizer.use_8bit else 4
    return settings.model.lora.rank * base.lora * (8 + 2 * moment)


def memory_bytes(settings: Settings, base: Sizes) -> int:
    """The least that the base model and its training take on a GPU: without activations, and without offloaded encoders."""
    parts = weight_bytes(settings, base)
    there = {part: volume for part, volume in parts.items() if not (settings.model.offload and part.startswith("text_"))}
    return sum(there.values()) + optimizer_bytes(settings, base)


def trajectory_bytes(settings: Settings, base: Sizes, num_trained_steps: int, num_prompts: int, embedding_bytes: int) -> int:
    """Bytes of a stage's samples/, without the files' headers.

    Each trajectory has S + 1 states and S log-probabilities in float32, those that branches of a tree share once; S is 0 of
    an image alone. Each batch has timesteps and prompt ids (8 bytes each), and the embeddings of its prompts and of the
    empty prompt (`embedding_bytes` a number).
    """
    sampling, state = settings.sampling, math.prod(base.latent_shape)
    num_trained_steps = 0 if settings.training.objective.on_noised_images else num_trained_steps
    numbers = sampling.tree.num_evaluations(num_trained_steps) * (state + 1) + sampling.num_branches * state  # of a group
    prompts = min(sampling.num_groups, num_prompts) + 1  # a batch stores each distinct prompt once
    batch = 8 * (num_trained_steps + sampling.num_groups) + prompts * base.embedding * embedding_bytes
    return 4 * numbers * Budget.of(settings).num_groups + batch * sampling.num_batches


def checkpoint_bytes(settings: Settings, base: Sizes) -> int:
    """Bytes of one checkpoint, without the files' headers: LoRA and average in float32, AdamW's two moments a number."""
    optimizer = settings.training.optimizer
    moment, average = 1 if optimizer.use_8bit else 4, 4 if optimizer.ema else 0
    return settings.model.lora.rank * base.lora * (4 + average + 2 * moment)


def image_bytes(root: Path, base: Sizes) -> float:
    """Bytes of an image: the mean in the latest sampled stage, or the size of an uncompressed one if there is no stage."""
    sampled = finished_stages(root, "sample")
    if not sampled:
        return 3 * math.prod(base.image_px)
    described = sampled[-1].manifest("sample")["files"]
    sizes = [file["bytes"] for name, file in described.items() if name.startswith("images/")]
    return sum(sizes) / len(sizes)


def size(num_bytes: float) -> str:
    """Bytes in words: 640 kB, 3.2 MB, 15 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return number(num_bytes / scale, unit)
    return number(num_bytes / 1e3, "kB")
