"""Each family of models through run_process.sh, from a folder on disk to a judged LoRA that stock diffusers loads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import run_shell
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.runtime import files

MAKE: dict[str, Callable[[Path], Path]] = {
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "sd3_without_t5": lambda root: tiny.sd3(root, t5=False),
    "flux": tiny.flux,
    "flux2": tiny.flux2,
}


@pytest.mark.long
@pytest.mark.parametrize(("name", "objective"), [*((name, "ddpo") for name in MAKE), ("sdxl", "nft"), ("sd3", "nft")])
def test_two_stages_by_the_shell_script(overrides, tmp_path, name, objective):
    """Nobody names the family. Base and final are judged by training's sampler and by the family's own scheduler."""
    base = tmp_path / "base"
    MAKE[name](base)
    settings = {"pretrained.model": str(base), "pretrained.resolution": 64, "split_step_left": 3, "split_step_right": 4}
    settings |= {"split_stop": 3, "train.num_epochs": 1, "train.objective": objective, "log_path": str(tmp_path)}
    variables = {"Preset": "sd14", "ExpName": "tiny", "SavePath": str(tmp_path), "StageCnt": "2"}
    rest = {key: value for key, value in (overrides | settings).items() if key not in ("stage_cnt", "exp_name")}
    run_shell(tmp_path, rest, variables)
    root = tmp_path / "tiny"
    assert files.read_json(root / "config.json")["config"]["pretrained"]["family"] == name.split("_")[0]
    judged = {(row["checkpoint"], row["sampler"]) for row in files.read_json_lines(root / "eval.jsonl")}
    assert judged == {(which, sampler) for which in ("base", "stage1") for sampler in ("training", "deployed")}
    assert (root / "report.html").is_file()
    lora = Stage(root, 1).checkpoints()[-1] / LORA_FILE
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_without_t5" else {}
    stock = DiffusionPipeline.from_pretrained(base, **absent)
    stock.load_lora_weights(lora.parent)
    assert any(value.abs().sum() > 0 for key, value in load_file(lora).items() if "lora_B" in key)
    assert stock.get_list_adapters()
