"""The small flow-matching world: its sampler, its loss, its text, and how it stands in for text tokens without a T5."""

from pathlib import Path

import numpy as np
import pytest
import torch

from b2diffurl.shapes.scene import CaptionErrors, random_scene

BASE_DIR, CLIP_DIR, FLOW_DIR = Path("model/shapes/base"), Path("model/shapes/clip"), Path("model/shapes_flow")


@pytest.fixture(scope="module")
def pipeline():
    """The untrained pipeline."""
    from b2diffurl.shapes.train_flow import new_pipeline

    return new_pipeline(BASE_DIR, CLIP_DIR)


@pytest.fixture(scope="module")
def transformer(pipeline):
    """Its transformer with every parameter drawn, so that all of them matter."""
    from copy import deepcopy

    noise, network = torch.Generator().manual_seed(0), deepcopy(pipeline.transformer)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=noise)
    return network


def inputs(rows: int = 3) -> dict:
    noise = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8, generator=noise),
        "encoder_hidden_states": torch.randn(rows, 10, 160, generator=noise),
        "pooled_projections": torch.randn(rows, 192, generator=noise),
        "timestep": torch.tensor([1000.0, 421.5, 3.25])[:rows],
    }


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 7, 256])
def test_a_counted_token_is_that_many_tokens(transformer, count):
    """One zero token of weight n gives what stock diffusers gives with n tokens of zeros, and none if n is 0."""
    from copy import deepcopy

    from b2diffurl.shapes.train_flow import CountedTokens

    given = inputs()
    states = given.pop("encoder_hidden_states")
    literal = torch.cat([states, torch.zeros(3, count, 160)], dim=1)
    expected = transformer(**given, encoder_hidden_states=literal).sample
    counted = deepcopy(transformer)
    counted.set_attn_processor(CountedTokens())
    found = counted(
        **given,
        encoder_hidden_states=torch.cat([states, torch.zeros(3, 1, 160)], dim=1),
        joint_attention_kwargs={"log_weight": torch.full([3], float(count)).log()},
    ).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_vanishes_for_the_true_velocity(pipeline):
    """Where all pictures are one, x_sigma tells the noise: returning v = eps - x_0 costs nothing, -v costs 4 v^2."""
    from b2diffurl.shapes.train_flow import Phase, embed_captions, phase_loss

    scenes, captions = [random_scene(np.random.default_rng(0))], embed_captions(pipeline)
    x_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    phase = Phase("tiny", 5, 1, 1e-3, True, 0.3, 0.0, CaptionErrors(0.2, 0.2, 0.2, 0.2))
    seen = {}

    def network(hidden_states, timestep, return_dict, **rest):
        sigma = timestep.double().view(-1, 1, 1, 1) / 1000
        seen["v"] = ((hidden_states - x_0) / sigma).float()  # x_sigma - x_0 = sigma (eps - x_0)
        return (seen["sign"] * seen["v"],)

    for sign, expected in ((1, 0), (-1, 4)):
        seen["sign"] = sign
        loss = phase_loss(phase, network, captions, scenes, x_0, 0, torch.Generator().manual_seed(3))
        torch.testing.assert_close(loss, expected * seen["v"].square().mean(), rtol=1e-3, atol=1e-6)
    assert abs(seen["v"].var() - (1 + x_0.square().mean())) < 0.2


def test_noise_levels_have_their_distribution():
    """Without a noisy share the median is 1/2 and the quartiles are those of the logit-normal; with all of it, [0.5, 1]."""
    from b2diffurl.shapes.train_flow import noise_levels

    noise = torch.Generator().manual_seed(0)
    drawn = torch.cat([noise_levels(0.0, noise) for _ in range(50)])
    normal = torch.distributions.Normal(0.0, 1.0)
    quarters = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(drawn.quantile(quarters), normal.icdf(quarters).sigmoid(), atol=0.005, rtol=0)
    noisy = torch.cat([noise_levels(1.0, noise) for _ in range(50)])
    assert noisy.min() >= 0.5 and noisy.max() <= 1 and abs(noisy.mean() - 0.75) < 0.01


def test_it_is_sampled_as_in_training(pipeline, transformer):
    """Stock diffusers' stochastic steps have the mean and deviation of this tool's cps steps with eta 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from b2diffurl.algorithm.flow import make_transitions
    from b2diffurl.algorithm.transition import transition

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(5)
    table = make_transitions(scheduler.timesteps, scheduler.sigmas, eta=1.0, sde="cps")
    x, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    for i, t in enumerate(scheduler.timesteps):
        torch.manual_seed(6)
        found = scheduler.step(v, t, x, return_dict=False)[0]
        torch.manual_seed(6)
        mu, sigma = transition(table, i, x, v)
        torch.testing.assert_close(found, mu + sigma * torch.randn_like(x), rtol=1e-4, atol=1e-5)


def test_pictures_follow_from_the_seed(pipeline):
    """And the caller's random numbers go on as they were."""
    from b2diffurl.shapes.sampling import sample_flow

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    drawn = [sample_flow(pipeline, ["a red circle"], seed=seed, num_steps=2) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@torch.no_grad()
def test_the_text_encoders_are_those_of_the_world(pipeline):
    """Token states are the first layers' of base model and scorer side by side, pooled ones their end tokens (projected)."""
    from transformers import CLIPModel, CLIPTextModel

    from b2diffurl.shapes.tokens import new_tokenizer
    from b2diffurl.shapes.train_flow import embed_captions

    caption = "a purple cross right of a yellow square"
    ids = new_tokenizer()(caption, padding="max_length", max_length=10, return_tensors="pt").input_ids
    base = CLIPTextModel.from_pretrained(BASE_DIR / "text_encoder").eval()(ids, output_hidden_states=True)
    clip = CLIPModel.from_pretrained(CLIP_DIR).eval()
    scorer = clip.text_model(ids, output_hidden_states=True)
    captions = embed_captions(pipeline)
    row = captions.rows[caption]
    states = torch.cat([base.hidden_states[1], scorer.hidden_states[1]], dim=-1)[0]
    pooled = torch.cat([base.pooler_output, clip.get_text_features(input_ids=ids).pooler_output], dim=-1)[0]
    torch.testing.assert_close(captions.states[row], states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(captions.pooled[row], pooled, rtol=1e-4, atol=1e-5)
    assert ids[0, -1] == ids[0].max() and len(captions.rows) == len(captions.states) == 1825


def test_every_training_caption_has_a_row(pipeline):
    """Whatever errors a caption has, it is one of the grammar's, or empty."""
    from b2diffurl.shapes.train_base import training_caption
    from b2diffurl.shapes.train_flow import embed_captions

    rows, rng = embed_captions(pipeline).rows, np.random.default_rng(6)
    drawn = {training_caption(random_scene(rng), CaptionErrors(0.2, 0.2, 0.2, 0.2), rng) for _ in range(500)}
    assert drawn <= rows.keys() and "" in drawn


def test_what_is_saved_is_a_stable_diffusion_3_pipeline(pipeline, transformer, tmp_path):
    """Stock diffusers loads it in float32, if told that there is no T5; it takes 8 MB, and its own call draws 64 x 64 px."""
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

    from b2diffurl.shapes.train_flow import save

    save(pipeline, transformer, tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert type(loaded) is StableDiffusion3Pipeline
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 8e6
    assert loaded.text_encoder_3 is None and loaded.transformer.dtype == torch.float32
    for name, parameter in loaded.transformer.named_parameters():
        assert torch.equal(parameter, transformer.get_parameter(name).half().float()), name
    loaded.set_progress_bar_config(disable=True)
    assert loaded("a red circle", num_inference_steps=2, output_type="np", max_sequence_length=3).images.shape == (
        1,
        64,
        64,
        3,
    )


# --- shipped weights ------------------------------------------------------------------------------


def test_the_shipped_pipeline_is_what_its_training_would_save(pipeline):
    """Its frozen parts are those of the world, to the bit, and its transformer is of the same kind."""
    from b2diffurl.shapes.sampling import load_flow

    shipped = load_flow(FLOW_DIR)
    found, expected = (dict(one.transformer.config) for one in (shipped, pipeline))
    for key in expected.keys() - {"_use_default_values", "_name_or_path", "dual_attention_layers"}:
        assert found[key] == expected[key], key
    assert not found["dual_attention_layers"] and not expected["dual_attention_layers"]
    for part in ("vae", "text_encoder", "text_encoder_2"):
        found, expected = getattr(shipped, part).state_dict(), getattr(pipeline, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sum(file.stat().st_size for file in FLOW_DIR.rglob("*") if file.is_file()) <= 8e6


def test_the_shipped_base_is_worth_tuning():
    """Of 96 images of held-out prompts at least 85 % are well-formed, and 30 to 65 % right."""
    from b2diffurl.shapes.sampling import accuracy, load_flow, sample_flow
    from b2diffurl.shapes.scene import prompt_sets

    prompts = prompt_sets()["shapes_relation_test"] * 2
    shares = accuracy(sample_flow(load_flow(FLOW_DIR), prompts, seed=3), prompts)
    assert len(prompts) == 96
    assert shares["well_formed"] >= 0.85
    assert 0.3 <= shares["correct"] <= 0.65


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_preset_learns(tmp_path):
    """Two of the preset's four stages raise held-out accuracy by 15 points or more, on the same noise."""
    import os
    import subprocess
    import sys

    from conftest import ROOT

    from b2diffurl.runtime.files import read_json_lines

    variables = {"Preset": "shapes_flow", "ExpName": "short", "StageCnt": "2", "Seed": "17", "SavePath": str(tmp_path)}
    environment = os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", ROOT / "run_process.sh", f"--config.log_path={tmp_path}"], env=environment, check=True)
    rows = [row for row in read_json_lines(tmp_path / "short" / "eval.jsonl") if row["prompts"] == "test"]
    gains = {row["sampler"]: row["accuracy_gain"] for row in rows if row["checkpoint"] == "stage1"}
    assert min(gains.values()) >= 0.15
    assert gains.keys() == {"training", "deployed"}
