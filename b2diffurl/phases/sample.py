"""Branch-sample one stage: trajectories of the trained window and their images.

G groups a batch, K branches, S trained steps, N = G*K images a batch
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from b2diffurl.algorithm.branching import branch_sample
from b2diffurl.algorithm.seeding import generator, noise_source
from b2diffurl.algorithm.transition import Transitions, require_stochastic, with_prefix
from b2diffurl.configuration.budget import num_evaluations, num_images
from b2diffurl.configuration.plan import Plan, record_experiment
from b2diffurl.configuration.prompts import batch_prompts, load_prompts, named_prompts
from b2diffurl.configuration.rules import check_installed
from b2diffurl.evaluation.features import check_features
from b2diffurl.evaluation.generate import SamplerSettings, deployed_sampler, make_scheduler
from b2diffurl.experiment.branch_picture import decode_tree, save_tree, watching
from b2diffurl.experiment.metrics import Metrics, timed
from b2diffurl.experiment.stage import Stage, finished_stages, listed, not_finite
from b2diffurl.experiment.trajectories import Conditions, batch_damage, read_batch_prompts, save_batch
from b2diffurl.models import Model
from b2diffurl.models.policy import compiling, decode, load_policy, predictor, warn_of_cut_prompts
from b2diffurl.reporting.forecast import first_batch_text
from b2diffurl.rewards import check_rewards, reward_weights
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes, peak_memory, sampling_sizes
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger, progress_bar
from b2diffurl.runtime.threads import Behind


def sample_stage(plan: Plan) -> None:
    """Sample every batch of the stage that is not on disk yet; processes share them, and none depends on which has it."""
    config = plan.config
    deployed = check_what_follows(config, plan)
    stage = plan.stage
    if stage.finished("sample"):
        logger.info("stage%d sample: already finished", stage.index)
        if int(os.environ.get("RANK", 0)) == 0 and not (stage.root / "config.json").is_file():  # lost
            record_experiment(plan, stage.manifest("sample")["num_threads"])
        return
    files.require_writable(stage.folder)
    started = time.perf_counter()
    accelerator = make_accelerator(plan.settings.compute)
    model = load_policy(config, accelerator, plan.resume_from)
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    sampler = stage_sampler(config, plan, model)
    make_scheduler(model, deployed, accelerator.device)  # refused now rather than when the run is judged by it
    facts = stage_facts(config, plan, model, accelerator)
    num_batches = config.sample.num_batches_per_epoch
    missing = [batch for batch in range(num_batches) if not is_sampled(stage, batch, facts["policy"])]
    if accelerator.is_main_process:
        files.remove_temporaries(stage.folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (stage.root / "config.json").is_file():
        warn_of_cut_prompts(model, named_prompts(config, "train"))
    logger.info(
        "stage%d sample: S %d of %d, %d images, from %s",
        stage.index, plan.num_trained_steps, sampler.num_steps, facts["num_images"], plan.start,
    )  # fmt: skip
    alone = accelerator.num_processes == 1
    sizes = sampling_sizes(config, accelerator.device, config.sample.batch_size * config.split_time, alone=alone)
    if missing:
        warm_up(config, model, sampler, sizes, f"stage{stage.index} sample")
    loaded = time.perf_counter()
    seconds = {"load": loaded - started, "sample": 0.0, "decode": 0.0, "write": 0.0, "share": len(missing) / num_batches}
    if accelerator.num_processes > 1:  # before another one's batch is there
        if accelerator.is_main_process:
            record_experiment(plan, torch.get_num_threads())
        accelerator.wait_for_everyone()
    todo = missing[accelerator.process_index :: accelerator.num_processes]
    num_here = len(todo) * config.sample.batch_size * config.split_time
    with progress_bar(num_here, f"stage{stage.index} sample", "images") as bar, Behind() as writer:
        sampling = Sampling(config, plan, model, sampler, sizes, facts["policy"], writer, bar, seconds)
        sample_batches(sampling, todo, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seconds["sample"] = time.perf_counter() - loaded
        facts |= {"batch_sizes": sizes.sizes} | peak_memory(accelerator.device)
        finish(config, plan, facts, seconds, num_sampled=len(missing))
    accelerator.wait_for_everyone()  # until the phase is finished for all
    accelerator.end_training()


def check_what_follows(config: ConfigDict, plan: Plan) -> SamplerSettings:
    """Refuse now what selecting, training or judging would refuse later; returns the sampler that judging deploys."""
    check_installed(config.train)
    check_rewards([*reward_weights(config.reward), *config.reward.watch], config.reward, plan.prompts)
    if config.eval.judge:
        check_rewards([config.eval.judge], config.reward, [*plan.prompts, *load_prompts(config.eval.prompt_file)])
    for name in config.eval.diversity:
        check_features(name, config, plan.prompts)
    return deployed_sampler(config)


def stage_sampler(config: ConfigDict, plan: Plan, model: Model) -> Transitions:
    """Stochastic at the trained steps, and before them as config.sample.prefix_eta says."""
    sampler = model.sampler(config.sample.num_steps, config.sample.eta)
    require_stochastic(sampler, plan.num_trained_steps)
    if config.sample.prefix_eta < 0:
        return sampler
    return with_prefix(sampler, model.sampler(config.sample.num_steps, config.sample.prefix_eta), plan.num_trained_steps)


def warm_up(config: ConfigDict, model: Model, sampler: Transitions, sizes: BatchSizes, where: str) -> None:
    """Have a network that is compiled be so, for prefixes and for branches, before the first batch."""
    with compiling(config, where) as wanted:
        if wanted:
            embeds = model.encode([""])
            predict = predictor(model, sampler.timesteps, embeds, embeds, guidance_scale=config.sample.guidance_scale)

            def warm(x_t: Tensor, size: int) -> None:
                for part in {min(size, len(x_t)), len(x_t) % size} - {0}:  # whole micro-batches, and what is left
                    predict(x_t[:part], 0).cpu()

            for rows in (config.sample.batch_size, config.sample.batch_size * config.split_time):
                x_t = torch.zeros(rows, *model.latent_shape, device=sampler.sigma.device)
                sizes.fit("sample.micro_batch_size", lambda size, x_t=x_t: warm(x_t, size))


@dataclass
class Sampling:
    """Everything a batch of a stage needs but its number."""

    config: ConfigDict
    plan: Plan
    model: Model
    sampler: Transitions
    sizes: BatchSizes
    policy: dict  # metadata of every batch's file
    writer: Behind  # encodes and writes a batch while the next one is sampled
    bar: tqdm  # counts images, a step of one as its share of the network's evaluations
    seconds: dict[str, float]  # decode, and write: waited for the writer

    def __post_init__(self) -> None:
        self.unconditional = self.model.encode([""])

    def do(self, batch: int, *, record: bool) -> None:
        """Sample one batch from noise that follows from (seed, stage, batch) alone; its file is the last thing written.

        With `record` the experiment's config.json is written as soon as there is something that depends on it.
        """
        config, stage = self.config, self.plan.stage
        prompts = self.prompts(batch)
        distinct = list(dict.fromkeys(prompts))
        conditions, unconditional = self.model.encode(distinct), self.unconditional
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        of_groups = {name: value[rows] for name, value in conditions.items()}
        latents, log_probs, prefix = self.sizes.fit(
            "sample.micro_batch_size", lambda size: self.trajectories(batch, of_groups, unconditional, size)
        )
        require_finite(latents, log_probs, prompts, stage, batch)
        self.bar.set_postfix_str("decoding")
        with timed(self.seconds, "decode"):
            images = self.decode_batch(batch, latents[:, :, -1].flatten(0, 1))
            tree = batch == 0 and config.sampling == "branch"
            sheet = decode_tree(prompts[0], prefix, latents[0], self.decode) if tree else None
        self.bar.set_postfix_str("")
        if record:
            record_experiment(self.plan, torch.get_num_threads())
        window = self.sampler.timesteps[-self.plan.num_trained_steps :]

        def write() -> None:
            written = [stage.image(batch * len(images) + n) for n in range(len(images))]
            for path, image in zip(written, images, strict=True):
                files.write_image(path, image)
            written += save_tree(stage, sheet) if sheet else []
            states = latents, log_probs, window
            save_batch(stage.batch(batch), *states, prompts, conditions, unconditional, self.policy, written)

        with timed(self.seconds, "write"):
            self.writer.do(write)

    def prompts(self, batch: int) -> list[str]:
        """One prompt a group."""
        config, index = self.config, self.plan.stage.index
        choice = generator(config.seed, index, "prompts", batch) if config.prompt_random_choose else None
        turn = index * config.sample.num_batches_per_epoch + batch  # stages go on through the list where one stopped
        return batch_prompts(list(self.plan.prompts), config.sample.batch_size, turn, choice)

    def trajectories(
        self, batch: int, conditions: Conditions, unconditional: Conditions, micro_batch_size: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """States of the trained window [G,K,S+1,C,h,w], log_probs [G,K,S], and the first group's states before it."""
        config, num_trained_steps = self.config, self.plan.num_trained_steps
        noise = noise_source(generator(config.seed, self.plan.stage.index, "sample", batch), self.sampler.sigma.device)
        predict = predictor(
            self.model,
            self.sampler.timesteps,
            conditions,
            unconditional,
            guidance_scale=config.sample.guidance_scale,
            micro_batch_size=micro_batch_size,
        )
        images_per_evaluation = num_images(config) / num_evaluations(config, num_trained_steps)

        def predict_and_show(x_t: Tensor, i: int) -> Tensor:
            output = predict(x_t, i)
            self.bar.update(len(x_t) * images_per_evaluation)
            return output

        branches = config.split_time if config.sampling == "branch" else 1  # of each prefix
        prefix: list[Tensor] = []
        latents, log_probs = branch_sample(
            watching(predict_and_show, self.sampler.num_steps - num_trained_steps, prefix),
            self.sampler,
            noise((config.sample.batch_size * config.split_time // branches, *self.model.latent_shape)),
            noise,
            num_branches=branches,
            num_trained_steps=num_trained_steps,
        )
        grouped = (config.sample.batch_size, config.split_time)
        return *(states.flatten(0, 1).unflatten(0, grouped) for states in (latents, log_probs)), prefix

    def decode_batch(self, batch: int, latents: Tensor) -> Tensor:
        try:
            return self.decode(latents)
        except FloatingPointError as error:
            path, ids = self.plan.stage.batch(batch), range(batch * len(latents), (batch + 1) * len(latents))
            said = f"{path}: among images {listed(ids)} {error}"
            raise not_finite(self.plan.stage, path.stem, said, {"latents": latents}, {"images": list(ids)}) from None

    def decode(self, latents: Tensor) -> Tensor:
        return self.sizes.fit("sample.decode_batch_size", lambda size: decode(self.model, latents, size))


def sample_batches(sampling: Sampling, todo: Sequence[int], accelerator: Accelerator) -> None:
    """Batch after batch until all are written; in an experiment's first stage the first one says how long a run takes."""
    config, plan, started = sampling.config, sampling.plan, time.perf_counter()
    for batch in todo:
        sampling.do(batch, record=accelerator.is_main_process)
        if batch == todo[0] and not finished_stages(plan.stage.root, "train"):
            batch_sec = (time.perf_counter() - started) / accelerator.num_processes
            load_sec = sampling.seconds["load"]
            known = first_batch_text(config, plan.stage.root, plan.num_trained_steps, batch_sec, load_sec)
            logger.info("stage%d sample: %s", plan.stage.index, known)
    with timed(sampling.seconds, "write"):
        sampling.writer.wait()


def require_finite(latents: Tensor, log_probs: Tensor, prompts: list[str], stage: Stage, batch: int) -> None:
    bad = (~log_probs.isfinite()).any(2)  # [G,K]
    if bad.any():
        groups = bad.any(1).nonzero().flatten().tolist()
        ids = (batch * bad.numel() + bad.flatten().nonzero().flatten()).tolist()
        tensors = {"latents": latents[groups], "log_probs": log_probs[groups]}
        facts = {"images": ids, "groups": groups, "prompts": [prompts[g] for g in groups]}
        said = f"{stage.batch(batch)}: log-probabilities of images {listed(ids)}, groups {listed(groups)}, are not finite"
        raise not_finite(stage, stage.batch(batch).stem, said, tensors, facts)


def stage_facts(config: ConfigDict, plan: Plan, model: Model, accelerator: Accelerator) -> dict:
    """What the manifest records; `policy` is what the batches on disk must agree on."""
    policy = {
        "num_trained_steps": plan.num_trained_steps,
        "num_branches": config.split_time,
        "mixed_precision": accelerator.mixed_precision,
        "base_model_sha256": model.fingerprint,
        "lora_sha256": files.sha256(plan.resume_from) if plan.resume_from else "",
    }
    return {
        "seed": config.seed,
        "num_trained_steps": plan.num_trained_steps,
        "num_images": num_images(config),
        "num_evaluations": num_evaluations(config, plan.num_trained_steps),
        "policy": policy,
        "batch_shape": [config.sample.batch_size, config.split_time, *model.latent_shape],
        "scheduler": json.loads(json.dumps(model.scheduler_config, default=str)),
        "mixed_precision": accelerator.mixed_precision,
        "device": str(accelerator.device),
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
    }


def is_sampled(stage: Stage, batch: int, policy: dict) -> bool:
    """Whether a batch is on disk as it was written; one that is damaged is sampled again, and one of another policy, or
    another S, refused."""
    path = stage.batch(batch)
    if not path.is_file():
        return False
    if damage := batch_damage(path):
        logger.warning("stage%d sample: batch %d is sampled again: %s", stage.index, batch, damage)
        return False
    found = files.read_metadata(path)
    found.setdefault("mixed_precision", policy["mixed_precision"])  # of an earlier version
    different = [f"{key} ({found.get(key)}, now {value})" for key, value in policy.items() if found.get(key) != value]
    if different:
        why = "; stage_cnt and split_step_left and _right decide it" if "num_trained_steps" in different[0] else ""
        raise ValueError(
            f"{path} was sampled with another {', '.join(different)}{why}. Give what it was sampled with, delete "
            f"{stage.folder} to sample it anew, or use another exp_name."
        )
    return True


def finish(config: ConfigDict, plan: Plan, facts: dict, seconds: dict, *, num_sampled: int) -> None:
    """Write prompts.json, metrics and, last, the manifest."""
    stage, num_batches = plan.stage, config.sample.num_batches_per_epoch
    prompts, written = [], []
    for batch in range(num_batches):
        ids, distinct = read_batch_prompts(stage.batch(batch))
        prompts += [distinct[n] for n in ids for _ in range(config.split_time)]
        written.append(stage.batch(batch))
    files.write_json(stage.prompts, prompts)
    written += [stage.prompts, *(stage.image(n) for n in range(len(prompts))), *stage.folder.glob("tree.*")]
    rate = num_sampled * config.sample.batch_size * config.split_time / seconds["sample"]
    counts = {key: facts[key] for key in ("num_trained_steps", "num_images", "num_evaluations")}
    spent = {key: seconds[key] for key in ("load", "sample", "decode", "write")}
    Metrics(stage.metrics("sample")).log("sample", stage=stage.index, **counts, **spent)
    stage.write_manifest("sample", facts | {"seconds": seconds}, [*written, stage.metrics("sample")])
    done = "stage%d sample: done in %.1f s, %d images, %.1f images/s"
    logger.info(done, stage.index, seconds["sample"], len(prompts), rate)
