"""From configuration to plan: schedule, resume rules, identity, seeds, prompts, and values that cannot work."""

import contextlib
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, experiment, get_config, make_config, snapshot

from b2diffurl.algorithm.seeding import generator, stable_seed
from b2diffurl.configuration.command_line import named_preset
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.prompts import batch_prompts
from b2diffurl.configuration.settings import Schedule
from b2diffurl.experiment.folder import find_lora
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.runtime import files


def plan(folder: Path, overrides: dict, **more):
    with contextlib.chdir(folder):
        return make_plan(make_config(overrides, **more))


# ---- schedule ----


def steps_of(curriculum: str, left: int, right: int, num_stages: int, seed: int = 0) -> list[int]:
    """S of every stage."""
    schedule = Schedule(num_stages, curriculum, left, right, given=0, seed=seed)
    return [schedule.num_trained_steps(stage) for stage in range(num_stages)]


def test_reference_schedule():
    """L = 14, R = 20, M = 100: the table of the method, stage by stage; reversed, its mirror image."""
    table = {14: range(0, 15), 15: range(15, 29), 16: range(29, 43), 17: range(43, 58), 18: range(58, 72)}
    table |= {19: range(72, 86), 20: range(86, 100)}
    expected = [steps for steps, stages in table.items() for _ in stages]
    assert steps_of("progressive", 14, 20, 100) == expected
    mirror = {14: 20, 15: 19, 16: 18, 17: 17, 18: 16, 19: 15, 20: 14}
    assert steps_of("reversed", 14, 20, 100) == [mirror[steps] for steps in expected]


@pytest.mark.parametrize(("left", "right", "num_stages"), [(1, 1, 1), (6, 10, 8), (1, 20, 7), (14, 20, 100), (3, 9, 70)])
def test_schedule_grows_evenly_from_left_to_right(left, right, num_stages):
    """S starts at L, never falls, ends at R if there are stages enough, and each value holds for as many stages, one
    more or less. Fixed, it stays at L."""
    assert steps_of("fixed", left, right, num_stages) == [left] * num_stages
    steps = steps_of("progressive", left, right, num_stages)
    assert steps[0] == left
    assert steps == sorted(steps)
    assert max(steps) <= right
    if num_stages > right - left:
        assert set(steps) == set(range(left, right + 1))
        assert max(Counter(steps).values()) - min(Counter(steps).values()) <= 1


def test_random_steps_are_uniform_and_follow_from_the_seed():
    """Every S of L..R comes as often as chance has it (within 5 standard errors) and no other; the seed and the stage decide
    it, however many stages there are."""
    steps = steps_of("random", 14, 20, 7000)
    assert set(steps) == set(range(14, 21))
    assert all(abs(count - 1000) < 5 * (7000 * 1 / 7 * 6 / 7) ** 0.5 for count in Counter(steps).values())
    assert steps_of("random", 14, 20, 100) == steps[:100]
    assert steps_of("random", 14, 20, 100, seed=1) != steps[:100]
    assert steps_of("random", 5, 5, 3) == [5, 5, 5]


@pytest.mark.parametrize(("curriculum", "last"), [("progressive", 9), ("reversed", 4), ("fixed", 4)])
def test_stages_beyond_the_last_stay_within_the_bounds(curriculum, last):
    """Stage 6 of 6 and stage 1,000 train as many steps as stage 5, R or L; at random any in L..R."""
    schedule = Schedule(6, curriculum, 4, 9, given=0, seed=0)
    assert [schedule.num_trained_steps(stage) for stage in (5, 6, 1000)] == [last] * 3
    schedule = Schedule(6, "random", 4, 9, given=0, seed=0)
    assert {schedule.num_trained_steps(stage) for stage in range(6, 100)} == set(range(4, 10))


def test_unknown_curriculum_lists_the_choices():
    """A ValueError names all four."""
    with pytest.raises(ValueError, match=r"'forward'.*progressive, fixed, reversed, random"):
        Schedule(3, "forward", 1, 2, given=0, seed=0).num_trained_steps(0)


@pytest.mark.parametrize(("curriculum", "steps"), [("progressive", [2, 3]), ("fixed", [2, 2]), ("reversed", [3, 2])])
def test_stage_takes_its_steps_from_schedule_or_flag(tmp_path, overrides, curriculum, steps):
    """split_step 0 follows the curriculum's schedule of the named stage; any other value is taken as it is."""
    lora = tmp_path / "any.safetensors"
    lora.touch()
    overrides = overrides | {"curriculum": curriculum}
    for stage, wanted in enumerate(steps):
        assert plan(tmp_path, overrides, run_name=f"stage{stage}", resume_from=str(lora)).num_trained_steps == wanted
    assert plan(tmp_path, overrides, split_step=4).num_trained_steps == 4


def test_random_steps_follow_from_the_experiment_s_seed(tmp_path, overrides):
    """The plan of stage 0 takes what the schedule has for its seed; some seeds have L, others R."""
    overrides = overrides | {"curriculum": "random"}
    planned = [plan(tmp_path, overrides, seed=seed).num_trained_steps for seed in range(12)]
    assert planned == [Schedule(2, "random", 2, 3, given=0, seed=seed).num_trained_steps(0) for seed in range(12)]
    assert set(planned) == {2, 3}


def test_a_sampled_stage_keeps_its_steps(finished, overrides):
    """More stages stretch the schedule, but a stage already sampled is trained on the steps it was sampled with; asking
    for others is an error."""
    assert Schedule(20, "progressive", 2, 3, given=0, seed=300).num_trained_steps(1) == 2
    assert plan(finished, overrides, run_name="stage1", stage_cnt=20).num_trained_steps == 3
    with pytest.raises(ValueError, match="split_step 3, not 2"):
        plan(finished, overrides, run_name="stage1", split_step=2)


# ---- where a stage starts ----


def test_a_stage_goes_on_from_the_last_checkpoint_before_it(finished, overrides):
    """Stage 0 starts fresh, stage 1 from stage 0's newest checkpoint, stage 2 from stage 1's."""
    assert plan(finished, overrides, run_name="stage0").resume_from is None
    for stage in (1, 2):
        source = plan(finished, overrides, run_name=f"stage{stage}", stage_cnt=3).resume_from
        assert finished / source == experiment(finished) / f"stage{stage - 1}" / "checkpoints" / "checkpoint_2" / LORA_FILE


def test_checkpoints_are_ordered_by_number(tmp_path):
    """checkpoint_10 comes after checkpoint_9; unfinished folders and other names are no checkpoints."""
    for name in ("checkpoint_9", "checkpoint_10", "checkpoint_11.tmp", "checkpoint_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / LORA_FILE).touch()
    (tmp_path / "checkpoints" / "checkpoint_12").mkdir()
    expected = tmp_path / "checkpoints" / "checkpoint_10" / LORA_FILE
    for given in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "checkpoint_10", expected):
        assert find_lora(given) == expected


def test_resume_from_is_where_a_run_starts(finished, overrides, tmp_path):
    """An outside LoRA starts stage 0, and a lone later stage; it does not displace a predecessor that is there. A
    checkpoint of the experiment itself is taken wherever it is named."""
    outside = tmp_path / "outside.safetensors"
    outside.touch()
    assert plan(tmp_path, overrides, resume_from=str(outside)).resume_from == outside
    assert plan(tmp_path, overrides, run_name="stage7", stage_cnt=9, resume_from=str(outside)).resume_from == outside
    kept = plan(finished, overrides, run_name="stage1", resume_from=str(outside)).resume_from
    assert kept.parts[-3:] == ("checkpoints", "checkpoint_2", LORA_FILE)
    inside = experiment(finished) / "stage0" / "checkpoints" / "checkpoint_1"
    assert plan(finished, overrides, run_name="stage1", resume_from=str(inside)).resume_from == inside / LORA_FILE


def test_a_stage_without_its_predecessor_is_refused(workplace, overrides, tmp_path):
    """No stage before it, or one that is not trained to its end: the error names the stage that is missing."""
    with pytest.raises(ValueError, match=r"stage4.*not trained yet"):
        plan(workplace, overrides, run_name="stage5", stage_cnt=9)
    (experiment(workplace) / "stage1" / "train.json").unlink()
    (tmp_path / "outside.safetensors").touch()
    for more in ({}, {"resume_from": str(tmp_path / "outside.safetensors")}):
        with pytest.raises(ValueError, match=r"stage1, which is not trained"):
            plan(workplace, overrides, run_name="stage2", stage_cnt=9, **more)


def test_pickled_or_missing_weights_are_no_lora(tmp_path):
    """A .pt file is refused by name, a folder without a LoRA is said to have none."""
    (tmp_path / "lora.pt").touch()
    with pytest.raises(ValueError, match="never loaded"):
        find_lora(tmp_path / "lora.pt")
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        find_lora(tmp_path)


# ---- identity ----

FREE = {  # key: a value other than the tiny experiment's, which another call may well have
    "split_step": 2,
    "stage_cnt": 50,
    "dev_id": 1,
    "num_threads": 2,
    "log_path": "elsewhere",
    "track_with": ("wandb", "tensorboard"),
    "wandb_mode": "online",
    "keep.samples": False,
    "keep.images": 1,
    "sample.micro_batch_size": 1,
    "sample.decode_batch_size": 1,
    "train.micro_batch_size": 1,
    "reward.batch_size": 5,
    "eval.num_images": 5,
    "eval.batch_size": 5,
    "eval.seed": 1,
    "eval.judge": "shapes",
    "eval.diversity": (),
}


def test_identity_leaves_room_for_what_changes_from_call_to_call(finished, overrides):
    """The step, the number of stages, device, logging, retention, judging and what only memory limits may differ from the
    recorded configuration."""
    for key, value in FREE.items():
        plan(finished, overrides | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 301),
        ("curriculum", "fixed"),
        ("sampling", "independent"),
        ("split_step_left", 1),
        ("split_step_right", 4),
        ("split_time", 4),
        ("prompt", "another prompt"),
        ("prompt_random_choose", 0),
        ("mixed_precision", "no"),
        ("pretrained.resolution", 128),
        ("sample.num_steps", 5),
        ("sample.eta", 0.5),
        ("sample.guidance_scale", 3.0),
        ("sample.batch_size", 3),
        ("sample.num_batches_per_epoch", 4),
        ("reward.name", "shapes"),
        ("eval.history_cnt", 2),
        ("eval.advantage", "group"),
        ("eval.selection", "all"),
        ("eval.pos_threshold", 0.6),
        ("eval.neg_threshold", -0.6),
        ("train.num_epochs", 3),
        ("train.batch_size", 3),
        ("train.gradient_accumulation_steps", 3),
        ("train.learning_rate", 2e-2),
        ("train.objective", "dpok"),
        ("train.eps", 0.2),
        ("train.kl_weight", 1.0),
        ("train.dpo_beta", 1.0),
        ("train.beta1", 2.0),
        ("train.step_weight", "leverage"),
        ("train.lora_rank", 8),
        ("train.save_interval", 2),
    ],
)
def test_identity_refuses_every_other_key(finished, overrides, key, value):
    """A call with another value of any key that makes the experiment is refused; the error names key and both values."""
    assert key not in FREE
    was = flatten(make_config(overrides).to_dict())[key]
    assert value != was
    with pytest.raises(ValueError) as error:
        plan(finished, overrides | {key: value})
    assert f"{key} is {value!r}, was {was!r}" in str(error.value) or key == "prompt"
    assert "another configuration" in str(error.value)


def test_an_experiment_begun_before_a_key_was_there_goes_on_as_it_was(workplace, overrides):
    """Without the switches in its config.json a run is what was done before there were any: branches, pairs, progressive,
    and no other; options of objectives that there were not may have any value."""
    path = experiment(workplace) / "config.json"
    recorded = files.read_json(path)
    for section, key in (("", "curriculum"), ("", "sampling"), ("eval", "selection"), ("train", "kl_weight")):
        del (recorded["config"][section] if section else recorded["config"])[key]
    files.write_record(path, recorded)
    assert plan(workplace, overrides, **{"train.kl_weight": 0.7}).num_trained_steps == 2
    for key, value in (("curriculum", "fixed"), ("sampling", "independent"), ("eval.selection", "all")):
        with pytest.raises(ValueError, match=f"{key} is '{value}', was"):
            plan(workplace, overrides, **{key: value})


def test_a_preset_may_change_under_an_experiment(finished, overrides):
    """What is recorded of it is for people, and makes no other experiment."""
    with named_preset(get_config("b2").to_dict()):
        assert plan(finished, overrides).record.changes == ()


def test_a_fixed_curriculum_needs_no_upper_end(tmp_path, overrides):
    """S may be anything in 1..T, whatever split_step_right is."""
    for steps in (1, 4):
        settings = {"curriculum": "fixed", "split_step_left": steps, "split_step_right": 3, "exp_name": f"fixed{steps}"}
        assert plan(tmp_path, overrides, **settings).num_trained_steps == steps
    with pytest.raises(ValueError, match=r"1\.\.4"):
        plan(tmp_path, overrides, curriculum="fixed", split_step_left=5, exp_name="fixed5")


def test_other_prompts_under_the_same_name_are_another_experiment(finished, overrides, tmp_path):
    """The prompts count, not the file: a copy of it will do, another list is refused."""
    (tmp_path / "copy.json").write_text(json.dumps(PROMPTS, indent=4))
    plan(finished, overrides, prompt_file=str(tmp_path / "copy.json"))
    (tmp_path / "copy.json").write_text(json.dumps(PROMPTS[::-1]))
    with pytest.raises(ValueError, match="prompts"):
        plan(finished, overrides, prompt_file=str(tmp_path / "copy.json"))


def test_threads_are_reused_as_recorded(finished, overrides):
    """num_threads 0 takes the number the experiment was begun with; another number, if given, wins."""
    assert plan(finished, overrides, num_threads=0).settings.compute.num_threads == 1
    assert plan(finished, overrides, num_threads=2).settings.compute.num_threads == 2


def test_planning_writes_nothing(finished, overrides, tmp_path):
    """A plan only reads: neither a new experiment's folder nor a finished one changes."""
    before = snapshot(finished)
    plan(finished, overrides, run_name="stage1")
    plan(tmp_path, overrides)
    assert snapshot(finished) == before
    assert list(tmp_path.iterdir()) == []


# ---- values that cannot work ----


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run_name", "latest", "stage0, stage1"),
        ("exp_name", "../elsewhere", "exp_name"),
        ("exp_name", "..", "exp_name"),
        ("split_step", 5, r"1\.\.4"),
        ("split_step", -1, r"1\.\.4"),
        ("split_step_right", 5, r"1\.\.4"),
        ("split_step_left", 0, r"1\.\.4"),
        ("split_step_left", 4, r"4\.\.3"),
        ("split_time", 0, "split_time is 0"),
        ("split_time", 1, "at least 2 siblings"),
        ("curriculum", "forward", "'progressive', 'fixed', 'reversed', 'random'"),
        ("sampling", "prefix", "'branch', 'independent'"),
        ("sample.num_steps", 0, "sample.num_steps is 0"),
        ("sample.batch_size", 0, "sample.batch_size is 0"),
        ("sample.num_batches_per_epoch", -1, "sample.num_batches_per_epoch is -1"),
        ("sample.eta", 0.0, "eta is 0"),
        ("sample.eta", 1.5, "eta is 1.5"),
        ("sample.eta", float("nan"), "eta is nan"),
        ("sample.guidance_scale", 0.5, "guidance_scale is 0.5"),
        ("reward.batch_size", 0, "reward.batch_size is 0"),
        ("eval.pos_threshold", -0.6, "pos_threshold is below"),
        ("eval.history_cnt", -1, "history_cnt is -1"),
        ("train.num_epochs", 0, "train.num_epochs is 0"),
        ("train.batch_size", 0, "train.batch_size is 0"),
        ("train.gradient_accumulation_steps", 0, "train.gradient_accumulation_steps is 0"),
        ("train.micro_batch_size", 0, "train.micro_batch_size is 0"),
        ("train.lora_rank", 0, "train.lora_rank is 0"),
        ("train.save_interval", 0, "train.save_interval is 0"),
        ("train.objective", "ppo2", "'ddpo', 'reinforce', 'dpok', 'd3po'"),
        ("train.objective", "reinforce", "num_epochs is 2; reinforce .* one pass"),
        ("train.kl_weight", -0.1, "kl_weight is -0.1"),
        ("train.kl_weight", float("nan"), "kl_weight is nan"),
        ("train.kl_weight", float("inf"), "kl_weight is inf"),
        ("train.dpo_beta", -1.0, "dpo_beta is -1.0"),
        ("train.eps", -0.1, "eps is -0.1"),
        ("train.step_weight", "both", "'none', 'leverage', 'sigma'"),
        ("eval.advantage", "batch", "'prompt', 'group'"),
        ("eval.selection", "best", "'pairs', 'all'"),
        ("mixed_precision", "fp8", "'bf16'"),
        ("track_with", ("mlflow",), "'wandb', 'tensorboard'"),
        ("wandb_mode", "yes", "'offline', 'online'"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, overrides, key, value, message):
    """The error says what was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, overrides | {key: value})


OBJECTIVE_NEEDS = {
    "ddpo": {},
    "dpok": {},
    "reinforce": {"train.num_epochs": 1},
    "d3po": {"sampling": "branch", "eval.selection": "pairs"},
}


@pytest.mark.parametrize("advantage", ["prompt", "group"])
@pytest.mark.parametrize("selection", ["pairs", "all"])
@pytest.mark.parametrize("sampling", ["branch", "independent"])
@pytest.mark.parametrize("objective", OBJECTIVE_NEEDS)
def test_switches_combine_freely_but_for_what_an_objective_needs(
    tmp_path, overrides, objective, sampling, selection, advantage
):
    """Any objective runs with any sampling, selection and advantage, except for d3po, which compares branches in pairs, and
    reinforce, which makes one pass."""
    settings = {"train.objective": objective, "sampling": sampling, "eval.selection": selection, "eval.advantage": advantage}
    needs = OBJECTIVE_NEEDS[objective]
    if settings | needs == settings:
        plan(tmp_path, overrides | settings)
    else:
        with pytest.raises(ValueError, match=f"{objective}.*(one pass|must be (branch|pairs))"):
            plan(tmp_path, overrides | settings)
    plan(tmp_path, overrides | settings | needs)


@pytest.mark.parametrize("sampling", ["branch", "independent"])
def test_a_single_sibling_has_nothing_to_be_compared_with(tmp_path, overrides, sampling):
    """K = 1 works with selection all and scores relative to the prompt, and with nothing else."""
    single = overrides | {"split_time": 1, "sampling": sampling, "eval.selection": "all"}
    plan(tmp_path, single)
    with pytest.raises(ValueError, match=r"split_time is 1.*eval.advantage=group"):
        plan(tmp_path, single | {"eval.advantage": "group"})
    with pytest.raises(ValueError, match=r"split_time is 1.*eval.selection=all"):
        plan(tmp_path, single | {"eval.selection": "pairs"})


# ---- seeds and prompts ----


def test_seed_is_the_hash_of_its_key():
    """63 bits of the SHA-256 of the key in JSON, the same in every process and version of Python."""
    expected = int.from_bytes(hashlib.sha256(b'[300, 0, "sample", 7]').digest()[:8], "big") >> 1
    assert stable_seed(300, 0, "sample", 7) == expected
    assert generator(300, 0, "sample", 7).initial_seed() == expected


def test_no_two_keys_share_their_noise():
    """Seed, stage, phase and batch each change the seed; (seed 1, stage 0) has nothing of (seed 0, stage 1)."""
    keys = [(s, i, p, b) for s in range(4) for i in range(4) for p in ("prompts", "sample", "train") for b in range(10)]
    assert len({stable_seed(*key) for key in keys}) == len(keys)
    one, other = (torch.randn(8, generator=generator(*key)) for key in [(1, 0, "sample", 0), (0, 1, "sample", 0)])
    assert not torch.equal(one, other)
    assert torch.equal(one, torch.randn(8, generator=generator(1, 0, "sample", 0)))


def test_global_random_state_is_neither_used_nor_changed():
    """Drawing from a key ignores torch's global generator and leaves it alone."""
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), torch.randn(4, generator=generator(0, "a"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torch.randn(4, generator=generator(0, "a")), one)


def test_prompts_in_turn_run_through_the_file():
    """Without a generator global batch b of n takes prompts b*n, b*n + 1, … modulo their number."""
    taken = [prompt for batch in range(3) for prompt in batch_prompts(list("abcd"), 3, batch, None)]
    assert taken == list("abcdabcda")


def test_random_prompts_are_uniform_and_fixed_by_their_generator():
    """Each prompt comes as often as chance has it (within 5 standard errors), and the key decides which."""
    drawn = batch_prompts(list("abcd"), 8000, 0, generator(0, "prompts"))
    assert drawn == batch_prompts(list("abcd"), 8000, 5, generator(0, "prompts"))
    assert all(abs(count - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5 for count in Counter(drawn).values())
