"""The scorer: a small CLIP trained on right captions against hard negatives, each pair labelled by the grammar.

Every caption of a batch is compared with every picture, and the label is whether it is true of that scene; so
the similarity of one caption ranks pictures, which is what a reward must do.
"""

# B pictures a batch, M = B * K captions, K = 4 of them written for each picture

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import CLIPConfig, CLIPModel

from b2diffurl.shapes.dataset import pictures, save_tensors
from b2diffurl.shapes.facts import NUM_FACTS, codes, fact_ids
from b2diffurl.shapes.scene import (
    IMAGE_PX,
    OPPOSITE,
    CaptionErrors,
    Prompt,
    Scene,
    corrupt,
    describe,
    random_scene,
)
from b2diffurl.shapes.tokens import MAX_TOKENS, new_tokenizer, special_ids
from b2diffurl.shapes.train_vae import decode, encode, load_vae
from b2diffurl.shapes.training import BUILD_DIR, fit

log = logging.getLogger(__name__)

NUM_STEPS, BATCH, PEAK_LR, EMA_DECAY, SEED = 2000, 128, 1e-3, 0.995, 13
EMBEDDING = 128
FACT_WEIGHT = 0.5  # without the facts as a shared target, a first scorer was blind to relations after 1,550 steps
NUM_SCENES, REPEAT_RATE = 24_000, 0.25
LATENT_NOISE = 0.15  # in units of the latents' standard deviation, for pictures like those the base model makes
CLEAN_RATE = 0.25  # share of training pictures that did not pass through the autoencoder
ONE_ERROR = CaptionErrors(reversed_relation=0, other_axis=0.35, swapped_colours=0.25, wrong_attribute=0.4)
MEAN, STD = 0.5, 0.5


def new_scorer() -> CLIPModel:
    """0.5 M parameters: 8 x 8 patches, four layers; the text half has two."""
    torch.manual_seed(SEED)
    tokenizer = new_tokenizer()
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_PX,
        "patch_size": 8,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        **special_ids(tokenizer),
    }
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING, logit_scale_init_value=2.3)
    )


def train_scorer(base_dir: Path, clip_dir: Path) -> None:
    """Train and save model, tokenizer and image processor as one CLIP directory."""
    scenes, data = scorer_scenes(), scorer_pictures(base_dir)
    tokenizer = new_tokenizer()
    networks = nn.ModuleDict(
        {
            "clip": new_scorer(),
            "bias": nn.ParameterList([torch.tensor(-5.0)]),
            "facts": nn.Linear(EMBEDDING, NUM_FACTS, bias=False),
        }
    )

    def loss_at(step: int, noise: torch.Generator) -> torch.Tensor:
        picked = torch.randint(len(scenes), (BATCH,), generator=noise)
        clean = torch.rand(BATCH, generator=noise) < CLEAN_RATE
        images = torch.where(clean[:, None, None, None], data["clean"][picked], data["decoded"][picked])
        rng = np.random.default_rng((SEED, step))
        chosen = [scenes[i] for i in picked.tolist()]
        captions = [caption for scene in chosen for caption in four_captions(scene, rng)]
        image, text = embed(networks["clip"], images, tokenizer, [str(caption) for caption in captions])
        scale, head = networks["clip"].logit_scale.exp(), networks["facts"]
        related = [i for i, caption in enumerate(captions) if caption.relation]
        facts = fact_loss(head(image) * scale, [scene_prompt(scene) for scene in chosen])
        facts = facts + fact_loss(head(text[related]) * scale, [captions[i] for i in related])
        return balanced_loss(image @ text.mT * scale + networks["bias"][0], truth(chosen, captions)) + FACT_WEIGHT * facts

    def save(average: nn.Module, step: int) -> None:
        save_scorer(average["clip"], clip_dir)
        log.info(
            "scorer: right caption beats the reversed one on %.3f of unseen pictures", right_beats_reversed(average["clip"])
        )

    rates = {"peak_lr": PEAK_LR, "ema_decay": EMA_DECAY}
    fit("scorer", networks, loss_at, num_steps=NUM_STEPS, seed=SEED, **rates, on_save=save)


def four_captions(scene: Scene, rng: np.random.Generator) -> list[Prompt]:
    """A right relation; it reversed; with another error; and an attribute or binding caption, right or wrong."""
    right = describe(scene, "relation", rng)
    other = describe(scene, str(rng.choice(["attribute", "binding"])), rng)
    return [
        right,
        replace(right, relation=OPPOSITE[right.relation]),
        corrupt(right, ONE_ERROR, rng),
        corrupt(other, ONE_ERROR, rng),
    ]


def fact_loss(logits: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
    """Cross entropy of the two facts that each relation prompt states; logits [N, NUM_FACTS]."""
    return -logits.log_softmax(dim=1).gather(1, fact_ids(prompts)).mean()


def truth(scenes: list[Scene], prompts: list[Prompt]) -> torch.Tensor:
    """Whether each prompt is true of each scene, bool [B, M]."""
    first, second, relation = (column[:, None] for column in codes([scene_prompt(scene) for scene in scenes]))
    one, other, wanted = codes(prompts)
    straight = (first == one) & ((other < 0) | (second == other)) & ((wanted < 0) | (relation == wanted))
    crossed = (second == one) & ((other < 0) | (first == other)) & ((wanted < 0) | ((relation ^ 1) == wanted))
    return straight | crossed


def scene_prompt(scene: Scene) -> Prompt:
    """The relation caption that starts with the scene's first thing."""
    return Prompt(scene.first.thing, scene.second.thing, scene.relation)


def balanced_loss(logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sigmoid loss of all pairs [B, M]; pairs of a picture with captions written for it count as much as all others."""
    error = -logsigmoid(torch.where(right, logits, -logits))
    own = torch.block_diag(*[torch.ones(1, len(right[0]) // len(right))] * len(right)).bool()
    return error[own].mean() + error[right & ~own].sum() / len(right) / 4 + error[~right & ~own].sum() / len(right) / 4


def embed(clip: CLIPModel, images: torch.Tensor, tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of uint8 images [N, H, W, 3] and captions, float [N, 128] and [M, 128]."""
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    output = clip(input_ids=ids, pixel_values=pixels)
    return output.image_embeds, output.text_embeds


@torch.no_grad()
def right_beats_reversed(clip: CLIPModel, count: int = 200) -> float:
    """Share of freshly drawn scenes whose caption scores higher than the same with the relation reversed."""
    rng = np.random.default_rng(SEED + 1)
    scenes = [random_scene(rng) for _ in range(count)]
    right = [scene_prompt(scene) for scene in scenes]
    wrong = [replace(prompt, relation=OPPOSITE[prompt.relation]) for prompt in right]
    image, text = embed(clip, pictures(scenes), new_tokenizer(), [str(prompt) for prompt in right + wrong])
    return float(((image * text[:count]).sum(-1) > (image * text[count:]).sum(-1)).float().mean())


def scorer_scenes() -> list[Scene]:
    """The scorer's own scenes; some repeat a colour or a shape, as faulty samples do."""
    rng = np.random.default_rng(SEED)
    return [random_scene(rng, repeats=rng.random() < REPEAT_RATE) for _ in range(NUM_SCENES)]


def scorer_pictures(base_dir: Path) -> dict[str, torch.Tensor]:
    """Their renderings and noisy reconstructions, each uint8 [N, 64, 64, 3], made on the first call."""
    path = BUILD_DIR / "scorer_pictures.safetensors"
    if not path.exists():
        log.info("scorer: rendering and reconstructing %d scenes", NUM_SCENES)
        vae, clean = load_vae(base_dir), pictures(scorer_scenes())
        latents = encode(vae, clean)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED))
        decoded = decode(vae, latents + LATENT_NOISE / vae.config.scaling_factor * noise)
        save_tensors({"clean": clean, "decoded": decoded}, path)
    return load_file(path)


def save_scorer(clip: CLIPModel, clip_dir: Path) -> None:
    """The directory layout of openai/clip and laion/CLIP: model, tokenizer, image processor."""
    clip.save_pretrained(clip_dir)
    new_tokenizer().save_pretrained(clip_dir)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_PX},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_PX, "width": IMAGE_PX},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_convert_rgb": True,
    }
    (clip_dir / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (clip_dir / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}, indent=2) + "\n")
