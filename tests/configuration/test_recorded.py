"""What an experiment records of its configuration, and what of it may change."""

import contextlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import conftest
import pytest
import tiny
from accelerate import Accelerator
from conftest import PROMPTS, ROOT, experiment, flags, get_config, make_config, plan, refuse, run_script, run_stage, snapshot
from safetensors.torch import load_file, save_file

from b2diffurl.configuration.command_line import named_preset
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.recorded import record_experiment, setting_changes, take_recorded
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import read_settings
from b2diffurl.models import policy
from b2diffurl.runtime import files
from b2diffurl.runtime.files import read_json, write_record

# ---- what differs from the preset ----


OWN_FILE = """
import runpy

def get_config(preset):
    open("runs", "a").write(preset)
    config = runpy.run_path("{root}/config/stage_process.py")["get_config"]("sd14")
    config.preset = preset
    config.seed = 5
    config.reward.weights = {{"jpeg_compressibility": 2.0}}
    return config
"""


def test_an_experiment_records_how_it_differs_from_the_preset_of_the_file_it_was_begun_with(tmp_path, overrides):
    """Each setting that the command line changed, with the preset's value, and nothing that the file itself has otherwise;
    for that the file is run no second time."""
    mixture = {"jpeg_compressibility": 1.0}
    settings = overrides | {"reward.weights": mixture, "eval.diversity": "('layout',)", "train.eps": 0.2}
    (tmp_path / "own.py").write_text(OWN_FILE.format(root=ROOT))
    argv = ["run_sample.py", f"--config={tmp_path}/own.py:mine", *flags(settings), "--config.sample.eta=1.0"]
    ended = conftest.call(tmp_path, argv, lambda: runpy.run_path(str(ROOT / argv[0]), run_name="__main__"))
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "runs").read_text() == "mine"
    found = json.loads((tmp_path / "model" / "lora" / "tiny" / "config.json").read_text())["differs_from_preset"]
    preset = flatten(get_config("sd14").to_dict()) | {"reward.weights": {"jpeg_compressibility": 2.0}}
    given = settings | {"eval.diversity": ["layout"]}
    expected = {key: [value, preset[key]] for key, value in given.items() if value != preset[key]}
    assert found == json.loads(json.dumps(expected))
    assert found["reward.weights"] == [mixture, {"jpeg_compressibility": 2.0}]


def test_what_is_recorded_of_the_preset_holds_no_secret(overrides, tmp_path):
    """A preset's password is refused even where the command line replaces it, for the record has both."""
    preset = get_config("sd14")
    preset.reward.http.url = "http://me:secret@localhost:1/"
    said = r"reward\.http\.url of the preset has a user name or a password"
    with named_preset(preset.to_dict()), pytest.raises(ValueError, match=said):
        make_plan(make_config(overrides, save_path=str(tmp_path)))


# ---- older names ----


def test_an_experiment_recorded_by_older_names_goes_on_and_keeps_its_values(begin):
    """config.json with the section that an earlier version had: the same values are no change, another one is named."""
    folder, settings = begin({})
    path = experiment(folder) / "config.json"
    record = read_json(path)
    section = record["config"].pop("selection")
    record["config"]["eval"] |= {"selection": section.pop("images")} | section
    write_record(path, record)
    plan(folder, settings)
    plan(folder, settings | {"eval.pos_threshold": settings.get("selection.pos_threshold", 0.5)})
    for name in ("selection.pos_threshold", "eval.pos_threshold"):
        with pytest.raises(ValueError, match=r"another configuration: selection.pos_threshold is 0.75, was 0.5\. Go on"):
            plan(folder, settings | {name: 0.75})
    config = make_config({"exp_name": "tiny", "selection.images": "all", "selection.neg_threshold": -0.75})
    with contextlib.chdir(folder):
        take_recorded(config, {"selection.neg_threshold"})
    assert (config.selection.images, config.selection.neg_threshold) == ("pairs", -0.75)


def test_a_new_experiment_records_one_name(begin):
    """Given by the older one; and no such stage's settings are by two names."""
    folder, _ = begin({"eval.pos_threshold": 0.75})
    config = read_json(experiment(folder) / "config.json")["config"]
    assert config["selection"]["pos_threshold"] == 0.75
    assert config["eval"].keys() & {"pos_threshold", "neg_threshold", "history_cnt", "advantage", "selection"} == set()


def test_stages_of_two_versions_are_compared_by_todays_names():
    recorded = {0: {"eval.pos_threshold": 0.5, "eval.advantage": "prompt"}, 1: {"selection.pos_threshold": 0.75}}
    recorded[1]["selection.advantage"] = "prompt"
    said = [{"stage": 1, "change": "selection.pos_threshold is 0.75, was 0.5"}]
    assert setting_changes(recorded, {}) == said


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
    "keep.eval_images": 2,
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
        ("split_stop", 4),
        ("split_time", 4),
        ("split_times", (3,)),
        ("prompt", "another prompt"),
        ("prompt_random_choose", 0),
        ("mixed_precision", "no"),
        ("pretrained.resolution", 128),
        ("sample.num_steps", 5),
        ("sample.eta", 0.5),
        ("sample.suffix_eta", 0.0),
        ("sample.guidance_scale", 3.0),
        ("sample.batch_size", 3),
        ("sample.num_batches_per_epoch", 4),
        ("reward.name", "shapes"),
        ("selection.history_cnt", 2),
        ("selection.advantage", "group"),
        ("selection.images", "all"),
        ("selection.pos_threshold", 0.6),
        ("selection.neg_threshold", -0.6),
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
    value, was = (list(one) if isinstance(one, tuple) else one for one in (value, was))  # as config.json has them
    assert f"{key} is {value!r}, was {was!r}" in str(error.value) or key == "prompt"
    assert "another configuration" in str(error.value)


def test_an_experiment_begun_before_a_key_was_there_goes_on_as_it_was(workplace, overrides):
    """Without the switches in its config.json a run is what was done before there were any: branches, pairs, progressive up
    to the image, and no other; options of objectives that there were not may have any value."""
    path = experiment(workplace) / "config.json"
    recorded = files.read_json(path)
    for section, key in (
        ("", "curriculum"), ("", "sampling"), ("", "split_stop"), ("sample", "suffix_eta"), ("sample", "suffix_steps"),
        ("selection", "images"), ("train", "kl_weight"),
    ):  # fmt: skip
        del (recorded["config"][section] if section else recorded["config"])[key]
    files.write_record(path, recorded)
    assert plan(workplace, overrides, **{"train.kl_weight": 0.7}).window.num_steps == 2
    for key, value in (
        ("curriculum", "fixed"), ("sampling", "independent"), ("selection.images", "all"), ("split_stop", 4),
        ("sample.suffix_eta", 0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{key} is {value!r}, was"):
            plan(workplace, overrides, **{key: value})


def test_a_preset_may_change_under_an_experiment(finished, overrides):
    """What is recorded of it is for people, and makes no other experiment."""
    with named_preset(get_config("b2").to_dict()):
        assert plan(finished, overrides).record.changes == ()


def test_a_fixed_curriculum_needs_no_upper_end(tmp_path, overrides):
    """S may be anything in 1..T, whatever split_step_right is."""
    for steps in (1, 4):
        settings = {"curriculum": "fixed", "split_step_left": steps, "split_step_right": 3, "exp_name": f"fixed{steps}"}
        assert plan(tmp_path, overrides, **settings).window.num_steps == steps
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


def test_a_change_is_refused_unless_it_is_allowed(workplace, overrides):
    """The error lists what differs; allowed, the change counts from the next stage's beginning and is recorded once."""
    changed = overrides | {"train.learning_rate": 1e-3, "sample.guidance_scale": 3.0, "stage_cnt": 3, "run_name": "stage2"}
    before = snapshot(workplace)
    ended = run_script(workplace, "sample", changed)
    assert ended.code == 2
    assert "sample.guidance_scale is 3.0, was 5.0; train.learning_rate is 0.001, was 0.01" in ended.stderr
    assert "--config.allow_config_change" in ended.stderr
    assert snapshot(workplace) == before
    allowed = changed | {"allow_config_change": True}
    for verb in ("sample", "select", "train"):
        assert run_script(workplace, verb, allowed).code == 0
    record = json.loads((experiment(workplace) / "config.json").read_text())
    assert record["config"]["train"]["learning_rate"] == 1e-3
    assert [change["stage"] for change in record["changed"]] == [2]
    assert run_script(workplace, "train", changed).code == 0  # it is the experiment's configuration now
    assert run_script(workplace, "train", overrides | {"run_name": "stage0"}).code == 2


def test_no_change_in_the_middle_of_a_stage(overrides, tmp_path):
    run_stage(tmp_path, overrides, verbs=["sample"])
    before = snapshot(tmp_path)
    ended = run_script(tmp_path, "select", overrides | {"selection.pos_threshold": 1.0, "allow_config_change": True})
    assert ended.code == 2
    assert "stage0 is half done with another configuration: selection.pos_threshold is 1.0, was 0.5" in ended.stderr
    assert snapshot(tmp_path) == before


def test_a_reward_that_is_given_stands_alone(workplace, overrides):
    """A name on the command line is not outdone by a recorded mixture, nor a prompt file by a recorded prompt; without
    either both are as recorded. What the record lacks, and what earlier versions called otherwise, is understood."""
    path = experiment(workplace) / "config.json"
    record = read_json(path)
    mixture = {"clip": 1.0, "jpeg_compressibility": 0.5}
    record["config"]["reward"] |= {"weights": mixture, "combine": "advantages", "standardise": True, "model": "another/clip"}
    record["config"]["prompt"] = "a red circle"
    del record["config"]["reward"]["clip"], record["config"]["reward"]["dtype"], record["config"]["sample"]["eta"]
    write_record(path, record)

    def begun(*given: str) -> dict:
        config = make_config({"exp_name": "tiny", "reward.name": "aesthetic", "sample.eta": 0.5, "eval.seed": 7})
        with contextlib.chdir(workplace):
            take_recorded(config, given)
        check(config)
        return flatten(config.to_dict())

    alone = begun("reward.name", "prompt_file")
    assert (alone["reward.name"], alone["reward.weights"], alone["reward.standardise"]) == ("aesthetic", None, False)
    assert (alone["reward.combine"], begun("reward.weights")["reward.combine"]) == ("sum", "sum")
    assert alone["prompt"] == ""
    assert begun("reward.weights")["reward.standardise"] is False
    assert begun("reward.standardise")["reward.weights"] == mixture
    recorded = begun("eval.seed")
    assert recorded["reward.weights"] == mixture
    assert (recorded["reward.combine"], recorded["reward.standardise"]) == ("advantages", True)
    assert recorded["prompt"] == "a red circle"
    for found in (alone, recorded):
        assert (found["reward.clip.model"], found["reward.dtype"]) == ("another/clip", "auto")
        assert (found["sample.num_steps"], found["sample.eta"], found["eval.seed"]) == (4, 0.5, 7)


def test_a_recorded_tree_is_taken_as_it_was(workplace, caplog):
    """Lists of a file are tuples again; what does not differ is not taken, also where the record is older than the key."""
    path = experiment(workplace) / "config.json"
    record, config = read_json(path), make_config({"exp_name": "tiny"})
    for recorded, expected in ({"split_times": [2, 3], "split_after": [1]}, ((2, 3), (1,))), ({}, ((), ())):
        for key in ("split_times", "split_after"):
            record["config"].pop(key, None)
        record["config"] |= recorded
        write_record(path, record)
        with contextlib.chdir(workplace):
            take_recorded(config, ())
        assert (config.split_times, config.split_after) == expected
        check(config)
    caplog.clear()
    with contextlib.chdir(workplace):
        take_recorded(config, ())
    assert not caplog.text


def exchange(base: Path, part: str) -> None:
    """Put another thing into a model directory in a part's place, of the same form."""
    if part == "tokenizer":
        path = base / part / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["vocab"] |= {"a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
        path.write_text(json.dumps(content))
    elif part == "scheduler":
        tiny.write_scheduler(base, tiny.V1_4_SCHEDULER | {"beta_end": 0.011})
    elif part == "config":
        path = base / "vae" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.2}))
    else:
        [weights] = (base / part).glob("*.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)


@pytest.fixture(scope="module")
def begun_on_a_copy(overrides, models, tmp_path_factory) -> Path:
    """A folder with a base model of its own, `base`, and an experiment whose stage 0 is finished and judged."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(models / "sd", folder / "base")
    settings = overrides | {"pretrained.model": "base"}
    run_stage(folder, settings)
    assert run_script(folder, "eval", settings, "--sampler=training").code == 0
    return folder


@pytest.mark.parametrize(
    "part",
    [
        "vae",
        *(pytest.param(part, marks=pytest.mark.long) for part in ("text_encoder", "tokenizer", "config")),
        "scheduler",
        "unet",
    ],
)
def test_a_base_model_with_an_exchanged_part_is_refused_by_every_phase(part, begun_on_a_copy, overrides, tmp_path):
    """Between two stages, in the middle of one, and before judging; the part is named. Put back, all goes on."""
    folder = shutil.copytree(begun_on_a_copy, tmp_path / "copy")
    settings, stage1 = overrides | {"pretrained.model": "base"}, {"run_name": "stage1"}
    whole = shutil.copytree(folder / "base", tmp_path / "whole")
    exchange(folder / "base", part)
    named = "vae" if part == "config" else part
    refuse(
        folder, "sample", settings | stage1, f"the {named} of the base model is another" if part != "unet" else "base model"
    )
    refuse(folder, "eval", settings, named if part != "unet" else "base model", arguments=("--sampler=training",))
    shutil.rmtree(folder / "base")
    shutil.copytree(whole, folder / "base")
    for verb in ("sample", "select"):
        assert run_script(folder, verb, settings | stage1).code == 0
    exchange(folder / "base", part)
    refuse(folder, "train", settings | stage1, f"the {named} of the base model is another")


def test_a_base_model_that_moved_is_the_same(begun_on_a_copy, overrides, tmp_path):
    """Neither its place counts nor what programs write about themselves."""
    folder = shutil.copytree(begun_on_a_copy, tmp_path / "copy")
    (folder / "base").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "x", "transformers_version": "9"}))
    moved = overrides | {"pretrained.model": str(tmp_path / "moved"), "run_name": "stage1"}
    assert run_script(folder, "sample", moved).code == 0
    judged = run_script(folder, "eval", moved, "--sampler=training", "--checkpoint=base")
    assert "images" not in judged.stdout.split("eval base on test prompts")[0]
    assert len(list((experiment(folder) / "eval").glob("base_*"))) == 1  # which was read back


def test_a_stage_that_an_older_version_sampled_is_not_trained_with_another_scheduler(begun_on_a_copy, overrides, tmp_path):
    """Its config.json knows no parts of the base model, but sample.json has the scheduler's settings."""
    folder = shutil.copytree(begun_on_a_copy, tmp_path / "copy")
    settings = overrides | {"pretrained.model": "base", "run_name": "stage1"}
    for verb in ("sample", "select"):
        assert run_script(folder, verb, settings).code == 0
    record = read_json(experiment(folder) / "config.json")
    del record["base_model"]
    write_record(experiment(folder) / "config.json", record)
    exchange(folder / "base", "scheduler")
    refuse(folder, "train", settings, "sampled with another scheduler .beta_end was 0.012, is 0.011")


def test_a_model_that_is_kept_is_that_of_the_files(models, overrides, tmp_path, monkeypatch):
    """Resident=1 keeps models; one whose decoder is exchanged on disk is loaded anew."""
    base = shutil.copytree(models / "sd", tmp_path / "base")
    monkeypatch.setattr(policy, "_kept", {})
    model = read_settings(make_config(overrides | {"pretrained.model": str(base)})).model

    def load():
        return policy.load_policy(model, Accelerator(cpu=True), None, seed=0, compile=False)

    first = load()
    assert load() is first
    exchange(base, "vae")
    assert load() is not first


def test_an_allowed_exchange_is_recorded_once(begun_on_a_copy, overrides, tmp_path):
    folder = shutil.copytree(begun_on_a_copy, tmp_path / "copy")
    settings = overrides | {"pretrained.model": "base", "run_name": "stage1"}
    exchange(folder / "base", "vae")
    assert run_script(folder, "sample", settings | {"allow_config_change": True}).code == 0
    for verb in ("select", "train"):
        assert run_script(folder, verb, settings).code == 0
    record = read_json(experiment(folder) / "config.json")
    assert record["changed"] == [{"stage": 1, "changes": ["the vae of the base model is another"]}]


def test_a_reward_whose_code_or_a_helper_beside_it_changed_is_refused(overrides, tmp_path, module, monkeypatch):
    """Between two stages, before its scores are mixed with the old ones."""
    helper = f"{module('')}_helper"
    (tmp_path / f"{helper}.py").write_text("FACTOR = 1\n")
    name = module(
        f"def mean(images, prompts):\n    from {helper} import FACTOR\n    return FACTOR * images.float().mean((1, 2, 3))\n"
    )
    folder = tmp_path / "work"
    folder.mkdir()
    settings = overrides | {"reward.name": f"{name}:mean"}
    run_stage(folder, settings)
    (tmp_path / f"{helper}.py").write_text("FACTOR = -1\n")
    said = f"the model or code of reward {name}:mean is another than that of .*stage0"
    refuse(folder, "sample", settings | {"run_name": "stage1"}, said)
    allowed = settings | {"run_name": "stage1", "allow_config_change": True}
    for verb in ("sample", "select"):
        assert run_script(folder, verb, allowed).code == 0
    for verb in ("train", "sample"):  # from now on it is the experiment's reward
        assert run_script(folder, verb, settings | {"run_name": "stage2" if verb == "sample" else "stage1"}).code == 0
    monkeypatch.delitem(sys.modules, helper, raising=False)


def test_of_two_runs_that_begin_at_once_the_second_is_refused(overrides, tmp_path, monkeypatch):
    """Both have planned before either has written config.json; the record is compared again when it is written."""
    monkeypatch.chdir(tmp_path)
    first, second = (make_plan(make_config(overrides, seed=seed)) for seed in (1, 2))
    record_experiment(first.record, 1)
    with pytest.raises(ValueError, match="seed is 2, was 1"):
        record_experiment(second.record, 1)
    record_experiment(first.record, 1)  # which is no change
    assert files.read_json(experiment(tmp_path) / "config.json")["config"]["seed"] == 1
