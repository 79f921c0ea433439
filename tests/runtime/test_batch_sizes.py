"""What makes a stage fast or small does not change what it computes, and memory that does not suffice is lived with."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import PROMPTS, ROOT, assert_same, experiment, make_config, run_script, run_stage
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from gaussian import GaussianWorld
from safetensors.torch import load_file
from torch import Tensor

from b2diffurl.algorithm.branching import branch_sample
from b2diffurl.algorithm.selection import Selected
from b2diffurl.algorithm.transition import with_prefix
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.trajectories import SelectedTrajectories, save_batch, save_selected
from b2diffurl.models import policy, stable_diffusion
from b2diffurl.models.stable_diffusion import StableDiffusion
from b2diffurl.phases import sample, scoring, train
from b2diffurl.phases.train import choose_steps
from b2diffurl.resident import run_stages
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes
from b2diffurl.runtime.device import choose_device
from b2diffurl.runtime.threads import Behind, ahead

CPU = torch.device("cpu")
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
SAMPLE_BOUND = 1e-4  # of a latent, by which another batch shape may move it over a few steps
LORA_BOUND = 2e-2  # of a LoRA's update, relative: AdamW's first steps divide by gradients that are near 0


@pytest.fixture
def new_accelerator():
    """Device and precision are chosen anew, as in a process of its own; called, once more."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield reset
    reset()


def stage(folder: Path, index: int = 0) -> Stage:
    return Stage(experiment(folder), index)


def manifest(folder: Path, phase: str) -> dict:
    return stage(folder).manifest(phase)


def forget(folder: Path, verb: str) -> None:
    """Make one phase of stage 0 unfinished, and what it needs be there."""
    one = stage(folder)
    one.manifest_path(verb).unlink()
    if verb == "sample":
        shutil.rmtree(one.samples)
    if verb == "train":
        shutil.rmtree(one.folder / "checkpoints")
        rows = json.loads(one.selection.read_text())
        save_selected(one, [Selected(row["group"], row["branch"], row["score"]) for row in rows], 2)


def update_of(folder: Path) -> Tensor:
    """What stage 0's training made of B, which is 0 at first."""
    state = load_file(stage(folder).checkpoints()[-1] / LORA_FILE)
    return torch.cat([value.flatten() for name, value in state.items() if "lora_B" in name])


def distance(one: Path, other: Path) -> float:
    return ((update_of(one) - update_of(other)).norm() / update_of(other).norm()).item()


# ---- batch shapes ----


@pytest.mark.parametrize("key", ["sample.micro_batch_size", "sample.decode_batch_size", "train.micro_batch_size"])
def test_batch_sizes_move_results_by_rounding_only(finished, overrides, tmp_path, key):
    """Sampling, decoding and training one by one: latents within 1e-4, pixels within one level, the LoRA's update within
    2 % of its norm."""
    run_stage(tmp_path, overrides | {key: 1})
    for batch in range(3):
        mine, theirs = (load_file(stage(folder).batch(batch)) for folder in (tmp_path, finished))
        assert (mine["latents"] - theirs["latents"]).abs().max() < SAMPLE_BOUND
    for n in range(18):
        mine, theirs = (files.read_image(stage(folder).image(n)).int() for folder in (tmp_path, finished))
        assert (mine - theirs).abs().max() <= 1
    assert distance(tmp_path, finished) < LORA_BOUND


# ---- memory that does not suffice ----


@pytest.fixture
def small_memory(monkeypatch):
    """hold(N): from now on the network has room for N rows, and the image decoder too."""

    def hold(num_rows: int) -> None:
        predict, decode = StableDiffusion.predict, StableDiffusion.decode

        def checked(self, x: Tensor, *rest, **options) -> Tensor:
            if len(x) > num_rows:
                raise torch.OutOfMemoryError(NO_MEMORY)
            return predict(self, x, *rest, **options)

        def checked_decode(self, latents: Tensor) -> Tensor:
            if len(latents) > num_rows:
                raise torch.OutOfMemoryError(NO_MEMORY)
            return decode(self, latents)

        monkeypatch.setattr(StableDiffusion, "predict", checked)
        monkeypatch.setattr(StableDiffusion, "decode", checked_decode)

    return hold


def test_what_does_not_fit_is_halved_and_stays_so(finished, overrides, tmp_path, small_memory, caplog):
    """With room for two rows a stage runs as one that is configured so, to the bit; manifests and log say what was halved,
    and the next stage begins with what fitted."""
    settings = overrides | {"train.micro_batch_size": 4, "sample.micro_batch_size": 4, "sample.decode_batch_size": 4}
    small_memory(2)
    for name in ("halved", "configured"):
        (tmp_path / name).mkdir()
    run_stage(tmp_path / "halved", settings)
    assert manifest(tmp_path / "halved", "sample")["batch_sizes"] == {
        "sample.micro_batch_size": 2,
        "sample.decode_batch_size": 2,
    }
    assert manifest(tmp_path / "halved", "train")["batch_sizes"] == {"train.micro_batch_size": 2}
    said = [record.message for record in caplog.records if "out of memory with" in record.message]
    assert len(said) == 3
    assert "out of memory with sample.micro_batch_size=4, going on with 2" in said[0]
    caplog.clear()
    run_stage(tmp_path / "halved", settings, 1)
    assert not [record for record in caplog.records if "out of memory" in record.message]
    sizes = ("train.micro_batch_size", "sample.micro_batch_size", "sample.decode_batch_size")
    run_stage(tmp_path / "configured", settings | dict.fromkeys(sizes, 2))
    for name in ("samples/batch_00002.safetensors", "images/00017.png", f"checkpoints/checkpoint_2/{LORA_FILE}"):
        halved, configured = ((stage(tmp_path / which).folder / name).read_bytes() for which in ("halved", "configured"))
        assert halved == configured


@pytest.mark.parametrize(("verb", "key"), [("sample", "sample.micro_batch_size"), ("train", "train.micro_batch_size")])
def test_memory_for_not_even_one_row(workplace, overrides, small_memory, verb, key):
    """Two lines that name what to lower, exit code 2, and no phase taken for finished."""
    forget(workplace, verb)
    small_memory(0)
    ended = run_script(workplace, verb, overrides)
    assert ended.code == 2
    assert len(ended.stderr.strip().splitlines()) == 2
    assert f"{key}=1" in ended.stderr and "gradient_checkpointing" in ended.stderr
    assert not stage(workplace).finished(verb)


def test_sizes_belong_to_a_device_and_to_what_was_wanted(tmp_path):
    """What fitted is tried first again, but not where more, or less, is wanted than then; other errors pass through."""

    def work(size: int) -> int:
        if size > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return size

    sizes = BatchSizes(tmp_path, CPU, {"a": 12, "b": 2})
    assert sizes.fit("a", work) == 3
    assert sizes.fit("b", work) == 2
    assert BatchSizes(tmp_path, CPU, {"a": 12, "b": 2}).sizes == {"a": 3, "b": 2}
    assert BatchSizes(tmp_path, CPU, {"a": 16}).fit("a", work) == 2
    assert BatchSizes(tmp_path, CPU, {"a": 12}).sizes == {"a": 3}
    assert BatchSizes(tmp_path, CPU, {"a": 12}, given=["checkpointing"]).sizes == {"a": 12}
    with pytest.raises(MemoryError, match="a=12"):
        BatchSizes(tmp_path / "shared", CPU, {"a": 12}, alone=False).fit("a", work)
    with pytest.raises(RuntimeError, match="must match the size"):
        sizes.fit("a", lambda size: torch.zeros(2) + torch.zeros(3) if size else None)


def test_a_stage_holds_few_batches(overrides, tmp_path, monkeypatch):
    """The scripts themselves: of all that was sampled, and of all images and trajectories that were read back, there is what
    is worked on and the next one, no more."""
    seen: dict[str, list[weakref.ref]] = {"sampled": [], "images": [], "trained": []}
    most: Counter = Counter()

    def watch(owner, name: str, kind: str, pick) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            seen[kind].append(weakref.ref(pick(result, args)))
            most[kind] = max(most[kind], sum(one() is not None for one in seen[kind]))
            return result

        monkeypatch.setattr(owner, name, call)

    watch(sample, "branch_sample", "sampled", lambda result, args: result[0])
    watch(scoring, "score", "images", lambda result, args: args[1])
    watch(SelectedTrajectories, "read", "trained", lambda result, args: result.latents)
    settings = overrides | {"sample.num_batches_per_epoch": 8, "train.gradient_accumulation_steps": 1}
    run_stage(tmp_path, settings)
    assert {kind: len(some) >= 8 for kind, some in seen.items()} == dict.fromkeys(seen, True)
    assert most["sampled"] <= 2
    assert most["images"] <= 2
    assert most["trained"] <= 3  # one more while the next is being read


@pytest.mark.long
def test_memory_does_not_grow_with_a_stages_batches(tmp_path):
    """Sampling, selecting and training 12 batches, then 48, of 8 MB each: the process grows by less than a tenth of what
    the 36 batches more weigh."""
    path = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {path}; from {__name__} import grow; grow(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    few, many, weight = json.loads(ended.stdout.splitlines()[-1])
    assert weight > 250e6
    assert many - few < weight / 10


def grow(folder: str) -> None:
    """Peak memory after a stage of 12 batches and after one of 48, and what the 36 batches weigh; in a process alone."""
    world = GaussianWorld()
    world.latent_shape = shape = (4, 128, 128)
    sampler = world.sampler(4)
    conditions, unconditional = world.encode(["0"]), world.encode(["0"])
    rng = torch.Generator().manual_seed(0)

    def run(one: Stage, num_batches: int) -> None:
        with Behind() as writer:
            for batch in range(num_batches):
                latents, log_probs = branch_sample(
                    lambda x, i: torch.zeros_like(x),
                    sampler,
                    torch.randn((4, *shape), generator=rng),
                    lambda size: torch.randn(size, generator=rng),
                    num_branches=2,
                    num_trained_steps=3,
                )
                writer.do(lambda batch=batch, latents=latents, log_probs=log_probs: save_batch(
                    one.batch(batch), latents, log_probs, sampler.timesteps[1:], ["0"] * 4, conditions, unconditional, {}
                ))  # fmt: skip
            writer.wait()
        selected = [Selected(group, 0, 1.0) for group in range(4 * num_batches)]
        save_selected(one, selected, 4)
        stored = SelectedTrajectories(one, selected, 4)
        deals = torch.randperm(len(selected), generator=rng).split(8)
        assert sum(len(some) for _, some in ahead(lambda rows: stored.read(rows.tolist()), deals)) == len(selected)

    peaks = []
    for index, num_batches in enumerate((12, 48)):
        run(Stage(Path(folder), index), num_batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    print(json.dumps([*peaks, 36 * 4 * 2 * 4 * 4 * 128 * 128 * 4]))


# ---- what is stored of the selected ----


def test_selected_files_hold_the_selected_and_nothing_else(workplace, tmp_path):
    """Read in any order, with repetition, trajectories are those of the samples with their own prompts' embeddings; each
    distinct embedding comes once."""
    source = stage(workplace)
    selected = [Selected(0, 2, 1.0), Selected(1, 0, -1.0), Selected(3, 1, 1.0), Selected(5, 0, -1.0), Selected(5, 2, 1.0)]
    written = save_selected(source, selected, 2)
    assert [path.name for path in written] == [f"batch_0000{n}.safetensors" for n in range(3)]
    order = [4, 0, 3, 0, 2]
    found = SelectedTrajectories(source, selected, 2).read(order)
    prompts = json.loads(source.prompts.read_text())
    for row, n in enumerate(order):
        one = selected[n]
        stored = load_file(source.batch(one.group // 2))
        embeddings = stored["condition.prompt_embeds"][stored["prompt_ids"][one.group % 2]]
        assert found.ids[row] == one.group * 3 + one.branch
        assert torch.equal(found.latents[row], stored["latents"][one.group % 2, one.branch])
        assert torch.equal(found.log_probs[row], stored["log_probs"][one.group % 2, one.branch])
        assert torch.equal(found.conditions["prompt_embeds"][found.prompt_ids[row]], embeddings)
    asked = {prompts[found.ids[row]] for row in range(len(order))}
    assert len(found.conditions["prompt_embeds"]) == len(asked)
    assert torch.equal(found.unconditional["prompt_embeds"], load_file(source.batch(0))["unconditional.prompt_embeds"])


def test_unselected_trajectories_go_after_selection(overrides, finished, tmp_path):
    """By default the samples go when the selection is written; what is left takes the share that was selected, and the
    training is that of a stage that kept all. A selection whose copies are gone is refused."""
    settings = overrides | {"keep.samples": False}
    run_stage(tmp_path, settings, verbs=("sample",))
    whole = sum(path.stat().st_size for path in stage(tmp_path).samples.iterdir())
    run_stage(tmp_path, settings, verbs=("select",))
    assert not stage(tmp_path).samples.exists()
    left = sum(path.stat().st_size for path in stage(tmp_path).selected.iterdir())
    assert left < 0.6 * whole  # 6 of 18, and the embeddings
    aside = stage(tmp_path).selected.rename(stage(tmp_path).folder / "aside")
    with pytest.raises(ValueError, match=r"run_select\.py again"):
        run_stage(tmp_path, settings, verbs=("train",))
    aside.rename(stage(tmp_path).selected)
    run_stage(tmp_path, settings)
    assert not stage(tmp_path).selected.exists()
    assert torch.equal(update_of(tmp_path), update_of(finished))


def test_a_stage_selected_before_there_were_copies_is_asked_to_be_selected_again(workplace, overrides):
    """An experiment that an earlier version left between selecting and training."""
    stage(workplace).manifest_path("train").unlink()
    path = stage(workplace).manifest_path("select")
    found = files.read_json(path)
    found["files"] = {name: facts for name, facts in found["files"].items() if not name.startswith("selected/")}
    files.write_record(path, found)
    shutil.rmtree(stage(workplace).selected)
    with pytest.raises(ValueError, match=r"Delete .*select.json and run run_select.py again"):
        run_stage(workplace, overrides, verbs=("train",))


# ---- one process for all ----


@pytest.mark.long
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_process_gives_the_bits_of_three_scripts_a_stage(new_accelerator, overrides, tmp_path, monkeypatch, precision):
    """Both stages, the model loaded once: every file as from a model loaded anew for each phase."""
    monkeypatch.setattr(policy, "_kept", None)
    settings = overrides | {"eval.every": 0, "mixed_precision": precision, "eval.diversity": ()}
    for name in ("scripts", "resident"):
        (tmp_path / name).mkdir()
    for index in range(2):
        run_stage(tmp_path / "scripts", settings, index)
    loaded = []
    load = policy.load_base
    monkeypatch.setattr(policy, "load_base", lambda *given, **options: loaded.append(1) or load(*given, **options))
    monkeypatch.chdir(tmp_path / "resident")
    run_stages(make_config(settings | {"eval.prompt_file": str(write_prompts(tmp_path))}))
    assert len(loaded) == 1
    for name in ("stage0", "stage1"):
        for folder in ("scripts", "resident"):
            (tmp_path / "compared" / folder).mkdir(parents=True, exist_ok=True)
            (experiment(tmp_path / folder) / name).rename(tmp_path / "compared" / folder / name)
    assert_same(tmp_path / "compared" / "resident", tmp_path / "compared" / "scripts")


def write_prompts(folder: Path) -> Path:
    path = folder / "held_out.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_several_processes_do_not_share_one(overrides, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Resident=1 is for one process"):
        run_stages(make_config(overrides))


# ---- memory for speed, and speed for exactness ----


def test_gradient_checkpointing_gives_the_same_update(finished, overrides, tmp_path, monkeypatch):
    """And computes activations again: the blocks run twice for each time the whole network does."""
    calls = Counter()
    for kind in (UNet2DConditionModel, ResnetBlock2D):

        def forward(self, *args, original=kind.forward, name=kind.__name__, **kwargs):
            calls[name] += torch.is_grad_enabled()
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    run_stage(tmp_path, overrides | {"train.gradient_checkpointing": True})
    assert distance(tmp_path, finished) < 1e-4
    checkpointed, calls = dict(calls), calls.clear() or calls
    (tmp_path / "plain").mkdir()
    run_stage(tmp_path / "plain", overrides)
    assert checkpointed["UNet2DConditionModel"] == calls["UNet2DConditionModel"] > 0
    assert checkpointed["ResnetBlock2D"] > 1.5 * calls["ResnetBlock2D"]


def test_a_subset_of_the_steps(finished, overrides, tmp_path):
    """Every update takes as many of the S steps as asked for, each now and then; the metrics name them."""
    run_stage(tmp_path, overrides | {"train.timestep_fraction": 0.5})
    updates = [json.loads(line) for line in stage(tmp_path).metrics("train").read_text().splitlines()]
    timesteps = [update["timesteps"] for update in updates]
    assert [len(some) for some in timesteps] == [1] * len(updates)
    assert all(len(update["log_ratio_per_step"]) == 1 for update in updates)
    assert {t for some in timesteps for t in some} == {251, 1}
    kept = json.loads(stage(tmp_path).selection.read_text())
    assert manifest(tmp_path, "train")["num_transitions"] == 2 * len(kept)
    assert distance(tmp_path, finished) > 0.1


def test_chosen_steps_are_every_one_as_likely():
    chosen = [choose_steps(5, 2, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    assert all(some == sorted(set(some)) and len(some) == 2 for some in chosen)
    counts = torch.tensor([sum(step in some for some in chosen) for step in range(5)])
    assert (counts - 800).abs().max() < 4 * (2000 * 0.4 * 0.6) ** 0.5
    assert choose_steps(5, 5, torch.Generator().manual_seed(0)) == [0, 1, 2, 3, 4]


def test_no_gradient_through_the_unconditional_half(models):
    """The same output within rounding; its derivative is that of the text half alone, times the scale."""
    config = make_config({"pretrained.model": str(models / "sd")})
    model = stable_diffusion.load(read_settings(config).model, device=CPU, dtype=torch.float32, seed=0, decoder=True)
    torch.manual_seed(0)
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(3, *model.latent_shape), torch.tensor([501, 251, 1])
    text, empty = model.encode(PROMPTS), model.encode([""])

    def gradient(output: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(output.square().sum() / 2, model.trainable().values())])

    whole = model.predict(x, t, text, empty, 3.0)
    half = model.predict(x, t, text, empty, 3.0, unconditional_gradient=False)
    torch.testing.assert_close(half, whole, rtol=1e-4, atol=1e-5)
    with_text = model.predict(x, t, text, empty, 1.0)
    expected = gradient_of_inner(model, 3.0 * with_text, half.detach())
    torch.testing.assert_close(gradient(half), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert (gradient(whole) - expected).norm() > 0.05 * expected.norm()


def gradient_of_inner(model: StableDiffusion, output: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad((output * weight).sum(), model.trainable().values())])


def test_a_deterministic_prefix(models):
    """sigma is stock DDIM's at eta 0 before the window, which is 0, and at eta 1 in it."""
    config = make_config({"pretrained.model": str(models / "sd")})
    model = stable_diffusion.load(read_settings(config).model, device=CPU, dtype=torch.float32, seed=0, decoder=False)
    mixed = with_prefix(model.sampler(4, 1.0), model.sampler(4, 0.0), 3)
    stock = DDIMScheduler.from_config(model.scheduler_config)
    stock.set_timesteps(4)
    deviations = [stock._get_variance(t, t - 250).sqrt() for t in stock.timesteps]
    torch.testing.assert_close(mixed.sigma, torch.stack([torch.tensor(0.0), *deviations[1:]]), rtol=1e-3, atol=0)
    halved = with_prefix(model.sampler(4, 1.0), model.sampler(4, 0.5), 2)
    assert halved.sigma.tolist() == [
        s * f for s, f in zip(model.sampler(4, 1.0).sigma.tolist(), (0.5, 0.5, 1, 1), strict=True)
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.timestep_fraction", 0.0, "train.timestep_fraction is 0.0; it must lie in (0, 1]"),
        ("train.timestep_fraction", 1.5, "train.timestep_fraction is 1.5"),
        ("sample.prefix_eta", -0.5, "sample.prefix_eta is -0.5; it must be -1"),
        ("sample.prefix_eta", 2.0, "sample.prefix_eta is 2.0"),
    ],
)
def test_values_that_cannot_be(overrides, key, value, message):
    with pytest.raises(ValueError) as error:
        make_plan(make_config(overrides | {key: value}))
    assert message in str(error.value)


def test_a_precision_that_the_device_lacks(overrides, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GTX 1080")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ValueError, match=r"bf16, which GTX 1080 lacks\. Use fp16, or no"):
        choose_device(read_settings(make_config(overrides | {"mixed_precision": "bf16"})).compute)


# ---- threads beside the network ----


def test_what_is_done_behind_comes_in_order_and_its_errors_come_through():
    done = []
    with Behind() as writer:
        for n in range(5):
            writer.do(lambda n=n: (time.sleep(0.01), done.append(n)))
        writer.wait()
    assert done == list(range(5))
    with Behind() as writer, pytest.raises(OSError, match="disk full"):
        writer.do(lambda: (_ for _ in ()).throw(OSError("disk full")))
        writer.do(lambda: None)


def test_reading_ahead_is_one_item_ahead():
    """While an item is worked on the next one has been asked for, and no other."""
    asked = []
    for item, doubled in ahead(lambda n: asked.append(n) or 2 * n, range(4)):
        time.sleep(0.02)
        assert doubled == 2 * item
        assert asked == list(range(min(item + 2, 4)))
    assert list(ahead(str, [])) == []


# ---- start-up ----


NOT_IN_TRAINING = [
    "b2diffurl.rewards.clip",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
]


@pytest.mark.parametrize(
    ("verb", "unwanted"),
    [
        pytest.param("sample", ["wandb", "matplotlib", "tensorboard"], marks=pytest.mark.long),
        (
            "select",
            [
                "diffusers",
                "peft",
                "wandb",
                "matplotlib",
                "tensorboard",
                "b2diffurl.phases.train",
                "b2diffurl.phases.trainer",
            ],
        ),
        pytest.param("train", [*NOT_IN_TRAINING, "wandb", "matplotlib", "tensorboard"], marks=pytest.mark.long),
    ],
)
def test_a_script_imports_what_it_uses(workplace, overrides, verb, unwanted):
    """Selecting needs no diffusers, training no scorer, none of them trackers or pictures."""
    forget(workplace, verb)
    given = [f"--config={ROOT}/config/stage_process.py:sd14", *(f"--config.{k}={v}" for k, v in overrides.items())]
    code = f"""
import runpy, sys
sys.argv = ["run_{verb}.py", *{given!r}]
runpy.run_path({str(ROOT / f"run_{verb}.py")!r}, run_name="__main__")
print([name for name in {unwanted!r} if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=120, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert stage(workplace).finished(verb)
    assert ended.stdout.splitlines()[-1] == "[]"


# ---- compiled, and on CUDA ----


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_stage_within_rounding(finished, overrides, tmp_path, monkeypatch):
    """Latents as uncompiled, the first ratio within 1e-4 of 1, and
    nothing is compiled any more once a phase has begun."""
    compiled = torch._dynamo.utils.counters["stats"]
    warm_ups = {"sample": (sample, sample.warm_up), "train": (train, train.warm_up)}
    for verb, (owner, warm_up) in warm_ups.items():
        after = []
        monkeypatch.setattr(
            owner, "warm_up", lambda *a, to=after, do=warm_up: (do(*a), to.append(compiled["unique_graphs"]))
        )
        run_stage(tmp_path, overrides | {"compile": True}, verbs=(verb,) if verb == "sample" else ("select", "train"))
        assert after == [compiled["unique_graphs"]]
    for batch in range(3):
        mine, theirs = (load_file(stage(folder).batch(batch)) for folder in (tmp_path, finished))
        assert (mine["latents"] - theirs["latents"]).abs().max() < 1e-3
    assert manifest(tmp_path, "train")["max_abs_log_ratio_first_update"] < 1e-4


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(new_accelerator, overrides, tmp_path):
    """Same seed, float32 without TF32: latents within 1e-2, the same selection, the LoRA's update within 2 % of its norm,
    the first ratio within 1e-5 of 1."""
    settings = overrides | {"mixed_precision": "no", "allow_tf32": False, "reward.dtype": "float32"}
    folders = {device: tmp_path / device for device in ("cpu", "cuda")}
    for device, folder in folders.items():
        folder.mkdir()
        new_accelerator()
        with mock.patch("torch.cuda.is_available", return_value=device == "cuda"):
            run_stage(folder, settings)
        assert manifest(folder, "train")["device"].startswith(device)
    for batch in range(3):
        mine, theirs = (load_file(stage(folder).batch(batch)) for folder in folders.values())
        difference = (mine["latents"] - theirs["latents"]).abs().max()
        print(f"batch {batch}: latents differ by up to {difference:.1e}")
        assert difference < 1e-2
    chosen = [
        [(row["group"], row["branch"]) for row in files.read_json(stage(folder).selection)] for folder in folders.values()
    ]
    assert chosen[0] == chosen[1]
    assert distance(*folders.values()) < LORA_BOUND
    assert manifest(folders["cuda"], "train")["max_abs_log_ratio_first_update"] < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_ratio_in_half_precision(new_accelerator, overrides, tmp_path, precision):
    run_stage(tmp_path, overrides | {"mixed_precision": precision})
    found = manifest(tmp_path, "train")["max_abs_log_ratio_first_update"]
    print(f"{precision}: max |log-ratio| at the first update {found:.1e}")
    assert found < 1e-2


@pytest.mark.gpu
def test_cuda_memory_does_not_grow_over_stages(new_accelerator, overrides, tmp_path):
    """Three stages of the same S in one process: what is allocated after the third is what was after the second."""
    settings = overrides | {"curriculum": "fixed", "stage_cnt": 3}
    allocated = []
    for index in range(3):
        run_stage(tmp_path, settings, index)
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] <= allocated[1] * 1.01 + 1e5
