"""Noise schedules: which can be trained, and advice that works for every scheduler that a model may have been saved with."""

import ast
import json
import re
from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
from conftest import ROOT, refuse, run_script, stage_of
from diffusers.schedulers import KarrasDiffusionSchedulers
from schedulers import HUB_CONFIGS

from b2diffurl.algorithm.branching import denoise
from b2diffurl.algorithm.transition import transition
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import read_settings
from b2diffurl.models.noise_schedule import (
    decisive,
    make_ddim,
    make_table,
    read_config,
    require_trainable,
    stock_scheduler,
    why_untrainable,
)
from b2diffurl.models.policy import predictor

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Diffusers' schedulers for Stable Diffusion, but one that is made of sigmas, and one that needs a further package.
UNFIT = {"EDMEulerScheduler", "DPMSolverSDEScheduler"}
CLASSES = sorted({one.name for one in KarrasDiffusionSchedulers} - UNFIT | {"LCMScheduler", "TCDScheduler"})


def saved(name: str) -> dict:
    """What `save_pretrained` writes for a scheduler of that class."""
    return json.loads(getattr(diffusers, name).from_config(SD).to_json_string())


def without_spacing(config: dict) -> dict:
    """As classes save it that have no such entry, and as old versions saved it."""
    return {key: value for key, value in config.items() if key != "timestep_spacing"}


SPACINGS = ("linspace", "leading", "trailing")
CONFIGS = HUB_CONFIGS | {f"{name}, default": without_spacing(saved(name)) for name in CLASSES}
CONFIGS |= {f"{name}, {one}": saved(name) | {"timestep_spacing": one} for name in CLASSES for one in SPACINGS}


@pytest.fixture
def asked(config):
    settings = read_settings(config)
    return settings.model, replace(settings.sampling, sampler=replace(settings.sampling.sampler, num_steps=20))


@pytest.mark.parametrize("config_name", CONFIGS)
def test_the_advice_works_on_the_config_it_is_given_for(config_name, asked):
    """A schedule is trainable as it is, or with the very entries that the refusal names; all S steps, from 1 to T."""
    (model, sampling), schedule = asked, CONFIGS[config_name]
    for window in (Window(19, 20), Window(0, 20)):
        try:
            require_trainable(schedule, model, sampling, window)
        except ValueError as error:
            entries = ast.literal_eval(re.search(r'--config.pretrained.scheduler="(.*)"', str(error))[1])
            require_trainable(schedule | entries, replace(model, scheduler=entries), sampling, window)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"}),
        ({"clip_sample": True}, {"clip_sample": False}),
        (
            {"clip_sample": True, "thresholding": True, "steps_offset": 0},
            {"clip_sample": False, "thresholding": False, "steps_offset": 1},
        ),
        ({"set_alpha_to_one": True}, {"set_alpha_to_one": False}),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}),
    ],
    ids=str,
)
def test_no_more_is_advised_than_is_needed(change, advice, asked):
    model, sampling = asked
    with pytest.raises(ValueError, match=re.escape(f'--config.pretrained.scheduler="{advice}"')):
        require_trainable(tiny.V1_4_SCHEDULER | change, model, sampling, Window(0, 20))


def test_the_advice_keeps_entries_that_were_given(asked):
    """The flag replaces the whole dict, so what is advised holds them."""
    model, sampling = asked
    given = {"beta_end": 0.011}
    whole = given | {"timestep_spacing": "leading"}
    schedule = tiny.V1_4_SCHEDULER | {"timestep_spacing": "linspace"} | given
    with pytest.raises(ValueError, match=re.escape(f'="{whole}"')):
        require_trainable(schedule, replace(model, scheduler=given), sampling, Window(0, 20))


def test_only_the_window_needs_noise(asked):
    """A last step at sigma 0 can follow the window, or the window can hold it and is refused."""
    schedule = tiny.V1_4_SCHEDULER | {"set_alpha_to_one": True}
    assert why_untrainable(schedule, asked[1], Window(0, 19)) == ""
    assert "t = [1] add no noise" in why_untrainable(schedule, asked[1], Window(18, 20))


def test_zero_terminal_snr_needs_another_prediction_than_epsilon(asked):
    """At alpha_bar 0 epsilon gives no image; v does. Before, sampling ended in values that are not finite."""
    schedule = tiny.V1_4_SCHEDULER | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert "no signal" in why_untrainable(schedule, asked[1], Window(0, 20))
    assert why_untrainable(schedule | {"prediction_type": "v_prediction"}, asked[1], Window(0, 20)) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "not made of betas"),
        ({"_class_name": "EDMEulerScheduler"}, "not made of betas"),
        ({"_class_name": "os"}, "not a scheduler of diffusers"),
        ({"_class_name": None}, "not a scheduler of diffusers"),
        ({"beta_schedule": "cubic"}, "cubic"),
        ({"beta_end": "much"}, "cannot be made"),
        ({"prediction_type": "flow_prediction"}, "known: epsilon"),
    ],
    ids=str,
)
def test_what_no_entry_mends_is_refused_before_any_work(empty, overrides, models, tmp_path, change, said):
    base = tiny.copy_with_scheduler(models / "sd", tmp_path / "sd", change)
    refuse(empty, "sample", overrides | {"pretrained.model": str(base)}, said)


def test_unknown_entries_are_named(empty, overrides):
    refuse(
        empty,
        "sample",
        overrides | {"pretrained.scheduler": {"timestep_spacin": "leading"}},
        "timestep_spacin",
        "steps_offset",
    )
    refuse(empty, "sample", overrides | {"pretrained.scheduler": "leading"}, "pretrained.scheduler is 'leading'")
    refuse(empty, "sample", overrides | {"pretrained.scheduler": {"a": [{}]}}, "numbers or texts")


def test_a_run_with_the_advised_entries_samples_and_its_record_holds_them(empty, overrides, models, tmp_path):
    """The model's file stays as it is. The entries count in training, in judging and in what is exported."""
    base = tiny.copy_with_scheduler(models / "sd", tmp_path / "sd", {"timestep_spacing": "linspace"})
    entries = {"timestep_spacing": "leading"}
    settings = overrides | {"pretrained.model": str(base), "pretrained.scheduler": entries}
    assert run_script(empty, "sample", settings).code == 0
    assert stage_of(empty).manifest("sample")["scheduler"]["timestep_spacing"] == "leading"
    refuse(
        empty,
        "select",
        overrides | {"pretrained.model": str(base)},
        "scheduler is None, was {'timestep_spacing': 'leading'}",
    )
    schedule = read_config(base, entries)
    assert make_ddim(schedule).config.timestep_spacing == "leading"
    assert stock_scheduler(schedule).config.timestep_spacing == "leading"


def test_the_same_schedule_written_otherwise_is_the_same():
    """Defaults that are written out and what diffusers says of itself do not count; a beta does."""
    written_out = tiny.V1_4_SCHEDULER | {"_diffusers_version": "9", "thresholding": False, "timestep_spacing": "leading"}
    assert decisive(tiny.V1_4_SCHEDULER) == decisive(written_out)
    assert decisive(tiny.V1_4_SCHEDULER) != decisive(tiny.V1_4_SCHEDULER | {"beta_end": 0.011})


@pytest.mark.long
@pytest.mark.parametrize("num_steps", [8, 20])
def test_what_the_landing_changes_in_an_image(num_steps):
    """A last step that ends at alpha_bar 1 gives x_0 as it is predicted; the usual one leaves noise of deviation 0.029 in
    latents, which on the embedded model is less than one level of 255 in an image. Printed for docs/method.md."""
    model = tiny.load_model(ROOT / "model" / "shapes" / "base")
    prompts = json.loads((ROOT / "config" / "prompt" / "shapes_relation_test.json").read_text())[:32]
    table, last = model.sampler(num_steps, 1.0), num_steps - 1
    landing = make_table(make_ddim({**model.scheduler_config, "set_alpha_to_one": True}), num_steps, 1.0)
    predict = predictor(model, table.timesteps, model.encode(prompts), model.unconditional(), guidance_scale=2.0)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompts), *model.latent_shape, generator=rng)
    with torch.no_grad():
        x = denoise(predict, table, x, lambda shape: torch.randn(*shape, generator=rng), range(last))
        eps = predict(x, last)
        states = [transition(one, last, x, eps) for one in (table, landing)]
        noisy, clean = (mu + sigma * torch.randn(mu.shape, generator=rng) for mu, sigma in states)
        images = [model.decode(latents).double() for latents in (noisy, clean)]
    signal = model._scheduler.alphas_cumprod[table.timesteps[last]].sqrt()
    torch.testing.assert_close(clean, (x - (1 - signal**2).sqrt() * eps) / signal)
    latents, difference = (noisy - clean).square().mean().sqrt().item(), (images[0] - images[1]).abs()
    figures = difference.square().mean().sqrt().item(), difference.flatten().quantile(0.99).item(), difference.max().item()
    print("T = {}: latents {:.3f}; levels: rms {:.2f}, 99 % {:.0f}, max {:.0f}".format(num_steps, latents, *figures))
    assert abs(latents - (1 - 0.99915) ** 0.5) < 0.002
    assert 0.3 < figures[0] < 1
