"""Every figure in docs/shapes.md, measured on what is shipped, and the picture grid."""

import json
import logging
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel

from b2diffurl.shapes.broken import KINDS as BROKEN_KINDS
from b2diffurl.shapes.broken import broken_picture
from b2diffurl.shapes.checker import Verdict, check, look, relation_between
from b2diffurl.shapes.dataset import pictures
from b2diffurl.shapes.sampling import accuracy, load_flow, load_pipeline, sample, sample_flow
from b2diffurl.shapes.scene import (
    KINDS,
    OPPOSITE,
    RELATIONS,
    CaptionErrors,
    Prompt,
    Scene,
    corrupt,
    describe,
    holds,
    parse,
    prompt_sets,
    random_scene,
)
from b2diffurl.shapes.tokens import new_tokenizer
from b2diffurl.shapes.train_scorer import embed
from b2diffurl.shapes.train_vae import round_trip

log = logging.getLogger(__name__)

Through = Callable[[torch.Tensor], torch.Tensor]
Draw = Callable[..., np.ndarray]  # draw(prompts, seed=...) -> one picture a prompt

SEED = 2026
FLOW_SAMPLERS = {
    "Euler, 20 steps": {"stochastic": False, "num_steps": 20},
    "20 steps": {"num_steps": 20},
    "no guidance": {"guidance": 1.0},
    "256 absent tokens": {"absent_tokens": 256},
}
ANY_ERROR = CaptionErrors(reversed_relation=0.3, other_axis=0.2, swapped_colours=0.2, wrong_attribute=0.3)


def measure(
    base_dir: Path, clip_dir: Path, flow_dir: Path, figures_path: Path, grid_path: Path, only: str | None = None
) -> None:
    """Write figures.json and the grid, or one part of figures.json; each part is written as soon as it is known."""
    pipeline = load_pipeline(base_dir)
    clip = CLIPModel.from_pretrained(clip_dir).eval()
    prompts = {half: prompt_sets()[f"shapes_relation_{half}"] for half in ("train", "test")}
    parts: dict[str, Callable[[], object]] = {
        "megabytes": lambda: {path.name: directory_mb(path) for path in (base_dir, clip_dir, flow_dir)},
        "checker": lambda: checker_figures(2000),
        "samples": lambda: sample_figures(partial(sample, pipeline), prompts),
        "scorer": lambda: scorer_figures(pipeline, clip, prompts["train"] + prompts["test"]),
        "checker_after_vae": lambda: checker_figures(2000, partial(round_trip, pipeline.vae)),
        "milliseconds": lambda: timings(pipeline, clip),
        "flow": lambda: flow_figures(load_flow(flow_dir), prompts),
    }
    if only and only not in parts:
        raise SystemExit(f"there is no part {only!r} of the figures; parts: {', '.join(parts)}")
    figures = json.loads(figures_path.read_text()) if only else {}
    figures |= {"threads": torch.get_num_threads(), "machine": platform.machine()}
    for name in [only] if only else parts:
        figures[name] = parts[name]()
        log.info("%s: %s", name, json.dumps(figures[name]))
        figures_path.write_text(json.dumps(figures, indent=1) + "\n")
    if not only:
        draw_grid(pipeline, grid_path)


def directory_mb(path: Path) -> float:
    """Size of all files below, in MB."""
    return round(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6, 2)


# --- checker --------------------------------------------------------------------------------------


def checker_figures(count: int, through: Through = lambda images: images) -> dict[str, float]:
    """Rates on fresh scenes: right captions accepted, wrong ones accepted, broken pictures flagged by kind."""
    rng = np.random.default_rng(SEED)
    scenes = [random_scene(rng) for _ in range(count)]
    images = through(pictures(scenes))
    right = [str(describe(scene, KINDS[i % 3], rng)) for i, scene in enumerate(scenes)]
    wrong = [str(mismatch(scene, rng)) for scene in scenes]
    rates = {
        "right_accepted": mean_correct(check(images, right)),
        "wrong_accepted": mean_correct(check(images, wrong)),
    }
    for kind in BROKEN_KINDS:
        broken = torch.from_numpy(np.stack([broken_picture(kind, rng) for _ in range(count // 8)]))
        rates[f"flagged: {kind}"] = float(np.mean([bool(problem) for problem, _ in look(through(broken))]))
    return rates


def mismatch(scene: Scene, rng: np.random.Generator) -> Prompt:
    """A caption that is nearly right and does not hold."""
    while True:
        prompt = corrupt(describe(scene, "relation", rng), ANY_ERROR, rng)
        if not holds(scene, prompt):
            return prompt


def mean_correct(verdicts: list[Verdict]) -> float:
    """Share of correct verdicts."""
    return float(np.mean([verdict.correct for verdict in verdicts]))


# --- base model -----------------------------------------------------------------------------------


def sample_figures(draw: Draw, prompts: dict[str, list[str]]) -> dict:
    """Accuracy at the training sampler, on train and test prompts and on the other two kinds, 576 images each."""
    result = {}
    for name, chosen in {
        "relation_train": prompts["train"],
        "relation_test": prompts["test"],
        "binding_train": prompt_sets()["shapes_binding_train"],
        "attribute_train": prompt_sets()["shapes_attribute_train"],
    }.items():
        repeated = chosen * (576 // len(chosen))
        images = draw(repeated, seed=SEED)
        result[name] = accuracy(images, repeated)
        if name == "relation_train":
            result["by_relation"] = relation_confusion(images, repeated)
    return result


def relation_confusion(images: np.ndarray, prompts: list[str]) -> dict[str, dict[str, float]]:
    """For each relation asked, how often each was drawn, among images that show both named things."""
    drawn: dict[str, list[str]] = {relation: [] for relation in RELATIONS}
    for verdict, prompt in zip(check(images, prompts), map(parse, prompts), strict=True):
        if verdict.well_formed and verdict.parts["binding"]:
            relation = relation_between(*verdict.objects)
            straight = verdict.objects[0].thing == prompt.first
            drawn[prompt.relation].append(relation if straight else OPPOSITE.get(relation))
    return {
        asked: {str(shown): round(shows.count(shown) / max(len(shows), 1), 3) for shown in (*RELATIONS, None)}
        for asked, shows in drawn.items()
    }


def flow_figures(pipeline: StableDiffusion3Pipeline, prompts: dict[str, list[str]]) -> dict:
    """The same of the flow-matching base model, what other samplers draw of held-out prompts, and its time a row."""
    held_out = prompts["test"] * 6
    result = sample_figures(partial(sample_flow, pipeline), prompts)
    for name, how in FLOW_SAMPLERS.items():
        result[name] = accuracy(sample_flow(pipeline, held_out, seed=SEED, **how), held_out)
    config, latents = pipeline.transformer.config, torch.randn(256, 4, 8, 8)
    states, pooled = torch.randn(256, 10, config.joint_attention_dim), torch.randn(256, config.pooled_projection_dim)
    with torch.no_grad():
        row = best_ms(lambda: pipeline.transformer(latents, states, pooled, torch.full([256], 500.0)), 256)
    return result | {"transformer_row_ms": row}


# --- scorer ---------------------------------------------------------------------------------------


def scorer_figures(pipeline: StableDiffusionPipeline, clip: CLIPModel, prompts: list[str]) -> dict:
    """AUC within a prompt on well-formed samples: over all errors, and over relation errors alone."""
    repeated = prompts * 16
    images = sample(pipeline, repeated, seed=SEED + 1)
    verdicts, scores = check(images, repeated), similarity(clip, images, repeated)
    groups = {prompt: [i for i in range(len(repeated)) if repeated[i] == prompt] for prompt in prompts}
    every, relation_only = [], []
    for members in groups.values():
        right = [scores[i] for i in members if verdicts[i].correct]
        wrong = [i for i in members if verdicts[i].well_formed and not verdicts[i].correct]
        every.append(wins(right, [scores[i] for i in wrong]))
        relation_only.append(wins(right, [scores[i] for i in wrong if verdicts[i].parts["binding"]]))
    return {
        "images": len(images),
        "auc": auc(every),
        "auc_relation_errors": auc(relation_only),
        "mean_score_right": mean_score(scores, [verdict.correct for verdict in verdicts]),
        "mean_score_wrong": mean_score(scores, [verdict.well_formed and not verdict.correct for verdict in verdicts]),
        "mean_score_malformed": mean_score(scores, [not verdict.well_formed for verdict in verdicts]),
    }


@torch.no_grad()
def similarity(clip: CLIPModel, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Cosine of each image and its prompt, [N]."""
    unique = list(dict.fromkeys(prompts))
    _, text = embed(clip, torch.from_numpy(images[:1]), new_tokenizer(), unique)
    rows = torch.tensor([unique.index(prompt) for prompt in prompts])
    chunks = torch.from_numpy(images).split(256)
    image = torch.cat([embed(clip, chunk, new_tokenizer(), unique[:1])[0] for chunk in chunks])
    return (image * text[rows]).sum(-1).numpy()


def wins(right: list[float], wrong: list[float]) -> tuple[float, int]:
    """How many (right, wrong) pairs are ranked right, ties half, and how many there are."""
    difference = np.subtract.outer(np.array(right), np.array(wrong))
    return float((difference > 0).sum() + 0.5 * (difference == 0).sum()), difference.size


def auc(groups: list[tuple[float, int]]) -> float:
    """Pairs ranked right over all pairs of all groups."""
    won, pairs = np.sum(groups, axis=0)
    return round(float(won / pairs), 4) if pairs else float("nan")


def mean_score(scores: np.ndarray, chosen: list[bool]) -> float:
    """Mean score of the chosen images."""
    return round(float(scores[np.array(chosen)].mean()), 4) if any(chosen) else float("nan")


# --- time and pictures ----------------------------------------------------------------------------


@torch.no_grad()
def timings(pipeline: StableDiffusionPipeline, clip: CLIPModel) -> dict[str, float]:
    """Milliseconds a row or an image at batch 256 (VAE 64), the best of five."""
    rng = np.random.default_rng(SEED)
    images = pictures([random_scene(rng) for _ in range(256)])
    prompts = prompt_sets()["shapes_relation_train"][:1] * 256
    latents, text = torch.randn(256, 4, 8, 8), torch.randn(256, 16, 64)
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return {
        "unet_row": best_ms(lambda: pipeline.unet(latents, 500, text), 256),
        "vae_decode": best_ms(lambda: pipeline.vae.decode(latents[:64]), 64),
        "scorer_image": best_ms(lambda: clip.get_image_features(pixel_values=pixels), 256),
        "checker_image": best_ms(lambda: check(images, prompts), 256),
    }


def best_ms(call: Callable[[], object], rows: int) -> float:
    """Shortest of five calls, in ms a row."""
    durations_sec = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        durations_sec.append(time.perf_counter() - started)
    return round(min(durations_sec) / rows * 1e3, 3)


def draw_grid(pipeline: StableDiffusionPipeline, path: Path, columns: int = 12) -> None:
    """Rows: scenes, their reconstructions, then samples of four prompts, one a relation."""
    rng = np.random.default_rng(SEED)
    drawn = pictures([random_scene(rng) for _ in range(columns)])
    asked = [prompt_sets()["shapes_relation_test"][i] for i in range(4)]
    rows = [drawn.numpy(), round_trip(pipeline.vae, drawn).numpy()]
    rows += [sample(pipeline, [prompt] * columns, seed=SEED) for prompt in asked]
    gap = np.full((len(rows), columns, 68, 68, 3), 255, np.uint8)
    gap[:, :, 2:66, 2:66] = np.stack(rows)
    grid = gap.transpose(0, 2, 1, 3, 4).reshape(len(rows) * 68, columns * 68, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.NEAREST).save(path)
    log.info("grid: %s, rows: scenes, reconstructions, %s", path, "; ".join(asked))
