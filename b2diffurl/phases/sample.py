"""The sample phase: branch-sample one stage's trajectories, and decode their images.

G groups in a batch, K branches, N = G*K images in a batch
T sampler steps, S of them trained: the window
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.algorithm.branching import branch_sample
from b2diffurl.algorithm.seeding import generator, noise_source
from b2diffurl.algorithm.transition import Transitions, put_together, require_stochastic
from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.types import Conditions, Predict
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import batch_prompts, named_prompts
from b2diffurl.configuration.recorded import lasting_settings, record_experiment
from b2diffurl.configuration.settings import Sampling
from b2diffurl.evaluation.generate import denoise_by, deployed_sampler, training_sampler
from b2diffurl.evaluation.measure import named_scorers
from b2diffurl.experiment.branch_picture import decode_tree, recording_prefix, save_tree
from b2diffurl.experiment.metrics import Metrics, timed
from b2diffurl.experiment.not_finite import listed, not_finite
from b2diffurl.experiment.origin import history_stages, require_origin
from b2diffurl.experiment.stage import Stage, finished_stages
from b2diffurl.experiment.trajectories import batch_damage, read_batch_prompts, save_batch
from b2diffurl.models import Model
from b2diffurl.models.policy import compiling, decode, load_policy, predictor, warn_of_cut_prompts
from b2diffurl.phases.inputs import identified, reward_checksums
from b2diffurl.phases.preflight import check_later_phases
from b2diffurl.phases.scoring_beside import Beside
from b2diffurl.reporting.forecast import first_batch_text
from b2diffurl.rewards import probe_rewards
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes, peak_memory, sampling_sizes
from b2diffurl.runtime.device import make_accelerator, set_defaults
from b2diffurl.runtime.logs import Progress, logger
from b2diffurl.runtime.stopwatch import working_sec
from b2diffurl.runtime.threads import Behind


def sample_stage(plan: Plan) -> None:
    """Sample the stage's batches that are not on disk yet, and write the phase's manifest.

    Processes take the batches in turn. A batch's numbers do not depend on which process samples it.
    """
    set_defaults(plan.settings.compute)  # before anything is computed
    check_later_phases(plan)  # also if this phase is finished: a later one may not be
    stage, num_steps = plan.stage, plan.settings.sampling.num_steps
    require_origin(stage)
    if stage.finished("sample"):
        logger.info("stage%d sample: already finished", stage.index)
        restore_record(plan)
        return
    plan = identified(plan)
    reward_checksums(plan)  # refuses what would only be refused after hours of sampling
    probe_rewards(named_scorers(plan.settings), plan.settings.rewards)
    history_stages(stage, plan.settings.selection.num_history_stages)  # what select will need is there
    files.require_writable(stage.folder)
    started = working_sec()
    accelerator = make_accelerator(plan.settings.compute)
    model, sampler = load_sampled_policy(plan, accelerator)
    facts = stage_facts(plan, model, sampler, accelerator)
    # Every process reads all batches before `begin_stage` lets any of them write, so they agree on what is missing.
    missing = [batch for batch in range(plan.settings.sampling.num_batches) if not is_sampled(stage, batch, facts["policy"])]
    begin_stage(plan, model, accelerator)
    logger.info(
        "stage%d sample: S %s of %d, %d images, from %s",
        stage.index, plan.window.text(num_steps), num_steps, facts["num_images"], plan.start,
    )  # fmt: skip
    sizes = batch_sizes(plan, accelerator)
    if missing:
        warm_up(plan, model, sampler, sizes)
    loaded = working_sec()  # after compiling, which would make the forecast of the sampling too long
    share = len(missing) / plan.settings.sampling.num_batches
    seconds = {"load": loaded - started, "sample": 0.0, "decode": 0.0, "write": 0.0, "share": share}
    # No batch may exist without config.json. One process writes it just before its first batch, so that a run which fails
    # earlier leaves no experiment behind. With several, another process could be the first to write a batch.
    if accelerator.num_processes > 1:
        if accelerator.is_main_process:
            record_experiment(plan.record, torch.get_num_threads())
        accelerator.wait_for_everyone()
    # Until the manifest is written, images on disk are scored, if the reward waits for another program.
    with scoring_beside(plan, missing, accelerator) as beside:
        batches = missing[accelerator.process_index :: accelerator.num_processes]
        num_images = len(batches) * images_per_batch(plan)
        with Progress(num_images, f"stage{stage.index} sample", "images") as bar, Behind() as writer:
            batch_sampler = BatchSampler(plan, model, sampler, sizes, facts["policy"], writer, beside, bar, seconds)
            sample_batches(batch_sampler, batches, accelerator)
        accelerator.wait_for_everyone()  # the manifest lists the batches of all processes
        if accelerator.is_main_process:
            seconds["sample"] = working_sec() - loaded
            facts |= {"batch_sizes": sizes.sizes} | peak_memory(accelerator.device)
            finish(plan, facts, seconds, num_sampled=len(missing))
    accelerator.wait_for_everyone()  # no process goes on to the next phase before the manifest is written
    accelerator.end_training()


def restore_record(plan: Plan) -> None:
    """Write config.json again if it was lost after the stage had been sampled."""
    # The rank is torchrun's: a finished phase starts no accelerator to ask.
    if int(os.environ.get("RANK", 0)) == 0 and not (plan.stage.root / "config.json").is_file():
        record_experiment(identified(plan).record, plan.stage.manifest("sample")["num_threads"])


def load_sampled_policy(plan: Plan, accelerator: Accelerator) -> tuple[Model, Transitions]:
    """Load the policy that the stage samples with, and make the table of its transitions."""
    model = load_policy(
        plan.settings.model,
        accelerator,
        plan.resume_from,
        seed=plan.settings.schedule.seed,
        compile=plan.settings.compute.compile,
    )
    # evaluation_mode: nothing is wrapped around the network to average gradients, because there are none.
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    sampler = make_sampler(model, plan.settings.sampling, plan.window)
    require_noise(sampler, plan)
    # Not needed here. But a deployed sampler that cannot be made is refused now, rather than at the first evaluation.
    deployed = deployed_sampler(plan.settings)
    model.scheduler(deployed.scheduler, deployed.num_steps)
    return model, sampler


def require_noise(sampler: Transitions, plan: Plan) -> None:
    """Raise a ValueError if a trained step has no noise and needs it, or if none has any and branches would be alike."""
    window, sampling = plan.window, plan.settings.sampling
    if not plan.settings.training.objective.on_noised_images:
        require_stochastic(sampler, window)
    trained = sampler.rows(window.start, window.stop)
    if sampling.shared_prefix and sampling.num_branches > 1 and not trained.sigma.any():
        raise ValueError(
            f"no step of the trained window draws noise (t = {trained.timesteps.tolist()}), so the branches of a prefix "
            "would be all alike. Take a window with more steps (split_step_left), or sampling=independent."
        )


def make_sampler(model: Model, sampling: Sampling, window: Window) -> Transitions:
    """The table of a stage's transitions. Outside the window they may have an eta of their own, and the tail fewer steps."""
    num_steps, outside = sampling.num_steps, sampling.outside
    make = partial(model.sampler, sde=sampling.sde)
    trained = make(num_steps, sampling.eta)
    prefix_eta, suffix_eta = (sampling.eta if eta < 0 else eta for eta in (outside.prefix_eta, outside.suffix_eta))
    tail = make(num_steps, suffix_eta, window.tail(num_steps, outside.num_suffix_steps))
    return put_together(make(num_steps, prefix_eta), trained, tail, window)


def begin_stage(plan: Plan, model: Model, accelerator: Accelerator) -> None:
    """Delete the half-written files of an interrupted run. In a new experiment, name prompts too long for the model."""
    if accelerator.is_main_process:
        plan.stage.remove_temporaries()
    accelerator.wait_for_everyone()  # before another process writes a temporary file, which would be deleted, too
    if accelerator.is_main_process and not (plan.stage.root / "config.json").is_file():
        warn_of_cut_prompts(model, named_prompts(plan.settings.prompts, "train"))


def images_per_batch(plan: Plan) -> int:
    return plan.settings.sampling.num_groups * plan.settings.sampling.num_branches


def ids_of(plan: Plan, batch: int) -> range:
    """The ids of a batch's images."""
    return range(batch * images_per_batch(plan), (batch + 1) * images_per_batch(plan))


def scoring_beside(plan: Plan, missing: Sequence[int], accelerator: Accelerator) -> Beside:
    """What scores the stage's images as they are written. Those that are on disk are this process's by turns."""
    sampling = plan.settings.sampling
    batches = range(sampling.num_batches) if missing else ()  # nothing is sampled, beside which to score
    prompts = [one for batch in batches for one in stage_prompts(plan, batch) for _ in range(sampling.num_branches)]
    beside = Beside(plan.settings.rewards, plan.stage, prompts)
    there = [batch for batch in batches if batch not in missing]
    for batch in there[accelerator.process_index :: accelerator.num_processes]:
        beside.written(ids_of(plan, batch))
    return beside


def stage_prompts(plan: Plan, batch: int) -> list[str]:
    """The prompts of a batch of the stage, one for each group."""
    settings, index = plan.settings, plan.stage.index
    rng = generator(settings.schedule.seed, index, "prompts", batch) if settings.prompts.at_random else None
    # Without `rng` prompts are taken in turn. Batches are counted over stages, so that each stage continues the list.
    global_batch = index * settings.sampling.num_batches + batch
    return batch_prompts(list(plan.prompts), settings.sampling.num_groups, global_batch, rng)


def batch_sizes(plan: Plan, accelerator: Accelerator) -> BatchSizes:
    """How many images the network and the decoder take at once: as configured, or what has been found to fit."""
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
    """If the network is to be compiled, compile it before the first batch, for each number of rows it will see.

    torch.compile makes a program for each. Prefixes have G rows and branches G*K, or fewer before a tree's last parting, all
    cut into micro-batches.
    """
    sampling = plan.settings.sampling
    with compiling(plan.settings.compute.compile, f"stage{plan.stage.index} sample") as wanted:
        if wanted:
            embeds = model.unconditional()
            predict = predictor(model, sampler.timesteps, embeds, embeds, guidance_scale=sampling.guidance_scale)

            def warm(x_t: Tensor, size: int) -> None:
                for part in {min(size, len(x_t)), len(x_t) % size} - {0}:  # a whole micro-batch, and the last one
                    predict(x_t[:part], 0).cpu()  # to the CPU, to wait until the network has really run

            edges = [sampling.tree.num_edges(depth) for depth in range(sampling.tree.num_depths)]
            for rows in (sampling.num_groups * number for number in (1, *edges)):
                x_t = torch.zeros(rows, *model.latent_shape, device=sampler.sigma.device)
                sizes.fit("sample.micro_batch_size", lambda size, x_t=x_t: warm(x_t, size))


@dataclass
class BatchSampler:
    """Samples the batches of one stage, one after the other; its fields are what they share."""

    plan: Plan
    model: Model
    sampler: Transitions
    sizes: BatchSizes
    policy: dict[str, Any]  # what identifies the policy, for the metadata of every batch's file
    writer: Behind  # writes a batch's files while the next batch is sampled
    beside: Beside  # scores images that are on disk
    bar: Progress  # counts images; each network evaluation adds a fraction of one
    seconds: dict[str, float]  # adds up: decode; write, the time spent waiting for the writer

    @cached_property
    def unconditional(self) -> Conditions:
        return self.model.unconditional()

    def sample(self, batch: int, *, record: bool) -> None:
        """Sample one batch, with noise that depends on (seed, stage, batch) alone, and give its files to the writer.

        The batch's own file is written after its images, so where it exists they do. With `record` the experiment's
        config.json is written first.
        """
        prompts, sampling = stage_prompts(self.plan, batch), self.plan.settings.sampling
        # Groups may share a prompt: each distinct one is encoded, and stored, once.
        distinct = list(dict.fromkeys(prompts))
        conditions = self.model.encode(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        group_conditions = {name: value[rows] for name, value in conditions.items()}
        latents, log_probs, finished, prefix = self.sizes.fit(
            "sample.micro_batch_size", lambda size: self.trajectories(batch, group_conditions, size)
        )
        states, stored_tree = latents, sampling.tree
        if self.plan.settings.training.objective.on_noised_images:  # the images alone are stored
            latents, log_probs, stored_tree = finished.unsqueeze(2), log_probs[:, :, :0], Tree((finished.shape[1],))
        # Before decoding, which would refuse the same latents with less to say about where they went wrong.
        require_finite(latents, log_probs, prompts, self.plan.stage, batch)
        self.bar.set_postfix_str("decoding")
        with timed(self.seconds, "decode"):
            images = self.decode_batch(batch, finished.flatten(0, 1))
            # The report shows a stage's first group as a tree of branches.
            draws_tree = batch == 0 and sampling.shared_prefix
            path = prefix, states[0], finished[0], sampling.num_steps, sampling.tree
            tree = decode_tree(prompts[0], *path, self.decode) if draws_tree else None
        self.bar.set_postfix_str("")
        if record:
            record_experiment(self.plan.record, torch.get_num_threads())
        stage, window = self.plan.stage, self.plan.window
        timesteps = self.sampler.timesteps[window.start : window.start + log_probs.shape[2]]

        def write() -> None:
            written = [stage.image(n) for n in ids_of(self.plan, batch)]
            for path, image in zip(written, images, strict=True):
                files.write_image(path, image)
            written += save_tree(stage, tree) if tree else []
            trajectories = latents, log_probs, timesteps
            of_batch = prompts, conditions, self.unconditional, self.policy, written
            save_batch(stage.batch(batch), *trajectories, *of_batch, tree=stored_tree)
            self.beside.written(ids_of(self.plan, batch))

        # Waits until the batch before is written, so that at most two batches are in memory.
        with timed(self.seconds, "write"):
            self.writer.do(write)

    def trajectories(
        self, batch: int, conditions: Conditions, micro_batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Sample a batch: states of the trained window [G,K,S+1,C,h,w], log_probs [G,K,S], finished latents [G,K,C,h,w], and
        the first group's prefix.

        The prefix is a list of states [1,C,h,w], one before each of its steps, for the picture of the branches.
        """
        sampling, window = self.plan.settings.sampling, self.plan.window
        # Made here and not once a stage: a batch that is repeated in smaller micro-batches starts from the same noise.
        rng = generator(self.plan.settings.schedule.seed, self.plan.stage.index, "sample", batch)
        noise = noise_source(rng, self.sampler.sigma.device)
        grouped = (sampling.num_groups, sampling.num_branches)
        if sampling.sampler.scheduler:
            settings = training_sampler(self.plan.settings)
            scheduler = self.model.scheduler(settings.scheduler, settings.num_steps)
            predict = self.predictor(scheduler.timesteps, conditions, micro_batch_size)
            x_T = noise((math.prod(grouped), *self.model.latent_shape))
            finished = denoise_by(scheduler, predict, x_T, rng, settings.eta).unflatten(0, grouped)
            return finished.unsqueeze(2), finished.new_empty(*grouped, 0), finished, []
        predict = self.predictor(self.sampler.timesteps, conditions, micro_batch_size)
        # Siblings that share no prefix are sampled as G*K groups of one branch, and put into G groups below.
        tree = sampling.tree if sampling.shared_prefix else Tree((1,))
        prefix: list[Tensor] = []
        sampled = branch_sample(
            recording_prefix(predict, window.start, prefix),
            self.sampler,
            noise((math.prod(grouped) // tree.num_leaves, *self.model.latent_shape)),
            noise,
            tree=tree,
            window=window,
        )
        return *(states.flatten(0, 1).unflatten(0, grouped) for states in sampled), prefix

    def predictor(self, timesteps: Tensor, conditions: Conditions, micro_batch_size: int) -> Predict:
        """The policy's output at these timesteps. Each call moves the bar on."""
        predict = predictor(
            self.model,
            timesteps,
            conditions,
            self.unconditional,
            guidance_scale=self.plan.settings.sampling.guidance_scale,
            micro_batch_size=micro_batch_size,
        )
        budget = Budget.of(self.plan.settings)
        images_per_evaluation = budget.num_images / budget.num_evaluations(self.plan.window)

        def predict_with_bar(x_t: Tensor, i: int) -> Tensor:
            output = predict(x_t, i)
            self.bar.update(len(x_t) * images_per_evaluation)
            return output

        return predict_with_bar

    def decode_batch(self, batch: int, latents: Tensor) -> Tensor:
        """Images uint8 [N,H,W,3] of latents [N,C,h,w].

        If the decoder overflows, the latents are written to the stage's debug/ and a FloatingPointError names the images.
        """
        try:
            return self.decode(latents)
        except FloatingPointError as error:
            path, ids = self.plan.stage.batch(batch), range(batch * len(latents), (batch + 1) * len(latents))
            message = f"{path}: among images {listed(ids)} {error}"
            raise not_finite(self.plan.stage, path.stem, message, {"latents": latents}, {"images": list(ids)}) from None

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [N,H,W,3], decoded in pieces that fit into memory."""
        return self.sizes.fit("sample.decode_batch_size", lambda size: decode(self.model, latents, size))


def sample_batches(batch_sampler: BatchSampler, batches: Sequence[int], accelerator: Accelerator) -> None:
    """Sample these batches and wait until they are written. After the first one, log a forecast of the whole run.

    The forecast is left out where a stage has been trained before: it has logged a better one.
    """
    batch_sampler.model.prepare({prompt for batch in batches for prompt in stage_prompts(batch_sampler.plan, batch)})
    plan, started = batch_sampler.plan, working_sec()  # after encoding, which is done once
    for batch in batches:
        batch_sampler.sample(batch, record=accelerator.is_main_process)
        if batch == batches[0] and not finished_stages(plan.stage.root, "train"):
            # Each process samples a batch in that time.
            batch_sec = (working_sec() - started) / accelerator.num_processes
            decode_sec, load_sec = batch_sampler.seconds["decode"] / accelerator.num_processes, batch_sampler.seconds["load"]
            forecast = first_batch_text(plan.settings, plan.window, batch_sec, decode_sec, load_sec)
            logger.info("stage%d sample: %s", plan.stage.index, forecast)
    with timed(batch_sampler.seconds, "write"):
        batch_sampler.writer.wait()


def require_finite(latents: Tensor, log_probs: Tensor, prompts: list[str], stage: Stage, batch: int) -> None:
    """Stop if a log-probability or an image is not finite: write the states of its group to debug/, raise a
    FloatingPointError."""
    bad = ~(log_probs.isfinite().all(2) & latents[:, :, -1].flatten(2).isfinite().all(2))  # [G,K]
    if bad.any():
        groups = bad.any(1).nonzero().flatten().tolist()
        ids = (batch * bad.numel() + bad.flatten().nonzero().flatten()).tolist()
        tensors = {"latents": latents[groups], "log_probs": log_probs[groups]}
        facts = {"images": ids, "groups": groups, "prompts": [prompts[g] for g in groups]}
        whose = f"of images {listed(ids)}, groups {listed(groups)}"
        message = f"{stage.batch(batch)}: log-probabilities or latents {whose}, are not finite"
        raise not_finite(stage, stage.batch(batch).stem, message, tensors, facts)


def stage_facts(plan: Plan, model: Model, sampler: Transitions, accelerator: Accelerator) -> dict[str, Any]:
    """The facts for the phase's manifest. `policy` is the part on which all batches on disk must agree."""
    settings, budget = plan.settings, Budget.of(plan.settings)
    policy = {
        "num_trained_steps": plan.window.num_steps,
        "window": plan.window.ends,
        "num_branches": settings.sampling.num_branches,
        "mixed_precision": accelerator.mixed_precision,
        "base_model_sha256": model.fingerprint,
        "lora_sha256": files.sha256(plan.resume_from) if plan.resume_from else "",
    }
    return {
        "seed": settings.schedule.seed,
        "num_trained_steps": plan.window.num_steps,
        "window": plan.window.ends,
        "num_images": budget.num_images,
        "num_evaluations": budget.num_evaluations(plan.window),
        "policy": policy,
        "settings": lasting_settings(plan.record.content["config"]),
        "batch_shape": [settings.sampling.num_groups, settings.sampling.num_branches, *model.latent_shape],
        # Through JSON and back: a scheduler's configuration may hold what JSON cannot, which becomes text.
        "scheduler": json.loads(json.dumps(model.scheduler_config, default=str)),
        "timesteps": sampler.timesteps.tolist(),  # a flow-matching model's sigmas are a thousandth of them
        "mixed_precision": accelerator.mixed_precision,
        "device": str(accelerator.device),
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
    }


def is_sampled(stage: Stage, batch: int, policy: dict[str, Any]) -> bool:
    """Whether a batch is on disk, undamaged and sampled with `policy`.

    False with a warning for a damaged one: it is sampled again. A ValueError if another policy or window sampled it.
    """
    path = stage.batch(batch)
    if not path.is_file():
        return False
    if damage := batch_damage(path):
        logger.warning("stage%d sample: batch %d is sampled again: %s", stage.index, batch, damage)
        return False
    recorded = files.read_metadata(path)
    for key in ("mixed_precision", "window"):  # which earlier versions did not record
        recorded.setdefault(key, policy[key])
    different = [f"{key} ({recorded.get(key)}, now {value})" for key, value in policy.items() if recorded.get(key) != value]
    if different:
        # The trained steps may have changed though the user never named them.
        steps = different[0].startswith(("num_trained_steps", "window"))
        why = "; stage_cnt, curriculum and the split_ keys decide it" if steps else ""
        raise ValueError(
            f"{path} was sampled with another {', '.join(different)}{why}. Give what it was sampled with, delete "
            f"{stage.folder} to sample it anew, or use another exp_name."
        )
    return True


def finish(plan: Plan, facts: dict[str, Any], seconds: dict[str, float], *, num_sampled: int) -> None:
    """Write prompts.json, the metrics and, last, the manifest, with which the phase counts as finished."""
    stage, sampling = plan.stage, plan.settings.sampling
    # From the batches on disk, not from memory: an earlier run, or another process, may have sampled them.
    batches = [stage.batch(batch) for batch in range(sampling.num_batches)]
    prompts = [prompt for path in batches for prompt in batch_image_prompts(path, sampling.num_branches)]
    files.write_json(stage.prompts, prompts)
    images = [stage.image(n) for n in range(len(prompts))]
    written = [*batches, stage.prompts, *images, *stage.folder.glob("tree.*")]
    counts = {key: facts[key] for key in ("num_trained_steps", "num_images", "num_evaluations")}
    spent = {key: seconds[key] for key in ("load", "sample", "decode", "write")}
    Metrics(stage.metrics("sample")).log("sample", stage=stage.index, **counts, **spent)
    stage.write_manifest("sample", facts | {"seconds": seconds}, [*written, stage.metrics("sample")])
    rate = num_sampled * images_per_batch(plan) / seconds["sample"]  # of the images that this run has sampled
    done = "stage%d sample: done in %.1f s, %d images, %.1f images/s"
    logger.info(done, stage.index, seconds["sample"], len(prompts), rate)


def batch_image_prompts(path: Path, num_branches: int) -> Iterator[str]:
    """The prompt of each image of a batch on disk, in order."""
    prompt_ids, distinct = read_batch_prompts(path)  # of each group
    for n in prompt_ids:
        yield from [distinct[n]] * num_branches
