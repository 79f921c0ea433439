"""The page for those who come from TRL's DDPOTrainer: its example runs, and its tables lack nothing."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT, process_variables
from ml_collections import ConfigDict

import b2diffurl
from b2diffurl.configuration.keys import KEYS

PAGE = (ROOT / "docs" / "from_trl.md").read_text()
# Every field of the last DDPOConfig, and the parameters of the trainer and of the pipeline.
OF_TRL = re.findall(
    r"\w+",
    """
    exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir num_epochs
    save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from sample_num_steps sample_eta sample_guidance_scale
    sample_batch_size sample_num_batches_per_epoch train_batch_size train_use_8bit_adam train_learning_rate
    train_adam_beta1 train_adam_beta2 train_adam_weight_decay train_adam_epsilon train_gradient_accumulation_steps
    train_max_grad_norm train_num_inner_epochs train_cfg train_adv_clip_max train_clip_range train_timestep_fraction
    per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count
    async_reward_computation max_workers negative_prompts push_to_hub
    reward_function prompt_function sd_pipeline image_samples_hook
    pretrained_model_name pretrained_model_revision use_lora
""",
)
# The keys of ddpo-pytorch that have no namesake there.
OF_DDPO_PYTORCH = ["prompt_fn", "prompt_fn_kwargs", "reward_fn", "pretrained.model", "train.cfg"]
REAL = {
    "CompVis/stable-diffusion-v1-4": "sd",
    "trl-lib/ddpo-aesthetic-predictor": "head",
    "openai/clip-vit-large-patch14": "clip",
}
# The example's settings that make it long, and what they are in the test.
SHORTER = {"50": "4", "200": "1"}


def rows() -> list[list[str]]:
    """The cells of each row of the page's tables."""
    return [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]


def block(language: str) -> str:
    """The page's only block of code in a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def shortened(models, tmp_path_factory):
    """shortened(code) -> the same for models on this machine, and with fewer steps and epochs. Each change must be made."""
    head = tmp_path_factory.mktemp("aesthetic") / "head"
    width = json.loads((models / "clip" / "config.json").read_text())["projection_dim"]
    tiny.aesthetic_head(head, width)
    places = {name: str(head if one == "head" else models / one) for name, one in REAL.items()}

    def shorten(code: str) -> str:
        for name, place in places.items():
            assert name in code
            code = code.replace(name, place)
        for long, short in SHORTER.items():
            code, count = re.subn(rf"(?<=[= ]){long}\b", short, code)
            assert count
        return code

    return shorten


def test_every_argument_of_theirs_is_in_the_page():
    named = {name for cells in rows() for name in re.findall(r"`([\w.]+)`", cells[0])}
    assert not {*OF_TRL, *OF_DDPO_PYTORCH} - named


def test_every_key_of_ours_exists():
    """Where a row of the tables or the example names one."""
    variables, keys = process_variables(), {*KEYS, "train.eps"}
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    for cells in rows():
        for name in re.findall(r"`([\w.]+)`", cells[1]) if len(cells) > 2 else ():
            assert name in keys | variables or not (name.split(".")[0] in sections or name[0].isupper()), name
    for name in re.findall(r"(\w+)=", "\n".join(re.findall(r"^export (.*?)(?:#.*)?$", block("bash"), re.MULTILINE))):
        assert name in variables
    for name in re.findall(r"--config\.([\w.]+)=", block("bash")):
        assert name in keys
    for name in re.findall(r'"([a-z]\w*(?:\.\w+)+|split_\w+)":', block("python")):
        assert name in keys


def assert_plain_ddpo(folder) -> None:
    """One epoch of 24 images of 6 draws, all of them trained on in all steps, 3 an update; then judged."""
    root = folder / "ddpo_aesthetic"
    config = ConfigDict(json.loads((root / "config.json").read_text())["config"])
    assert (config.train.objective, config.sampling, config.train.eps) == ("ddpo", "independent", 1e-4)
    prompts = json.loads((root / "stage0" / "prompts.json").read_text())
    assert len(prompts) == 24 and all(len({*prompts[n : n + 4]}) == 1 for n in range(0, 24, 4))
    selected = json.loads((root / "stage0" / "selection.json").read_text())
    assert len(selected) == 24
    metrics = [json.loads(line) for line in (root / "stage0" / "metrics" / "train.jsonl").read_text().splitlines()]
    assert sum(one["event"] == "update" for one in metrics) == 8
    assert {json.loads(line)["checkpoint"] for line in (root / "eval.jsonl").read_text().splitlines()} == {"base", "stage0"}


@pytest.mark.long
def test_the_example_runs_in_the_shell(shortened, tmp_path):
    code = shortened(block("bash")).replace("b2diffurl run", f"bash {ROOT}/run_process.sh --config.eval.num_images=4")
    ended = subprocess.run(
        ["bash", "-euc", f"{code.rstrip()} --config.save_path=runs --config.log_path=logs --config.num_threads=1"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_plain_ddpo(tmp_path / "runs")


@pytest.mark.long
def test_the_example_runs_in_python(shortened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = shortened(block("python")).replace("**models", '**models, quiet=True, **{"eval.num_images": 4, "num_threads": 1}')
    exec(compile(code, "the example", "exec"), {"b2diffurl": b2diffurl})
    assert_plain_ddpo(tmp_path / "model" / "lora")
