"""The benchmark of a stage compares like with like: the peers' shape does the same work, and its arithmetic is right.

G groups, K branches, S trained of T steps
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import experiment, make_config
from safetensors.torch import load_file
from torch import Tensor, nn

from b2diffurl.algorithm.seeding import generator
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models import stable_diffusion
from b2diffurl.models.stable_diffusion import StableDiffusion
from b2diffurl.runtime import files
from benchmarks import network, peers, stage, stage_report

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


# ---- arithmetic ----


def run_of(num_images: int, scale: float = 1.0) -> stage_report.Run:
    """A run with hand-made figures, its work `scale` times as slow."""
    return {
        "wall": {"sample": 5 + 20 * scale, "select": 4 + 6 * scale, "train": 3 + 11 * scale},
        "seconds": {
            "sample": {"load": 4, "sample": 20 * scale, "decode": 3 * scale, "write": 1 * scale, "share": 1},
            "select": {"load": 2, "score": 5 * scale, "select": 0.5 * scale, "read": 0.5 * scale},
            "train": {"load": 2, "train": 11 * scale, "read": 1 * scale, "share": 1},
        },
        "peak_bytes": {"sample": 2**30, "select": 2**28, "train": 2**29},
        "device_bytes": {},
        "written_bytes": {"sample": 6 * 2**20, "select": 2**20, "train": 2**20},
        "num_images": num_images,
        "num_evaluations": 10 * num_images,
        "num_transitions": 2 * num_images,
    }


MACHINE = {"matmul_tflops": 2.0, "evaluation_flops": 1e11, "transition_flops": 2e12}


def test_phases_add_up_to_the_wall_clock():
    """Decoding and writing are taken out of sampling, reading out of training, and what is left is start-up."""
    assert stage_report.phases(run_of(40)) == {
        "start-up, loading and end": 12,
        "sampling": 16,
        "decoding": 3,
        "scoring": 5,
        "selecting": 0.5,
        "training": 10,
        "reading and writing": 2.5,
    }


def test_manifests_without_the_finer_keys_do(finished):
    """What today's manifests lack counts as part of the phase that holds it."""
    manifests = {verb: Stage(experiment(finished), 0).manifest(verb) for verb in stage_report.VERBS}
    ended = {verb: stage.Ended(100.0, 1, 1) for verb in stage_report.VERBS}
    run = stage.summarise(ended, manifests, manifests["sample"]["num_evaluations"], cuda=False)
    assert run["num_images"] == 18
    assert sum(stage_report.phases(run).values()) == pytest.approx(300)


def test_fewer_images_of_the_peers_are_scaled_up_and_their_start_is_not():
    """A quarter of the images and a half of the transitions."""
    few = run_of(10) | {"num_transitions": 40}
    scaled = stage_report.scaled(few, run_of(40))
    assert scaled["start-up, loading and end"] == 12
    assert scaled["sampling"] == 64
    assert scaled["training"] == 20
    assert scaled["whole stage"] == 12 + 64 + 12 + 20 + 2 + 20 + 10
    assert stage_report.written(few, run_of(40)) == 32 * 2**20


def test_rates():
    """400 evaluations of 0.1 TFLOP in 16 s, 80 transitions of 2 TFLOP in 10 s."""
    assert stage_report.rates(run_of(40), MACHINE) == {"images": 2, "transitions": 8, "sampling": 2.5, "training": 16}


def test_page_has_ratios_and_the_share_of_attention():
    """Peers three times as slow in everything but start-up, twice as slow with fused attention: half of the difference."""
    runs = {"ours": [run_of(40)], "peers": [run_of(40, 3)], "fused": [run_of(40, 2)]}
    facts = dict.fromkeys(("command", "date", "hardware", "versions", "threads", "precision"), "so")
    page = stage_report.markdown(facts | {"runs": runs, "machine": MACHINE})
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in page.splitlines() if line.startswith("|")}
    assert rows["| start-up, loading and end"] == ["12.0", "12.0", "12.0", "1.00×", "1.00×"]
    assert rows["| sampling"] == ["16.0", "48.0", "32.0", "3.00×", "1.50×"]
    assert rows["| **whole stage**"] == ["**49.0**", "**123**", "**86.0**", "**2.51×**", "**1.43×**"]
    assert "saves 50.0 % of the difference" in page
    assert rows["| TFLOP/s of training (of matmul peak)"] == ["16.0 (800.0 %)", "5.33 (266.7 %)", "8.00 (400.0 %)"]
    assert rows["| peak memory of sample, MiB"] == ["1,024"] * 3


def test_medians_are_of_runs_beside_each_other():
    """The middle of three runs, each scaled to the work of ours of its own turn."""
    runs = {"ours": [run_of(40), run_of(80), run_of(40)], "peers": [run_of(40, 2), run_of(40, 3), run_of(40, 9)]}
    found = stage_report.typical({"runs": runs})
    assert found["ours"]["sampling"] == 16
    assert found["peers"]["sampling"] == 2 * 48


def test_startup_is_told_in_imports_of_torch():
    """Medians first, then their ratio."""
    seconds = {"import torch": [2.0, 9.0, 1.0], "sample": [5.0, 6.0, 4.0]}
    facts = dict.fromkeys(("command", "date", "hardware", "versions"), "so") | {"seconds": seconds}
    page = stage_report.startup_markdown(facts)
    assert "| sample | 5.00 | 2.50× |" in page
    assert "medians of 3" in page


class LowRank(nn.Module):
    """A frozen layer with a low-rank path, as peft's, of 5 -> 2 -> 7 beside 5 -> 7."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 7, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_flops_of_a_layer_with_a_lora():
    """By hand, 3 rows: forward 3 products; backward the gradients of `up`, of its input and of `down`, none of `base`."""
    layer, x = LowRank(), torch.ones(3, 5)
    forward = 2 * 3 * (5 * 7 + 5 * 2 + 2 * 7)
    backward = 2 * 3 * (2 * 7 + 2 * 7 + 5 * 2)
    assert stage.count_flops(layer, lambda: layer(x)) == (forward, forward + backward)


def test_flops_of_a_unet(models):
    """Twice the rows, twice the FLOPs but for embedding the one timestep; a backward costs about as much as a forward."""
    config = json.loads((models / "sd" / "unet" / "config.json").read_text())
    one, two = stage.unet_flops(config, 1, 77, 4), stage.unet_flops(config, 2, 77, 4)
    assert two[0] == 2 * one[0]
    assert two[1] == 2 * one[1]
    assert 1.7 < one[1] / one[0] < 2.5


# ---- processes ----


def test_a_process_is_measured():
    """Its bytes are counted each time they are written, its memory is its own, its time ends with it or with a line."""
    write = "[open('/dev/null', 'wb').write(bytes(10**6)) for _ in range(3)]; hold = b'x' * 10**8"
    ended = stage.run_process(["-c", write])
    assert 3_000_000 <= ended.written_bytes < 3_100_000
    assert ended.peak_bytes > 10**8
    until = stage.run_process(["-c", "import time; print('here we go'); time.sleep(60)"], until="we go")
    assert until.seconds < 30
    with pytest.raises(RuntimeError, match="no such thing"):
        stage.run_process(["-c", "raise SystemExit('no such thing')"])
    with pytest.raises(RuntimeError, match="ended with 0"):
        stage.run_process(["-c", ""], until="we go")


def test_settings_become_the_configuration_of_the_scripts(tmp_path):
    """Our flags resolve as the scripts resolve them; the last word is the overrides'."""
    given = stage.parse(["--quick", "--threads", "2", "--overrides", "split_time=4", "train.learning_rate=1e-3"])
    config = stage.resolve(stage.settings_of(given, tmp_path))
    assert (config.num_threads, config.split_time, config.sample.batch_size) == (2, 4, 4)
    assert config.train.learning_rate == 1e-3
    assert config.is_locked


def test_what_the_peers_cannot_do_is_refused(finished, overrides):
    """Their shape has branches, no reference policy, no loss scaling, and nothing that makes less of the work."""
    for change in ({"sampling": "independent"}, {"train.objective": "dpok"}):
        with pytest.raises(ValueError, match="peers' shape"):
            make_job(finished, overrides | change)
    job = make_job(finished, overrides)
    job.config["train"]["timestep_fraction"] = 0.5
    with pytest.raises(ValueError, match="peers' shape"):
        peers.Job(**vars(job))


@pytest.fixture
def quick(models) -> list[str]:
    """Arguments of a benchmark of the tiny model."""
    tiny = {
        "pretrained.model": models / "sd",
        "reward.clip.model": models / "clip",
        "eval.judge": "",
        "eval.diversity": "()",
    }
    tiny |= {"prompt_file": models / "prompts.json", "eval.prompt_file": models / "prompts.json"}
    return ["--quick", "--threads", "1", "--overrides", *(f"{key}={value}" for key, value in tiny.items())]


@pytest.mark.slow
def test_the_benchmark_runs_end_to_end(quick, capsys, monkeypatch, tmp_path):
    """Three shapes of three processes each, and every phase in the table; the figures join those of other models."""
    monkeypatch.setattr(stage, "RESULTS", tmp_path / "performance.json")
    files.write_json(stage.RESULTS, {"sd14 on cuda": {}})
    stage.main(["--write", *quick])
    assert list(files.read_json(stage.RESULTS)) == ["sd14 on cuda", "shapes on cpu"]
    page = capsys.readouterr().out
    for phase in ("sampling", "decoding", "scoring", "training", "**whole stage**"):
        assert f"| {phase} |" in page
    assert "A stage of 12 images, 28 evaluations" in page


def test_the_network_alone(overrides, monkeypatch):
    """A row for each kind and number; a transition's is forward and backward."""
    monkeypatch.setattr(network, "PLAIN_KINDS", {"evaluation": (1, 2), "transition": (2,)})
    monkeypatch.setattr(network, "COMPILED_KINDS", {"evaluation": (1,), "transition": (2,)})
    monkeypatch.setattr(stable_diffusion, "COMPILED", stable_diffusion.COMPILED)  # what it was before it is measured
    compiled = []
    monkeypatch.setattr(StableDiffusion, "compile", lambda self: compiled.append(stable_diffusion.COMPILED))
    rows = [row for way in ("no", "whole", "transformers") for row in network.measure_network(make_config(overrides), way)]
    assert [(row["compiled"], row["kind"], row["at_once"]) for row in rows] == [
        ("no", "evaluation", 1),
        ("no", "evaluation", 2),
        ("no", "transition", 2),
        *((way, *kind) for way in ("whole", "transformers") for kind in (("evaluation", 1), ("transition", 2))),
    ]
    assert compiled == [network.COMPILED["whole"], network.COMPILED["transformers"]]
    assert rows[2]["seconds"] > rows[1]["seconds"] > 0
    machine = {"matmul_tflops": 1.0, "evaluation_flops": 10**9, "transition_flops": 3 * 10**9}
    facts = {"command": "COMMAND", "date": "", "hardware": "", "versions": "", "precision": "float32", "machine": machine}
    page = stage_report.network_markdown(facts | {"rows": [row | {"seconds": 0.5} for row in rows]})
    assert "| evaluations | 2 | no | 500 | 0.00400 (0.4 %) |" in page
    assert "| transitions | 2 | whole | 500 | 0.0120 (1.2 %) |" in page


@pytest.mark.slow
@pytest.mark.parametrize("way", ["blocks", "transformers", "whole"])
def test_the_network_is_compiled_in_every_way(overrides, monkeypatch, way):
    """For real, on the tiny model."""
    monkeypatch.setattr(network, "COMPILED_KINDS", {"evaluation": (1,), "transition": (1,)})
    monkeypatch.setattr(stable_diffusion, "COMPILED", stable_diffusion.COMPILED)  # what it was before it is measured
    torch._dynamo.reset()
    rows = network.measure_network(make_config(overrides), way)
    assert [row["kind"] for row in rows] == ["evaluation", "transition"]
    assert all(row["first_seconds"] > 3 * row["seconds"] for row in rows)  # compiling, or reading back


@pytest.mark.slow
def test_startup_is_measured(quick, capsys, monkeypatch):
    """Each script is stopped where its work begins, and begins again the next time."""
    monkeypatch.setattr(stage, "STARTUP_REPEATS", 2)
    stage.main(["--startup", *quick])
    page = capsys.readouterr().out
    for name in ("import torch", *stage_report.VERBS):
        assert f"| {name} |" in page
