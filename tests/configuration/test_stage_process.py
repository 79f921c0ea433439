"""The presets of config/stage_process.py: they load, keep the reference's values, and an arm is what its name says."""

from math import prod

import pytest
from conftest import PRESETS, get_config

from b2diffurl.configuration.keys import KEYS, flatten
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import read_settings
from b2diffurl.objectives import OBJECTIVES

LATENTS = {"sdxl": (4, 128, 128), "sd35": (16, 64, 64), "flux": (16, 64, 64)}  # of an image: channels, height, width
ARMS = {  # of the study: what each changes of b2, beside its name
    "b2": {},
    "bs": {"curriculum": "fixed"},
    "bpt": {"sampling": "independent"},
    "ddpo": {"sampling": "independent", "curriculum": "fixed", "split_step_left": "T", "selection.images": "all"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_are_locked(preset):
    """Every preset passes the checks, and takes neither a key it lacks nor a value of another type."""
    config = get_config(preset)
    check(config)
    for key, section in [("no_such_key", config), ("no_such_key", config.train)]:
        with pytest.raises((AttributeError, KeyError)):
            section[key] = 1
    with pytest.raises(TypeError):
        config.split_time = "five"
    assert not [key for key, value in flatten(config.to_dict()).items() if isinstance(value, list)]


def test_the_presets_named_here_are_all():
    """PRESETS of the file, and an unknown name lists them."""
    with pytest.raises(ValueError) as error:
        get_config("sd15")
    assert str(error.value) == "unknown preset 'sd15'; known: " + ", ".join(PRESETS) + "; did you mean sd35?"


def test_sd14_keeps_the_reference_values():
    """The numbers of the paper's setting, one by one."""
    reference = {
        "pretrained.model": "CompVis/stable-diffusion-v1-4",
        "reward.name": "clip",
        "reward.clip.model": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "stage_cnt": 100,
        "split_step_left": 14,
        "split_step_right": 20,
        "split_time": 5,
        "sample.num_steps": 20,
        "sample.eta": 1.0,
        "sample.guidance_scale": 5.0,
        "sample.batch_size": 8,
        "sample.num_batches_per_epoch": 32,
        "selection.history_cnt": 8,
        "selection.pos_threshold": 0.5,
        "selection.neg_threshold": -0.5,
        "train.num_epochs": 2,
        "train.batch_size": 2,
        "train.gradient_accumulation_steps": 64,
        "train.learning_rate": 1e-4,
        "train.adam_beta1": 0.9,
        "train.adam_beta2": 0.999,
        "train.adam_weight_decay": 1e-4,
        "train.adam_epsilon": 1e-8,
        "train.max_grad_norm": 1.0,
        "train.eps": 0.1,
        "train.adv_clip_max": 5.0,
        "train.lora_rank": 4,
        "train.step_weight": "none",
        "train.objective": "ddpo",
        "curriculum": "progressive",
        "sampling": "branch",
        "selection.images": "pairs",
        "selection.advantage": "prompt",
    }
    found = flatten(get_config("sd14").to_dict())
    assert {key: found[key] for key in reference} == reference


@pytest.mark.parametrize("preset", LATENTS)
def test_ranges_of_ratios_fit_the_latents(preset):
    """By D * c: as wide as DDPO's 1e-4 at the 16,384 latent dimensions of v1.4, and a joint beta of 1."""
    config, num_dimensions = get_config(preset), prod(LATENTS[preset])
    assert config.train.eps * num_dimensions == pytest.approx(1e-4 * 16_384)
    assert config.train.dpo_beta == num_dimensions


@pytest.mark.parametrize("preset", LATENTS)
def test_windows_end_before_the_last_step(preset):
    """It adds no noise in these models, so that ddpo and its kin can take its place."""
    schedule = read_settings(get_config(preset)).schedule
    windows = {schedule.window(stage) for stage in range(schedule.num_stages)}
    assert len(windows) > 1
    assert max(window.stop for window in windows) < schedule.num_steps


@pytest.mark.parametrize(("preset", "other"), [("sdxl_24gb", "sdxl"), ("sd35_24gb", "sd35"), ("sd14_10gb", "sd14")])
def test_a_preset_of_a_small_card_makes_the_same_updates(preset, other):
    """It differs from the other in what only memory and speed depend on."""
    small, large = (flatten(get_config(name).to_dict()) for name in (preset, other))
    differ = {key for key in small if small[key] != large[key]} - {"preset"}
    assert differ
    assert all(KEYS[key].may_change for key in differ)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_of_the_study_is_what_its_name_says_and_nothing_else(arm):
    """It differs from b2 in nothing but its name and the keys that define it; its stages train L growing to R, L, or all T
    steps."""
    b2, config = get_config("b2"), get_config(arm)
    expected = flatten(b2.to_dict()) | {"exp_name": arm, "preset": arm} | ARMS[arm]
    num_steps = b2.sample.num_steps
    assert flatten(config.to_dict()) == {key: num_steps if value == "T" else value for key, value in expected.items()}
    schedule = read_settings(config).schedule
    steps = {schedule.window(stage).num_steps for stage in range(config.stage_cnt)}
    growing = {*range(b2.split_step_left, num_steps + 1)}
    assert steps == {"b2": growing, "bpt": growing, "bs": {b2.split_step_left}, "ddpo": {num_steps}}[arm]
    assert len(growing) > 1


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_arm_runs_with_any_objective_that_its_selection_allows(arm, objective):
    """Only d3po, which wants pairs of branches, is not for independent images."""
    config = get_config(arm)
    config.train.objective = objective
    config.train.num_epochs = 1
    if objective == "d3po" and config.sampling == "independent":
        with pytest.raises(ValueError, match="d3po"):
            check(config)
    else:
        check(config)
