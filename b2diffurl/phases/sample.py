"""Branch-sample one stage: trajectories of the trained window and their images.

G groups a batch, K branches, S trained steps, N = G*K images a batch
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from b2diffurl.algorithm.branching import branch_sample
from b2diffurl.algorithm.seeding import generator, noise_source
from b2diffurl.algorithm.transition import Transitions, require_stochastic, with_prefix
from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import batch_prompts, named_prompts
from b2diffurl.configuration.recorded import record_experiment
from b2diffurl.evaluation.generate import deployed_sampler, make_scheduler
from b2diffurl.experiment.branch_picture import decode_tree, recording_prefix, save_tree
from b2diffurl.experiment.metrics import Metrics, timed
from b2diffurl.experiment.not_finite import listed, not_finite
from b2diffurl.experiment.stage import Stage, finished_stages
from b2diffurl.experiment.trajectories import batch_damage, read_batch_prompts, save_batch
from b2diffurl.models import Model
from b2diffurl.models.policy import compiling, decode, load_policy, predictor, warn_of_cut_prompts
from b2diffurl.phases.preflight import check_later_phases
from b2diffurl.reporting.forecast import first_batch_text
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes, peak_memory, sampling_sizes
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger, progress_bar
from b2diffurl.runtime.threads import Behind


def sample_stage(plan: Plan) -> None:
    """Sample every batch of the stage that is not on disk yet; processes share them, and none depends on which has it."""
    check_later_phases(plan)
    stage = plan.stage
    if stage.finished("sample"):
        logger.info("stage%d sample: already finished", stage.index)
        restore_record(plan)
        return
    files.require_writable(stage.folder)
    started = time.perf_counter()
    accelerator = make_accelerator(plan.settings.compute)
    model, sampler = load_sampled_policy(plan, accelerator)
    facts = stage_facts(plan, model, accelerator)
    missing = [batch for batch in range(plan.settings.sampling.num_batches) if not is_sampled(stage, batch, facts["policy"])]
    begin_stage(plan, model, accelerator)
    logger.info(
        "stage%d sample: S %d of %d, %d images, from %s",
        stage.index, plan.num_trained_steps, sampler.num_steps, facts["num_images"], plan.start,
    )  # fmt: skip
    sizes = batch_sizes(plan, accelerator)
    if missing:
        warm_up(plan, model, sampler, sizes)
    loaded = time.perf_counter()
    share = len(missing) / plan.settings.sampling.num_batches
    seconds = {"load": loaded - started, "sample": 0.0, "decode": 0.0, "write": 0.0, "share": share}
    if accelerator.num_processes > 1:  # before another process has written a batch
        if accelerator.is_main_process:
            record_experiment(plan.record, torch.get_num_threads())
        accelerator.wait_for_everyone()
    todo = missing[accelerator.process_index :: accelerator.num_processes]
    with progress_bar(len(todo) * images_per_batch(plan), f"stage{stage.index} sample", "images") as bar, Behind() as writer:
        sampling = BatchSampler(plan, model, sampler, sizes, facts["policy"], writer, bar, seconds)
        sample_batches(sampling, todo, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seconds["sample"] = time.perf_counter() - loaded
        finish(
            plan, facts | {"batch_sizes": sizes.sizes} | peak_memory(accelerator.device), seconds, num_sampled=len(missing)
        )
    accelerator.wait_for_everyone()  # until the phase is finished for all
    accelerator.end_training()


def restore_record(plan: Plan) -> None:
    """Write config.json again if it was lost after the stage had been sampled."""
    if int(os.environ.get("RANK", 0)) == 0 and not (plan.stage.root / "config.json").is_file():
        record_experiment(plan.record, plan.stage.manifest("sample")["num_threads"])


def load_sampled_policy(plan: Plan, accelerator: Accelerator) -> tuple[Model, Transitions]:
    """The policy that samples, and its steps: stochastic at the trained ones, before them as sample.prefix_eta says."""
    sampling = plan.settings.sampling
    model = load_policy(
        plan.settings.model,
        accelerator,
        plan.resume_from,
        seed=plan.settings.schedule.seed,
        compile=plan.settings.compute.compile,
    )
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    sampler = model.sampler(sampling.num_steps, sampling.eta)
    require_stochastic(sampler, plan.num_trained_steps)
    if sampling.prefix_eta >= 0:
        sampler = with_prefix(sampler, model.sampler(sampling.num_steps, sampling.prefix_eta), plan.num_trained_steps)
    make_scheduler(model, deployed_sampler(plan.settings), accelerator.device)  # refused now rather than when it is judged
    return model, sampler


def begin_stage(plan: Plan, model: Model, accelerator: Accelerator) -> None:
    """Remove what an interrupted run left half written; in a new experiment warn of prompts that the model cuts."""
    if accelerator.is_main_process:
        files.remove_temporaries(plan.stage.folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (plan.stage.root / "config.json").is_file():
        warn_of_cut_prompts(model, named_prompts(plan.settings.prompts, "train"))


def images_per_batch(plan: Plan) -> int:
    return plan.settings.sampling.num_groups * plan.settings.sampling.num_branches


def batch_sizes(plan: Plan, accelerator: Accelerator) -> BatchSizes:
    """How many images the network and the decoder take at once."""
    settings = plan.settings
    return sampling_sizes(
        plan.stage.root,
        accelerator.device,
        images_per_batch(plan),
        micro_batch_size=settings.sampling.micro_batch_size,
        decode_batch_size=settings.sampling.decode_batch_size,
        given=[settings.model.resolution, settings.compute.compile],
        alone=accelerator.num_processes == 1,
    )


def warm_up(plan: Plan, model: Model, sampler: Transitions, sizes: BatchSizes) -> None:
    """Compile the network, if it is to be compiled, for prefixes and for branches before the first batch."""
    sampling = plan.settings.sampling
    with compiling(plan.settings.compute.compile, f"stage{plan.stage.index} sample") as wanted:
        if wanted:
            embeds = model.encode([""])
            predict = predictor(model, sampler.timesteps, embeds, embeds, guidance_scale=sampling.guidance_scale)

            def warm(x_t: Tensor, size: int) -> None:
                for part in {min(size, len(x_t)), len(x_t) % size} - {0}:  # whole micro-batches, and what is left
                    predict(x_t[:part], 0).cpu()

            for rows in (sampling.num_groups, images_per_batch(plan)):
                x_t = torch.zeros(rows, *model.latent_shape, device=sampler.sigma.device)
                sizes.fit("sample.micro_batch_size", lambda size, x_t=x_t: warm(x_t, size))


@dataclass
class BatchSampler:
    """Samples the batches of one stage, one after the other."""

    plan: Plan
    model: Model
    sampler: Transitions
    sizes: BatchSizes
    policy: dict[str, Any]  # metadata of every batch's file
    writer: Behind  # encodes and writes a batch while the next one is sampled
    bar: tqdm  # counts images, a step of one as its share of the network's evaluations
    seconds: dict[str, float]  # decode, and write: waited for the writer

    @cached_property
    def unconditional(self) -> Conditions:
        return self.model.encode([""])

    def do(self, batch: int, *, record: bool) -> None:
        """Sample one batch from noise that follows from (seed, stage, batch) alone; its file is the last thing written.

        With `record` the experiment's config.json is written as soon as there is something that depends on it.
        """
        prompts = self.prompts(batch)
        distinct = list(dict.fromkeys(prompts))
        conditions = self.model.encode(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        of_groups = {name: value[rows] for name, value in conditions.items()}
        latents, log_probs, prefix = self.sizes.fit(
            "sample.micro_batch_size", lambda size: self.trajectories(batch, of_groups, size)
        )
        require_finite(latents, log_probs, prompts, self.plan.stage, batch)
        self.bar.set_postfix_str("decoding")
        with timed(self.seconds, "decode"):
            images = self.decode_batch(batch, latents[:, :, -1].flatten(0, 1))
            shows_tree = batch == 0 and self.plan.settings.sampling.shared_prefix
            sheet = decode_tree(prompts[0], prefix, latents[0], self.decode) if shows_tree else None
        self.bar.set_postfix_str("")
        if record:
            record_experiment(self.plan.record, torch.get_num_threads())
        stage, window = self.plan.stage, self.sampler.timesteps[-self.plan.num_trained_steps :]

        def write() -> None:
            written = [stage.image(batch * len(images) + n) for n in range(len(images))]
            for path, image in zip(written, images, strict=True):
                files.write_image(path, image)
            written += save_tree(stage, sheet) if sheet else []
            states = latents, log_probs, window
            save_batch(stage.batch(batch), *states, prompts, conditions, self.unconditional, self.policy, written)

        with timed(self.seconds, "write"):
            self.writer.do(write)

    def prompts(self, batch: int) -> list[str]:
        """One prompt a group."""
        settings, index = self.plan.settings, self.plan.stage.index
        at_random = settings.prompts.at_random
        choice = generator(settings.schedule.seed, index, "prompts", batch) if at_random else None
        turn = index * settings.sampling.num_batches + batch  # stages go on through the list where one stopped
        return batch_prompts(list(self.plan.prompts), settings.sampling.num_groups, turn, choice)

    def trajectories(self, batch: int, conditions: Conditions, micro_batch_size: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """States of the trained window [G,K,S+1,C,h,w], log_probs [G,K,S], and the first group's states before it."""
        sampling, num_trained_steps = self.plan.settings.sampling, self.plan.num_trained_steps
        seed = self.plan.settings.schedule.seed
        noise = noise_source(generator(seed, self.plan.stage.index, "sample", batch), self.sampler.sigma.device)
        predict = predictor(
            self.model,
            self.sampler.timesteps,
            conditions,
            self.unconditional,
            guidance_scale=sampling.guidance_scale,
            micro_batch_size=micro_batch_size,
        )
        budget = Budget.of(self.plan.settings)
        images_per_evaluation = budget.num_images / budget.num_evaluations(num_trained_steps)

        def predict_and_show(x_t: Tensor, i: int) -> Tensor:
            output = predict(x_t, i)
            self.bar.update(len(x_t) * images_per_evaluation)
            return output

        # Independent siblings are groups of one branch each, put together afterwards.
        branches = sampling.num_branches if sampling.shared_prefix else 1
        prefix: list[Tensor] = []
        latents, log_probs = branch_sample(
            recording_prefix(predict_and_show, self.sampler.num_steps - num_trained_steps, prefix),
            self.sampler,
            noise((sampling.num_groups * sampling.num_branches // branches, *self.model.latent_shape)),
            noise,
            num_branches=branches,
            num_trained_steps=num_trained_steps,
        )
        grouped = (sampling.num_groups, sampling.num_branches)
        return *(states.flatten(0, 1).unflatten(0, grouped) for states in (latents, log_probs)), prefix

    def decode_batch(self, batch: int, latents: Tensor) -> Tensor:
        """Images uint8 [N,H,W,3]; a FloatingPointError where the decoder overflows, after the latents have been kept."""
        try:
            return self.decode(latents)
        except FloatingPointError as error:
            path, ids = self.plan.stage.batch(batch), range(batch * len(latents), (batch + 1) * len(latents))
            said = f"{path}: among images {listed(ids)} {error}"
            raise not_finite(self.plan.stage, path.stem, said, {"latents": latents}, {"images": list(ids)}) from None

    def decode(self, latents: Tensor) -> Tensor:
        return self.sizes.fit("sample.decode_batch_size", lambda size: decode(self.model, latents, size))


def sample_batches(sampling: BatchSampler, todo: Sequence[int], accelerator: Accelerator) -> None:
    """Batch after batch until all are written; in an experiment's first stage the first one says how long a run takes."""
    plan, started = sampling.plan, time.perf_counter()
    for batch in todo:
        sampling.do(batch, record=accelerator.is_main_process)
        if batch == todo[0] and not finished_stages(plan.stage.root, "train"):
            batch_sec = (time.perf_counter() - started) / accelerator.num_processes
            load_sec = sampling.seconds["load"]
            said = first_batch_text(plan.settings, plan.num_trained_steps, batch_sec, load_sec)
            logger.info("stage%d sample: %s", plan.stage.index, said)
    with timed(sampling.seconds, "write"):
        sampling.writer.wait()


def require_finite(latents: Tensor, log_probs: Tensor, prompts: list[str], stage: Stage, batch: int) -> None:
    """A FloatingPointError names the images whose log-probability is not finite, after their states have been kept."""
    bad = (~log_probs.isfinite()).any(2)  # [G,K]
    if bad.any():
        groups = bad.any(1).nonzero().flatten().tolist()
        ids = (batch * bad.numel() + bad.flatten().nonzero().flatten()).tolist()
        tensors = {"latents": latents[groups], "log_probs": log_probs[groups]}
        facts = {"images": ids, "groups": groups, "prompts": [prompts[g] for g in groups]}
        said = f"{stage.batch(batch)}: log-probabilities of images {listed(ids)}, groups {listed(groups)}, are not finite"
        raise not_finite(stage, stage.batch(batch).stem, said, tensors, facts)


def stage_facts(plan: Plan, model: Model, accelerator: Accelerator) -> dict[str, Any]:
    """What the manifest records; `policy` is what the batches on disk must agree on."""
    settings, budget = plan.settings, Budget.of(plan.settings)
    policy = {
        "num_trained_steps": plan.num_trained_steps,
        "num_branches": settings.sampling.num_branches,
        "mixed_precision": accelerator.mixed_precision,
        "base_model_sha256": model.fingerprint,
        "lora_sha256": files.sha256(plan.resume_from) if plan.resume_from else "",
    }
    return {
        "seed": settings.schedule.seed,
        "num_trained_steps": plan.num_trained_steps,
        "num_images": budget.num_images,
        "num_evaluations": budget.num_evaluations(plan.num_trained_steps),
        "policy": policy,
        "batch_shape": [settings.sampling.num_groups, settings.sampling.num_branches, *model.latent_shape],
        "scheduler": json.loads(json.dumps(model.scheduler_config, default=str)),
        "mixed_precision": accelerator.mixed_precision,
        "device": str(accelerator.device),
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
    }


def is_sampled(stage: Stage, batch: int, policy: dict[str, Any]) -> bool:
    """Whether a batch is on disk as it was written.

    A damaged one is sampled again. A ValueError refuses one that another policy sampled, or another S.
    """
    path = stage.batch(batch)
    if not path.is_file():
        return False
    if damage := batch_damage(path):
        logger.warning("stage%d sample: batch %d is sampled again: %s", stage.index, batch, damage)
        return False
    found = files.read_metadata(path)
    found.setdefault("mixed_precision", policy["mixed_precision"])  # which earlier versions did not record
    different = [f"{key} ({found.get(key)}, now {value})" for key, value in policy.items() if found.get(key) != value]
    if different:
        why = "; stage_cnt and split_step_left and _right decide it" if "num_trained_steps" in different[0] else ""
        raise ValueError(
            f"{path} was sampled with another {', '.join(different)}{why}. Give what it was sampled with, delete "
            f"{stage.folder} to sample it anew, or use another exp_name."
        )
    return True


def finish(plan: Plan, facts: dict[str, Any], seconds: dict[str, float], *, num_sampled: int) -> None:
    """Write prompts.json, metrics and, last, the manifest."""
    stage, sampling = plan.stage, plan.settings.sampling
    batches = [stage.batch(batch) for batch in range(sampling.num_batches)]
    prompts = [prompt for path in batches for prompt in batch_image_prompts(path, sampling.num_branches)]
    files.write_json(stage.prompts, prompts)
    images = [stage.image(n) for n in range(len(prompts))]
    written = [*batches, stage.prompts, *images, *stage.folder.glob("tree.*")]
    counts = {key: facts[key] for key in ("num_trained_steps", "num_images", "num_evaluations")}
    spent = {key: seconds[key] for key in ("load", "sample", "decode", "write")}
    Metrics(stage.metrics("sample")).log("sample", stage=stage.index, **counts, **spent)
    stage.write_manifest("sample", facts | {"seconds": seconds}, [*written, stage.metrics("sample")])
    rate = num_sampled * images_per_batch(plan) / seconds["sample"]
    done = "stage%d sample: done in %.1f s, %d images, %.1f images/s"
    logger.info(done, stage.index, seconds["sample"], len(prompts), rate)


def batch_image_prompts(path: Path, num_branches: int) -> Iterator[str]:
    """The prompt of each image of a batch on disk, in order."""
    ids, distinct = read_batch_prompts(path)
    for n in ids:
        yield from [distinct[n]] * num_branches
