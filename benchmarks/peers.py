"""The peers' shape: one stage executed as other implementations of the method do it. benchmarks.stage compares ours with it.

    python -m benchmarks.peers sample FOLDER     # then select, then train; FOLDER/job.json is a `Job`

What is computed is the same as in our stage: weights, LoRA, prompts, distribution of noise, scheduler arithmetic, scorer,
selection, loss, optimizer, epochs, the trajectories of an update, dtype and threads. How it is executed is theirs:

- Sampling takes 8 prompts at once: the shared prefix, then one branch after the other, each decoded by itself.
- Attention is plain matrix products (diffusers' AttnProcessor). With `fused` it is AttnProcessor2_0.
- A trajectory is stored with all T steps, as `latents` and as `next_latents`, with a copy of its prompt's embedding. The
  list of all trajectories is pickled in full after every 8 prompts.
- Training takes 2 trajectories at once, and one step after the other.

Where the other implementations differ, or do not say, we take the faster way. Each process imports and loads only what it
uses. The two halves of guidance share a forward pass. Noise is drawn on the device. Pickles hold plain arrays and are not
flushed to disk. PNGs are hardly compressed. The scorer embeds a prompt once. The selected trajectories stay on the device.
Training never waits for a number, and nothing is logged. States are float32, like ours.

B prompts at once, K branches, S trained of T steps, U trajectories in an update, latents [N,C,h,w], L tokens of width E
"""

import argparse
import math
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from b2diffurl.algorithm.advantages import advantages, normalise
from b2diffurl.algorithm.ddim import make_transitions
from b2diffurl.algorithm.seeding import generator, stable_seed
from b2diffurl.algorithm.selection import select_all, select_pairs
from b2diffurl.algorithm.transition import Transitions, log_prob, step_weights, transition
from b2diffurl.algorithm.types import Noise, Predict
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import read_training
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.runtime import files

SAMPLE_BATCH, SCORE_BATCH, TRAIN_BATCH = 8, 8, 2  # prompts, images, trajectories
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
SAMPLES, SELECTED = "samples.pkl", "selected.pkl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    job = read_job(given.folder)
    if job.num_threads:
        torch.set_num_threads(job.num_threads)
    tf32 = job.config["allow_tf32"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    disable_progress_bar()
    facts = VERBS[given.verb](given.folder, job)
    if job.device.type == "cuda":
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    files.write_json(given.folder / f"{given.verb}.json", facts)


@dataclass(frozen=True)
class Job:
    """The work of the three processes, taken from a stage of ours."""

    config: dict[str, Any]  # of config/stage_process.py, with overrides
    prompts: list[str]  # one for each group
    num_trained_steps: int  # S
    num_threads: int  # 0: torch's default
    mixed_precision: str  # no | bf16
    fused: bool  # whether attention is fused (AttnProcessor2_0)

    def __post_init__(self):
        sample, train = self.config["sample"], self.config["train"]
        no_shortcut = sample.get("prefix_eta", -1) < 0 and train.get("timestep_fraction", 1) == 1
        no_shortcut = no_shortcut and train.get("unconditional_gradient", True)
        # Trajectories are trained to their end. Job files of earlier versions lack the second key.
        to_the_end = self.config["curriculum"] not in ("early", "sliding") and not self.config.get("split_stop")
        objective = OBJECTIVES[train["objective"]]
        known = not (objective.needs_base or objective.on_noised_images)
        plain = to_the_end and self.config["sampling"] == "branch" and known
        if not no_shortcut or not plain or self.mixed_precision not in DTYPES:
            raise ValueError(
                "the peers' shape is of sampling=branch, windows that end with the image, objective ddpo or reinforce, "
                "mixed_precision no or bf16, and no opt-in acceleration (prefix_eta, timestep_fraction, "
                "unconditional_gradient); see --no-peers"
            )

    @property
    def root(self) -> Path:
        return Path(self.config["pretrained"]["model"])

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.mixed_precision]

    def sampler(self) -> Transitions:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(files.read_json(self.root / "scheduler" / "scheduler_config.json"))
        scheduler.set_timesteps(self.config["sample"]["num_steps"])
        return make_transitions(
            scheduler.timesteps,
            scheduler.alphas_cumprod,
            scheduler.final_alpha_cumprod,
            eta=self.config["sample"]["eta"],
            prediction_type=scheduler.config.prediction_type,
        ).to(self.device)


def read_job(folder: Path) -> Job:
    return Job(**files.read_json(folder / "job.json"))


@dataclass
class Clock:
    """Measures seconds by name: `with clock("decode"): …`. It waits for the device, so that its work is counted."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] += self.now() - started

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


# --- the policy -----------------------------------------------------------------------------------


class Policy:
    """The UNet with the fresh LoRA that ours starts from."""

    def __init__(self, job: Job):
        from diffusers import UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
        from peft import LoraConfig

        self.unet = UNet2DConditionModel.from_pretrained(job.root, subfolder="unet", dtype=job.dtype).to(job.device)
        self.unet.eval().requires_grad_(False)
        rank = job.config["train"]["lora_rank"]
        lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(job.config["seed"], "lora"))
            self.unet.add_adapter(lora)
        self.unet.set_attn_processor(AttnProcessor2_0() if job.fused else AttnProcessor())
        self.lora = {name: parameter for name, parameter in self.unet.named_parameters() if ".lora_" in name}
        for parameter in self.lora.values():
            parameter.data = parameter.data.float()
        self.guidance_scale = job.config["sample"]["guidance_scale"]
        self.autocast = torch.autocast(job.device.type, job.dtype, enabled=job.dtype != torch.float32)

    def __call__(self, x_t: Tensor, t: Tensor, embeds: Tensor, unconditional: Tensor) -> Tensor:
        """Guided output [N,C,h,w] float32 at timestep `t`, from embeds [N,L,E] and unconditional [1,L,E]."""
        with self.autocast:
            if self.guidance_scale == 1:
                return self.unet(x_t, t, embeds, return_dict=False)[0].float()
            both = torch.cat([unconditional.expand_as(embeds), embeds])
            without, with_text = self.unet(x_t.repeat(2, 1, 1, 1), t, both, return_dict=False)[0].float().chunk(2)
        return without + self.guidance_scale * (with_text - without)

    def predictor(self, timesteps: Tensor, embeds: Tensor, unconditional: Tensor) -> Predict:
        return lambda x_t, i: self(x_t, timesteps[i], embeds, unconditional)


# --- sampling -------------------------------------------------------------------------------------


def sample(folder: Path, job: Job) -> dict[str, Any]:
    """Sample all images: write images/<id>.png and samples.pkl. Returns the content of sample.json."""
    clock, samples = Clock(job.device), []
    with clock("load"):
        policy, table, painter = Policy(job), job.sampler(), Painter(job)
        rng = torch.Generator(job.device).manual_seed(stable_seed(job.config["seed"], "peers"))
        size = job.config["pretrained"]["resolution"] // 8 or policy.unet.config.sample_size
        unconditional = painter.encode([""])

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=rng, device=job.device)

    with clock("sample"):
        for start in range(0, len(job.prompts), SAMPLE_BATCH):
            prompts = job.prompts[start : start + SAMPLE_BATCH]
            embeds = painter.encode(prompts)
            predict = policy.predictor(table.timesteps, embeds, unconditional)
            x_T = noise((len(prompts), policy.unet.config.in_channels, size, size))
            num_branches = job.config["split_time"]
            branches = sample_batch(predict, table, x_T, noise, num_branches, job.num_trained_steps)
            for k, (states, log_probs) in enumerate(branches):
                ids = [(start + n) * num_branches + k for n in range(len(prompts))]
                with clock("decode"):
                    images = painter.decode(states[:, -1])
                with clock("write"):
                    for n, image in zip(ids, images, strict=True):
                        files.write_image(folder / "images" / f"{n:05d}.png", image)
                samples.append(as_record(ids, prompts, states, log_probs, table.timesteps, embeds))
            with clock("write"):
                write_pickle(folder / SAMPLES, samples)
    write_pickle(folder / "unconditional.pkl", as_array(unconditional))
    return {"seconds": clock.seconds, "num_images": len(job.prompts) * num_branches}


@torch.no_grad()
def sample_batch(
    predict: Predict, table: Transitions, x_T: Tensor, noise: Noise, num_branches: int, num_trained_steps: int
) -> list[tuple[Tensor, Tensor]]:
    """Denoise x_T [B,C,h,w]: the shared prefix once, then branch after branch.

    Returns for each branch its states [B,T+1,C,h,w] and log-probs [B,T], prefix included.
    """
    split = table.num_steps - num_trained_steps
    states, log_probs = walk(predict, table, x_T, noise, range(split))
    branches = []
    for _ in range(num_branches):
        more_states, more_log_probs = walk(predict, table, states[-1], noise, range(split, table.num_steps))
        branches.append((torch.stack([*states, *more_states[1:]], 1), torch.stack([*log_probs, *more_log_probs], 1)))
    return branches


def walk(predict: Predict, table: Transitions, x: Tensor, noise: Noise, steps: range) -> tuple[list[Tensor], list[Tensor]]:
    """Denoise x [B,C,h,w] through `steps`. Returns the states, x first, and the log-probs [B] of the steps."""
    states, log_probs = [x], []
    for i in steps:
        mu, sigma = transition(table, i, x, predict(x, i))
        x = mu + sigma * noise(x.shape)
        states.append(x)
        log_probs.append(log_prob(x, mu, sigma))
    return states, log_probs


class Painter:
    """The text encoder and the image decoder."""

    def __init__(self, job: Job):
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        options = {"dtype": job.dtype}
        self.vae = AutoencoderKL.from_pretrained(job.root, subfolder="vae", **options).to(job.device).eval()
        self.text_encoder = CLIPTextModel.from_pretrained(job.root, subfolder="text_encoder", **options)
        self.text_encoder.to(job.device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(job.root, subfolder="tokenizer")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Embeddings [B,L,E] of prompts [B]."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [B,H,W,3] on the CPU of latents [B,C,h,w]."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(scaled, return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()


def as_record(
    ids: list[int], prompts: list[str], states: Tensor, log_probs: Tensor, timesteps: Tensor, embeds: Tensor
) -> dict[str, Any]:
    """The dict to pickle for B images, from states [B,T+1,C,h,w], log_probs [B,T], timesteps [T] and embeds [B,L,E]."""
    return {
        "ids": ids,
        "prompts": prompts,
        "latents": as_array(states[:, :-1]),
        "next_latents": as_array(states[:, 1:]),
        "log_probs": as_array(log_probs),
        "timesteps": as_array(timesteps.expand(len(ids), -1)),
        "prompt_embeds": as_array(embeds),
    }


def as_array(tensor: Tensor) -> Any:
    """A tensor as numpy array; bfloat16, which numpy lacks, as its bytes."""
    tensor = tensor.cpu().contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_tensor(array: Any, job: Job) -> Tensor:
    """The inverse of `as_array`, on the job's device."""
    tensor = torch.from_numpy(array)
    return (tensor.view(job.dtype) if tensor.dtype == torch.uint8 else tensor).to(job.device)


def write_pickle(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)


def read_pickle(path: Path) -> Any:
    """Unpickle a file. Only for files that this module has just written: a pickle can run code."""
    with path.open("rb") as file:
        return pickle.load(file)


# --- selecting ------------------------------------------------------------------------------------


def select(folder: Path, job: Job) -> dict[str, Any]:
    """Score the images and write selected.pkl. Returns the content of select.json."""
    clock = Clock(job.device)
    with clock("load"):
        scorer = Scorer(job)
    with clock("read"):
        samples = read_pickle(folder / SAMPLES)
    num_images = len(job.prompts) * job.config["split_time"]
    rewards, prompts = torch.zeros(num_images), [""] * num_images
    with clock("score"):
        for record in samples:
            for start in range(0, len(record["ids"]), SCORE_BATCH):
                ids, some = (record[key][start : start + SCORE_BATCH] for key in ("ids", "prompts"))
                images = torch.stack([files.read_image(folder / "images" / f"{n:05d}.png") for n in ids])
                rewards[ids] = scorer(images, some)
                for n, prompt in zip(ids, some, strict=True):
                    prompts[n] = prompt
    with clock("select"):
        selected = choose(job.config, samples, rewards, prompts)
    with clock("write"):
        write_pickle(folder / SELECTED, selected)
    return {"seconds": clock.seconds, "num_selected": len(selected)}


class Scorer:
    """CLIP score by transformers' model and image processor. A prompt is embedded once."""

    def __init__(self, job: Job):
        from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

        root, dtype = job.config["reward"]["clip"]["model"], torch.float16 if job.device.type == "cuda" else torch.float32
        self.model = CLIPModel.from_pretrained(root, dtype=dtype).to(job.device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(root)
        self.processor = AutoImageProcessor.from_pretrained(root, backend="pil")
        self.known: dict[str, Tensor] = {}  # prompt -> its embedding [E]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Rewards float32 [N] of images uint8 [N,H,W,3]."""
        pixels = self.processor(images=[*images.permute(0, 3, 1, 2)], return_tensors="pt").pixel_values
        seen = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype)).pooler_output
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]:
            length = self.model.config.text_config.max_position_embeddings
            options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            read = self.model.get_text_features(**self.tokenizer(new, **options).to(self.model.device)).pooler_output
            self.known |= dict(zip(new, read.float(), strict=True))
        text = torch.stack([self.known[prompt] for prompt in prompts])
        return torch.nn.functional.cosine_similarity(seen.float(), text).cpu()


def choose(config: dict[str, Any], samples: list[dict], rewards: Tensor, prompts: list[str]) -> list[dict[str, Any]]:
    """Select the trajectories to train on. Returns their arrays in the order of groups, each with its `advantage`."""
    selection, num_branches = config["selection"], config["split_time"]
    siblings = num_branches if selection["advantage"] == "group" else 0
    scores = normalise(rewards, prompts, num_siblings=siblings).unflatten(0, (-1, num_branches))
    thresholds = {key: selection[key] for key in ("pos_threshold", "neg_threshold")}
    chosen = select_all(scores) if selection["images"] == "all" else select_pairs(scores, **thresholds)
    weighted = advantages(
        torch.tensor([one.score for one in chosen]),
        clip=config["train"]["adv_clip_max"],
        positive_weight=config["train"]["beta1"],
        negative_weight=config["train"]["beta2"],
    )
    # image id -> (record of its batch, its row there)
    places = {n: (record, row) for record in samples for row, n in enumerate(record["ids"])}
    selected = []
    for one, advantage in zip(chosen, weighted.tolist(), strict=True):
        record, row = places[one.group * num_branches + one.branch]
        arrays = {key: value[row] for key, value in record.items() if key not in ("ids", "prompts")}
        selected.append(arrays | {"advantage": advantage})
    return selected


# --- training -------------------------------------------------------------------------------------


def train(folder: Path, job: Job) -> dict[str, Any]:
    """Train on selected.pkl and write the LoRA and the optimizer. Returns the content of train.json."""
    clock, config = Clock(job.device), job.config["train"]
    with clock("load"):
        policy, table = Policy(job), job.sampler()
        optimizer = torch.optim.AdamW(
            policy.lora.values(),
            lr=config["learning_rate"],
            betas=(config["adam_beta1"], config["adam_beta2"]),
            weight_decay=config["adam_weight_decay"],
            eps=config["adam_epsilon"],
        )
    with clock("train"):
        with clock("read"):
            selected = read_pickle(folder / SELECTED)
            unconditional = as_tensor(read_pickle(folder / "unconditional.pkl"), job)
            tensors = stack(selected, job) if selected else {}
        for epoch in range(1, config["num_epochs"] + 1):
            for rows in deal(len(selected), job, epoch):
                update(policy, optimizer, table, tensors, rows, unconditional, job)
        state = {f"unet.{name.replace('.default.', '.')}": value for name, value in policy.lora.items()}
        files.write_tensors(folder / LORA_FILE, state)
        torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    num_transitions = config["num_epochs"] * len(selected) * job.num_trained_steps
    return {"seconds": clock.seconds, "num_transitions": num_transitions}


def stack(selected: list[dict[str, Any]], job: Job) -> dict[str, Tensor]:
    """The selected trajectories as tensors [N, …] on the device, by name."""
    arrays = [key for key in selected[0] if key != "advantage"]
    tensors = {key: torch.stack([as_tensor(one[key], job) for one in selected]) for key in arrays}
    return tensors | {"advantage": torch.tensor([one["advantage"] for one in selected], device=job.device)}


def deal(num_selected: int, job: Job, epoch: int) -> list[Tensor]:
    """The rows of the selection that each update of an epoch takes: the same as ours, by the same seed."""
    train = job.config["train"]
    effective = train["batch_size"] * train["gradient_accumulation_steps"]
    order = torch.randperm(num_selected, generator=generator(job.config["seed"], 0, "train", epoch))
    return list(order.tensor_split(math.ceil(num_selected / effective))) if num_selected else []


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    table: Transitions,
    tensors: dict[str, Tensor],  # each [N, ...]
    rows: Tensor,  # [U]
    unconditional: Tensor,  # [1,L,E]
    job: Job,
) -> None:
    """One optimizer step on the mean loss of the trajectories `rows`, two at once and one denoising step after the other."""
    train, num_steps = job.config["train"], job.num_trained_steps
    weights = step_weights(table, Window.last(num_steps, table.num_steps), train["step_weight"])
    for some in rows.split(TRAIN_BATCH):
        batch = {key: value[some.to(value.device)] for key, value in tensors.items()}
        for step in range(num_steps):
            loss = step_loss(policy, table, batch, table.num_steps - num_steps + step, unconditional, train)
            (loss.sum() * weights[step] / (len(rows) * num_steps)).backward()
    torch.nn.utils.clip_grad_norm_(policy.lora.values(), train["max_grad_norm"])
    optimizer.step()
    optimizer.zero_grad()


def step_loss(
    policy: Policy, table: Transitions, batch: dict[str, Tensor], i: int, unconditional: Tensor, train: dict[str, Any]
) -> Tensor:
    """The loss [2] of two trajectories at step `i` of 0..T-1."""
    x_t, x_prev = batch["latents"][:, i], batch["next_latents"][:, i]
    mu, sigma = transition(table, i, x_t, policy(x_t, batch["timesteps"][0, i], batch["prompt_embeds"], unconditional))
    objective = read_training(train, guidance_scale=1.0).objective
    found = {
        "log_prob": log_prob(x_prev, mu, sigma),
        "old_log_prob": batch["log_probs"][:, i],
        "advantage": batch["advantage"],
    }
    loss, _ = objective(*(found[name] for name in objective.terms))
    return loss


VERBS: dict[str, Callable[[Path, Job], dict[str, Any]]] = {"sample": sample, "select": select, "train": train}


if __name__ == "__main__":
    main()
