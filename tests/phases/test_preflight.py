"""The dry run finds everything that would keep a run from starting, in the run's words, and writes nothing."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from conftest import ROOT, Ended, experiment, make_config, run_script, snapshot, start
from huggingface_hub.errors import LocalEntryNotFoundError

from b2diffurl.configuration.plan import make_plan
from b2diffurl.experiment import lock
from b2diffurl.experiment.stage import Stage
from b2diffurl.models.known import KNOWN, expected_sizes
from b2diffurl.phases import doubts, preflight
from b2diffurl.reporting import dry_run
from b2diffurl.runtime.processes import started

FAULTS = {
    "a package": ({"train.use_8bit_adam": True}, r"train\.use_8bit_adam is True, which needs bitsandbytes"),
    "an own function": (
        {"reward.name": "my_rewards:redness"},
        r"reward\.name: reward 'my_rewards:redness': No module",
    ),
    "a watched reward": ({"reward.watch": "('nonsense',)"}, r"reward\.watch: unknown reward 'nonsense'"),
    "a judge": ({"eval.judge": "ocr"}, r"eval\.judge, ocr, cannot score the prompts|reward ocr needs the package"),
    "a model": ({"eval.diversity": "('inception',)"}, r"eval\.inception\.model: .* google/vit-base-patch16-224 is not"),
    "two models": (
        {"reward.watch": "('aesthetic',)"},
        r"reward\.aesthetic\.head: .* --config\.reward\.aesthetic\.head=DIR",
    ),
    "a scheduler": ({"eval.deployed.scheduler": "Nonsense"}, r"unknown eval\.deployed\.scheduler 'Nonsense'"),
    "a server": ({"reward.watch": "('http',)"}, r"reward\.http\.url is ''"),
}


def errors_of(ended: Ended) -> list[str]:
    """What was wrong, a sentence each; the last line says what to do."""
    *errors, hint = ended.stderr.splitlines()
    assert all(line.startswith("error: ") for line in errors)
    assert hint.startswith("       Mend ")
    return [line.removeprefix("error: ") for line in errors]


def test_every_fault_is_listed(overrides, tmp_path):
    """Of several, each once and by its setting, after the plan. Nothing is written."""
    names = ["a package", "a watched reward", "a model", "a scheduler"]
    settings = {key: value for name in names for key, value in FAULTS[name][0].items()}
    ended = start(tmp_path, overrides | settings, "--dry_run")
    errors = errors_of(ended)
    assert ended.code == 2
    assert len(errors) == len(names)
    for name in names:
        assert sum(bool(re.search(FAULTS[name][1], error)) for error in errors) == 1
    assert "a stage" in ended.stdout
    assert "ready" not in ended.stdout
    assert not snapshot(tmp_path, log=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"curriculum": "nonsense", "train.lora_rank": 0}, ["curriculum", "train.lora_rank"]),
        ({"split_step_left": 9, "split_step_right": 2, "eval.judge": "file"}, ["split_step_left", "eval.judge"]),
    ],
)
def test_every_value_that_cannot_work_is_listed(overrides, tmp_path, settings, said):
    """Values one by one, and then their combinations."""
    ended = start(tmp_path, overrides | settings, "--dry_run")
    assert (ended.code, ended.stdout) == (2, "")
    assert [error.startswith(one) for error, one in zip(errors_of(ended), said, strict=True)] == [True, True]
    assert not snapshot(tmp_path, log=True)


def test_faults_are_listed_beside_prompts_that_cannot_be_read(overrides, tmp_path):
    """Without prompts there is no plan; both files are named, and what else is wrong."""
    files = {"prompt_file": "no_prompts.txt", "eval.prompt_file": "none_held_out.txt"}
    ended = start(tmp_path, overrides | files | FAULTS["a watched reward"][0], "--dry_run")
    said = ["prompt_file: no prompt file at ", "eval.prompt_file: no prompt file at ", "reward.watch: unknown reward"]
    assert (ended.code, ended.stdout) == (2, "")
    assert [error.startswith(one) for error, one in zip(errors_of(ended), said, strict=True)] == [True] * 3


def test_faults_are_listed_beside_another_configuration(overrides, workplace):
    """As are those of an experiment that was begun with other settings."""
    experiment(workplace)
    changed = overrides | {"seed": 99} | FAULTS["a watched reward"][0]
    errors = errors_of(start(workplace, changed, "--dry_run"))
    assert "belongs to another configuration: seed is 99" in errors[0]
    assert [error.partition(":")[0] for error in errors[1:]] == ["reward.watch"]


@pytest.mark.parametrize("name", FAULTS)
def test_the_run_says_the_same(overrides, tmp_path, name):
    """Whatever the dry run finds, the sample phase refuses in the same words."""
    settings, said = FAULTS[name]
    found = errors_of(start(tmp_path, overrides | settings, "--dry_run"))
    assert re.search(said, found[0])
    refused = run_script(tmp_path, "sample", overrides | settings)
    assert refused.code == 2
    assert refused.stderr.splitlines()[0] == f"error: sample: {found[0]}"


def test_two_models_of_a_reward(overrides, tmp_path):
    """The reward's check names the first one that is missing; the dry run both."""
    errors = errors_of(start(tmp_path, overrides | {"reward.watch": "('aesthetic',)"}, "--dry_run"))
    assert [error.split(": ")[0] for error in errors] == ["reward.aesthetic.head", "reward.aesthetic.clip"]


def test_another_run_at_work(overrides, workplace):
    """It is named as the run would name it; neither the lock nor anything else is touched."""
    root = experiment(workplace)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        holder = {"host": socket.gethostname(), "boot": lock.boot_and_container()}
        holder["processes"] = [[other.pid, started(other.pid)]]
        lock.path_in(root).write_text(json.dumps(holder))
        before = snapshot(workplace, log=True)
        ended = start(workplace, overrides, "--dry_run")
        assert errors_of(ended)[0].startswith(f"model/lora/tiny is being worked on by process {other.pid} on ")
        assert snapshot(workplace, log=True) == before
        other.communicate(b"\n")
    assert start(workplace, overrides, "--dry_run").code == 0  # it has ended


def test_a_module_that_raises(overrides, tmp_path, monkeypatch):
    """When it is imported: one fault among others, and no traceback."""
    (tmp_path / "raising.py").write_text("raise RuntimeError('boom')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "work").mkdir()
    settings = {"reward.name": "raising:reward", "train.use_8bit_adam": True}
    errors = errors_of(start(tmp_path / "work", overrides | settings, "--dry_run"))
    assert any("importing raising raised RuntimeError('boom')" in error for error in errors)
    assert len(errors) == 2


def test_an_experiment_that_cannot_go_on(overrides, workplace):
    """The scores of an earlier stage are gone: the next stage needs them. It is looked at, not stage0."""
    Stage(experiment(workplace), 0).manifest_path("select").unlink()
    for phase in ("sample", "train"):
        Stage(experiment(workplace), 1).manifest_path(phase).unlink()
    errors = errors_of(start(workplace, overrides, "--dry_run"))
    assert any(re.search(r"stage1 needs the scores of .*stage0", error) for error in errors)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(overrides, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    errors = errors_of(start(tmp_path, overrides | {"save_path": str(tmp_path / "closed" / "runs")}, "--dry_run"))
    assert any("nothing can be written here" in error for error in errors)


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """A hub that answers, with every model of two files of 1.5 GB each. Returns the names that were asked for."""
    asked: list[str] = []

    def snapshot_download(name: str, *, local_files_only: bool = False, dry_run: bool = False, **_) -> list:
        if local_files_only:
            raise LocalEntryNotFoundError(name)
        assert dry_run, f"{name} was downloaded"
        asked.append(name)
        names = ("model_index.json", "model.safetensors")
        return [SimpleNamespace(filename=one, file_size=15 * 10**8, will_download=True) for one in names]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("b2diffurl.runtime.hub.reachable", lambda url: True)
    return asked


def test_what_would_be_downloaded(overrides, tmp_path, hub):
    """If the hub answers, models that are not here keep no run from starting: they are named with setting and size."""
    settings = {"pretrained.model": "CompVis/stable-diffusion-v1-4", "reward.clip.model": "somebody/clip"}
    ended = start(tmp_path, overrides | settings, "--dry_run")
    assert (ended.code, ended.stderr) == (0, "")
    line = re.search(r"^downloads +(.*); from the hub, when the run starts$", ended.stdout, re.M)[1]
    wanted = ["reward.clip.model somebody/clip (3.0 GB)", "pretrained.model CompVis/stable-diffusion-v1-4 (3.0 GB)"]
    assert sorted(line.split("; ")) == sorted(wanted)
    assert set(hub) == set(settings.values())
    assert not snapshot(tmp_path, log=True)


# ---- what the user should know ----


@pytest.fixture
def doubts_of(overrides, tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """doubts_of(preset's model, **settings) -> the sentences."""
    monkeypatch.chdir(tmp_path)

    def found(made_for: str, settings: dict) -> list[str]:
        monkeypatch.setattr(doubts, "PRESET", SimpleNamespace(get=lambda: {"pretrained": {"model": made_for}}))
        return doubts.doubts(make_plan(make_config(overrides | settings)))

    return found


def test_a_preset_of_another_family(doubts_of, overrides):
    """Stable Diffusion 1 under SDXL's preset is named; under its own, or one that is unknown, nothing is said."""
    (said,) = doubts_of("stabilityai/stable-diffusion-xl-base-1.0", {})
    assert re.search(r"is made for Stable Diffusion XL, and pretrained\.model, .*/sd, is a Stable Diffusion model", said)
    (said,) = doubts_of(str(ROOT / "model/shapes_flow"), {})  # whose files tell it
    assert "is made for Stable Diffusion 3, and" in said
    for other in ("CompVis/stable-diffusion-v1-4", "somebody/model", overrides["pretrained.model"]):
        assert doubts_of(other, {}) == []


def test_settings_without_effect(doubts_of):
    """Kinds of stochastic steps and the length of T5's text are those of flow matching; a UNet has neither."""
    found = doubts_of("somebody/model", {"sample.sde": "flow", "pretrained.max_sequence_length": 77})
    assert [sentence.split(" and has no effect")[0] for sentence in found] == [
        "sample.sde is flow",
        "pretrained.max_sequence_length is 77",
    ]
    flow = {"pretrained.model": "stabilityai/stable-diffusion-3.5-medium", "sample.sde": "flow"}
    assert not [sentence for sentence in doubts_of("somebody/model", flow) if "no effect" in sentence]


def test_a_disk_with_too_little_room(doubts_of, overrides, monkeypatch):
    """The largest run of the forecast needs a byte more than is free."""
    plan = make_plan(make_config(overrides))
    needed = dry_run.disk_bytes(plan, expected_sizes(plan.settings.model))
    for free, num_doubts in ((needed - 1, 1), (needed, 0)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert len(doubts_of("somebody/model", {})) == num_doubts


def test_a_gpu_with_too_little_memory(doubts_of, monkeypatch):
    """FLUX's 16.9 billion numbers take 34 GB in bfloat16; without the text encoders, which are offloaded, 24."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a small one")
    flux = {"pretrained.model": "black-forest-labs/FLUX.1-dev"}
    for offload, memory, warned in ((False, 33e9, True), (False, 35e9, False), (True, 23e9, True), (True, 25e9, False)):
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, all=memory: SimpleNamespace(total_memory=all))
        found = doubts_of("somebody/model", flux | {"pretrained.offload": offload})
        assert any("and the GPU has" in sentence for sentence in found) == warned


def test_a_tracker_that_is_not_installed(doubts_of, monkeypatch):
    monkeypatch.setattr(doubts, "find_spec", lambda name: None)
    (said,) = doubts_of("somebody/model", {"track_with": ("wandb",)})
    assert said.endswith("pip install wandb")


def test_least_memory(overrides):
    """SD 1.4 with a LoRA of rank 4, in float32 on the CPU: 1.066 e9 numbers; without text encoders if they are offloaded."""
    given = overrides | {"pretrained.model": "CompVis/stable-diffusion-v1-4"}
    unet, vae, text, lora = 859_520_964, 83_653_863, 123_060_480, 797_184
    for offload, weights in ((False, unet + vae + text), (True, unet + vae)):
        settings = make_plan(make_config(given | {"pretrained.offload": offload})).settings
        rank = settings.model.lora.rank
        assert dry_run.memory_bytes(settings, expected_sizes(settings.model)) == 4 * weights + lora // 4 * rank * 16


def test_every_check_is_one_of_the_run(overrides, tmp_path, monkeypatch):
    """What the sample phase checks at its start is the beginning of what the dry run checks."""
    monkeypatch.chdir(tmp_path)
    plan, made = make_plan(make_config(overrides)), []
    for name in ("check_base", "check_optimizer", "check_features", "check_sampler"):
        monkeypatch.setattr(preflight, name, lambda *_, name=name: made.append(name))
    preflight.check_later_phases(plan)
    of_run, made[:] = [*made], []
    assert preflight.inspect(plan).faults == []
    assert made == of_run


def test_known_models_are_the_presets():
    """The models whose sizes are known without files are those of the presets for real models."""
    from conftest import REAL_SIZE, get_config

    assert {get_config(preset).pretrained.model for preset in REAL_SIZE} == set(KNOWN)
