"""Models in their real sizes: what they hold, without weights; and one update of each with random weights.

    python -m pytest -m slow -rP tests/benchmarks/test_full_size.py     on the CPU, in bfloat16

`python -m benchmarks.stage --model sdxl --no-peers` measures a whole stage of them on a GPU.
"""

import json
import math
import shutil

import pytest
import tiny
import torch
from conftest import PROMPTS, ROOT, VERBS, flags, make_config
from safetensors.torch import load_file

from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models import base_sizes, family
from b2diffurl.models.diffusers_files import class_of
from b2diffurl.models.lora import add_lora, lora_parameters
from b2diffurl.reporting import dry_run
from benchmarks.full_size import FULL_SIZE, write_holes
from benchmarks.random_weights import make
from benchmarks.stage import run_process

LONG = pytest.mark.long
RANK = 16
# {name: (the network's parameters, numbers in its file, numbers of a LoRA of rank 1, numbers of a prompt's embedding)}.
# The file of Stable Diffusion 3.5 also holds the positions of 384 x 384 patches, which are no parameters.
NUMBERS = {
    "sdxl": (2_567_463_684, 2_567_463_684, 1_451_520, 77 * 2048 + 1280),
    "sd35_medium": (2_243_171_520, 2_243_171_520 + 384 * 384 * 1536, 746_496, 333 * 4096 + 2048),
    "flux_dev": (11_901_408_320, 11_901_408_320, 1_634_304, 512 * 4096 + 768),
    "klein_4b": (3_875_544_576, 3_875_544_576, 860_160, 512 * 7680),
}
# What the dry run says of each in bfloat16, with a LoRA of rank 16.
MEMORY = {
    "sdxl": "weights 7.1 GB (unet 5.1 GB, vae 335 MB, text_encoder 246 MB, text_encoder_2 1.4 GB), "
    "LoRA and optimizer 372 MB",
    "sd35_medium": "weights 16 GB (transformer 4.9 GB, vae 168 MB, text_encoder 247 MB, text_encoder_2 1.4 GB, "
    "text_encoder_3 9.5 GB), LoRA and optimizer 191 MB",
    "flux_dev": "weights 34 GB (transformer 24 GB, vae 168 MB, text_encoder 246 MB, text_encoder_2 9.5 GB), "
    "LoRA and optimizer 418 MB",
    "klein_4b": "weights 16 GB (transformer 7.8 GB, vae 168 MB, text_encoder 8.0 GB), LoRA and optimizer 220 MB",
}


@pytest.mark.parametrize("name", [name if name == "flux_dev" else pytest.param(name, marks=LONG) for name in FULL_SIZE])
def test_without_weights(tmp_path, name):
    """All parts fit; the published number of weights, the LoRA's size, and what the dry run says of memory."""
    model = FULL_SIZE[name]
    given = {"pretrained.model": str(write_holes(tmp_path / name, model)), "train.lora_rank": RANK}
    settings = read_settings(make_config(given))
    family(settings.model).check(settings.model)
    sizes = base_sizes(settings.model)
    network = model.spec.network
    with torch.device("meta"):
        bare = make(class_of(network, model.spec), model.configs[network])
        num_parameters = sum(weight.numel() for weight in bare.parameters())
        add_lora(bare, family(settings.model).model_class.lora_spec, rank=RANK, seed=0)
    assert (num_parameters, sizes.weights[network], sizes.lora, sizes.embedding) == NUMBERS[name]
    assert sizes.image_px == (1024, 1024)
    assert sum(value.numel() for value in lora_parameters(bare).values()) == RANK * sizes.lora
    assert dry_run.memory_text(settings, sizes, 2).startswith(MEMORY[name])


# One prompt in two branches at 256 px: the second of three guided steps is trained, in one update of two transitions.
ONE_UPDATE = {
    "stage_cnt": 1,
    "mixed_precision": "bf16",
    "pretrained.resolution": 256,
    "pretrained.offload": True,
    "split_step_left": 2,
    "split_step_right": 2,
    "split_stop": 2,
    "split_time": 2,
    "sample.eta": 0.7,
    "sample.num_steps": 3,
    "sample.batch_size": 1,
    "sample.num_batches_per_epoch": 1,
    "sample.micro_batch_size": 1,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 1,
    "train.micro_batch_size": 1,
    "train.num_epochs": 1,
    "train.learning_rate": 1e-3,
    "train.lora_rank": RANK,
}
# The last block of Stable Diffusion 3 drops the text, so nothing comes of the text's queries.
WITHOUT_GRADIENT = {"sdxl": [], "sd35_medium": ["transformer.transformer_blocks.23.attn.add_q_proj.lora_B.weight"]}


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize("name", ["sdxl", "sd35_medium"])
def test_one_update(tmp_path, name):
    """A stage by the scripts: the network and the VAE are whole, with random weights.

    The text encoders have one layer of the real widths, and Stable Diffusion 3.5 has no T5, as its pipeline allows: all
    embeddings have their real shapes. In bfloat16 the first update's ratio is 1 within 1e-3, at equal batch shapes.
    """
    base = tmp_path / "base"
    # not in this process, whose memory would count in its children's peak
    run_process(["-m", "benchmarks.full_size", name, str(base), "--shallow"])
    tiny.clip(tmp_path / "clip")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS[:1]))
    settings = ONE_UPDATE | {"exp_name": name, "pretrained.model": base, "reward.clip.model": tmp_path / "clip"}
    settings |= dict.fromkeys(("prompt_file", "eval.prompt_file"), tmp_path / "prompts.json")
    settings |= dict.fromkeys(("save_path", "log_path"), tmp_path)
    try:
        for verb in VERBS:
            ended = run_process([f"run_{verb}.py", f"--config={ROOT}/config/stage_process.py:sd14", *flags(settings)])
            print(f"{name}: run_{verb}.py {ended.cpu_seconds:.0f} s of CPU time, peak {ended.peak_bytes / 2**30:.1f} GiB")
            assert ended.peak_bytes < 22 * 2**30
    finally:
        shutil.rmtree(base)  # 5 GB, which pytest would keep
    stage = Stage(tmp_path / name, 0)
    (update,) = [row for row in map(json.loads, stage.metrics("train").read_text().splitlines()) if row["event"] == "update"]
    print(
        f"{name}: max |log-ratio| at the first update {update['max_abs_log_ratio']:.1e}, gradient {update['grad_norm']:.1e}"
    )
    assert update["max_abs_log_ratio"] < 1e-3
    assert math.isfinite(update["loss"])
    assert 0 < update["grad_norm"] < math.inf
    state = load_file(stage.checkpoints()[-1] / LORA_FILE)
    assert sum(value.numel() for value in state.values()) == RANK * NUMBERS[name][2]
    assert all(value.isfinite().all() for value in state.values())
    assert [key for key, value in state.items() if not value.any()] == WITHOUT_GRADIENT[name]
