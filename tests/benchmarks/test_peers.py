"""The peers' shape of a stage does the same work as ours.

G groups, K branches, S trained of T steps
"""

from pathlib import Path

import pytest
import torch
from conftest import experiment, make_config
from safetensors.torch import load_file
from torch import Tensor

from b2diffurl.algorithm.seeding import generator
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.runtime import files
from benchmarks import peers

SHAPE, T, K, BATCH = (4, 8, 8), 4, 3, 2  # of the tiny experiment; BATCH: groups in a batch of ours
# Everything in one update, whose gradient is not clipped and so shows in AdamW's first moment.
ONE_UPDATE = {"train.num_epochs": 1, "train.batch_size": 64, "train.max_grad_norm": 1e6}


def make_job(folder: Path, overrides: dict, *, fused: bool = False) -> peers.Job:
    """Stage 0 of the experiment in `folder`, for the peers."""
    prompts = files.read_json(Stage(experiment(folder), 0).prompts)[::K]
    return peers.Job(make_config(overrides).to_dict(), prompts, 2, 1, "no", fused)


def as_selected(stage: Stage) -> tuple[list[dict], Tensor]:
    """The selected trajectories of a stage of ours in the peers' form, and the unconditional embedding.

    What the peers hold besides, the prefix, is NaN: it must not be trained on.
    """
    selected = []
    for row in files.read_json(stage.selection):
        batch = files.read_tensors(stage.batch(row["group"] // BATCH))
        g, k = row["group"] % BATCH, row["branch"]
        states, log_probs = batch["latents"][g, k], batch["log_probs"][g, k]
        missing = T - len(log_probs)
        states = torch.cat([torch.full((missing, *SHAPE), torch.nan), states])
        one = {
            "latents": states[:-1],
            "next_latents": states[1:],
            "log_probs": torch.cat([torch.full((missing,), torch.nan), log_probs]),
            "timesteps": torch.cat([torch.zeros(missing, dtype=torch.int64), batch["timesteps"]]),
            "prompt_embeds": batch["condition.prompt_embeds"][batch["prompt_ids"][g]],
        }
        selected.append({key: peers.as_array(value) for key, value in one.items()} | {"advantage": row["advantage"]})
    return selected, batch["unconditional.prompt_embeds"]


def train_like_peers(folder: Path, trained: Stage, job: peers.Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The LoRA and AdamW's first moments, by our names, after the peers' training on what `trained` selected."""
    selected, unconditional = as_selected(trained)
    peers.write_pickle(folder / peers.SELECTED, selected)
    peers.write_pickle(folder / "unconditional.pkl", peers.as_array(unconditional))
    facts = peers.train(folder, job)
    assert facts["num_transitions"] == files.read_json(trained.manifest_path("train"))["num_transitions"]
    moments = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    lora = load_file(folder / LORA_FILE)
    return lora, dict(zip(peers.Policy(job).lora, (moments[n]["exp_avg"] for n in range(len(moments))), strict=True))


def what_we_trained(trained: Stage) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    folder = trained.checkpoints()[-1]
    optimizer = load_file(folder / "optimizer.safetensors")
    moments = {name.removesuffix("::exp_avg"): value for name, value in optimizer.items() if name.endswith("::exp_avg")}
    return load_file(folder / LORA_FILE), moments


def our_name(name: str) -> str:
    return f"unet.{name.replace('.default.', '.')}"


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all tensors over the norm of those expected."""
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    return (difference / torch.cat([value.flatten() for value in expected.values()]).norm()).item()


@pytest.mark.parametrize(("fused", "tolerance"), [(True, 1e-5), (False, 1e-4)])
def test_both_shapes_give_the_same_update(stage_with, overrides, tmp_path, fused, tolerance):
    """From the same trajectories one update has the same gradient, to a `tolerance` of its norm, and gives the same weights,
    to 1e-5 of the learning rate.

    AdamW's first step moves a weight by about the learning rate whatever its gradient. So the gradient is compared, too (the
    first moment is a tenth of it), and weights only where it is more than rounding, in 96 % of them. Fused and plain
    attention round differently (in float64 the tiny network's outputs agree to 1e-15), and guidance makes more of that.
    """
    trained = Stage(experiment(stage_with(**ONE_UPDATE)), 0)
    job = make_job(trained.root.parents[2], overrides | ONE_UPDATE, fused=fused)
    lora, gradient = train_like_peers(tmp_path, trained, job)
    expected_lora, expected_gradient = what_we_trained(trained)
    assert files.read_json(trained.manifest_path("train"))["num_updates"] == 1
    assert relative(gradient, expected_gradient) < tolerance
    weights, expected = (torch.cat([one[our_name(name)].flatten() for name in gradient]) for one in (lora, expected_lora))
    slope = torch.cat([expected_gradient[name].flatten() for name in gradient])
    clear = (slope == 0) | (slope.abs() > 1e-3 * slope.abs().max())
    assert clear.float().mean() > 0.8
    torch.testing.assert_close(weights[clear], expected[clear], rtol=0, atol=1e-5 * job.config["train"]["learning_rate"])


def test_both_shapes_make_the_same_updates(finished, overrides, tmp_path):
    """Two epochs of several updates, with a remainder: the same rows in each, so that the weights stay together."""
    trained = Stage(experiment(finished), 0)
    job = make_job(finished, overrides)
    assert files.read_json(trained.manifest_path("train"))["num_updates"] > 2
    lora, moments = train_like_peers(tmp_path, trained, job)
    expected_lora, expected_moments = what_we_trained(trained)
    assert relative(moments, expected_moments) < 1e-4
    assert relative(lora, expected_lora) < 1e-4


def test_serial_branches_are_our_branches(finished, overrides):
    """Given the noise of a batch of ours, branch after branch in plain attention gives its states, log-probs and images.

    Within a ten-thousandth: attention rounds differently, and early steps and guidance make more of it.
    """
    ours, job = Stage(experiment(finished), 0), make_job(finished, overrides)
    batch, rng = files.read_tensors(ours.batch(0)), generator(job.config["seed"], 0, "sample", 0)
    shapes = [(BATCH, *SHAPE)] * 3 + [(BATCH * K, *SHAPE)] * 2  # x_T, the prefix's two steps, the window's two
    x_T, *drawn = [torch.randn(shape, generator=rng) for shape in shapes]
    serial = [*drawn[:2], *(drawn[step][k::K] for k in range(K) for step in (2, 3))]

    policy, sampler, painter = peers.Policy(job), job.sampler(), peers.Painter(job)
    predict = policy.predictor(sampler.timesteps, painter.encode(job.prompts[:BATCH]), painter.encode([""]))
    branches = peers.sample_batch(predict, sampler, x_T, lambda shape: serial.pop(0), K, 2)
    assert not serial
    for k, (states, log_probs) in enumerate(branches):
        assert states.shape == (BATCH, T + 1, *SHAPE)
        torch.testing.assert_close(states[:, -3:], batch["latents"][:, k], rtol=0, atol=1e-4)
        torch.testing.assert_close(log_probs[:, -2:], batch["log_probs"][:, k], rtol=1e-5, atol=1e-5)
        for n, image in enumerate(painter.decode(states[:, -1])):
            expected = files.read_image(ours.image(n * K + k))
            assert (image.int() - expected.int()).abs().max() <= 1


def test_both_shapes_select_the_same(finished, overrides, tmp_path):
    """From our images the peers' scoring, in other batches, picks the same siblings with the same advantages."""
    ours, job = Stage(experiment(finished), 0), make_job(finished, overrides)
    (tmp_path / "images").symlink_to(ours.images.resolve())
    ids = [[(start + n) * K + k for n in range(BATCH)] for start in range(0, 6, BATCH) for k in range(K)]
    records = [{"ids": some, "prompts": [job.prompts[n // K] for n in some], "latents": some} for some in ids]
    peers.write_pickle(tmp_path / peers.SAMPLES, records)
    facts = peers.select(tmp_path, job)
    expected = files.read_json(ours.selection)
    selected = peers.read_pickle(tmp_path / peers.SELECTED)
    assert facts["num_selected"] == len(expected) > 2
    assert [one["latents"] for one in selected] == [row["id"] for row in expected]
    found = torch.tensor([one["advantage"] for one in selected])
    torch.testing.assert_close(found, torch.tensor([row["advantage"] for row in expected]), rtol=1e-3, atol=1e-3)


def test_peers_write_everything_again_after_every_batch(finished, overrides, tmp_path, monkeypatch):
    """Three batches of two: the pickle grows by a batch each time, and holds whole trajectories, all states twice."""
    monkeypatch.setattr(peers, "SAMPLE_BATCH", 2)
    job, sizes = make_job(finished, overrides), []
    write = peers.write_pickle
    monkeypatch.setattr(peers, "write_pickle", lambda path, value: [write(path, value), sizes.append(path.stat().st_size)])
    (tmp_path / "images").mkdir()
    facts = peers.sample(tmp_path, job)
    assert facts["num_images"] == len(list((tmp_path / "images").iterdir())) == 18
    samples = peers.read_pickle(tmp_path / peers.SAMPLES)
    assert sorted(n for record in samples for n in record["ids"]) == list(range(18))
    assert all((record["latents"][:, 1:] == record["next_latents"][:, :-1]).all() for record in samples)
    assert samples[0]["latents"].shape == (2, T, *SHAPE)
    one = 6 * (2 * T * 256 + 77 * 16) * 4  # bytes of six images: states twice, and an embedding
    assert sizes[:3] == pytest.approx([one, 2 * one, 3 * one], rel=0.05)


def test_what_the_peers_cannot_do_is_refused(finished, overrides):
    """Their shape has branches trained to the image, no reference policy, no loss scaling, nothing that saves work."""
    for change in ({"sampling": "independent"}, {"train.objective": "dpok"}, {"split_stop": 3}):
        with pytest.raises(ValueError, match="peers' shape"):
            make_job(finished, overrides | change)
    job = make_job(finished, overrides)
    job.config["train"]["timestep_fraction"] = 0.5
    with pytest.raises(ValueError, match="peers' shape"):
        peers.Job(**vars(job))
