"""Batch sizes move results by rounding only, and memory that does not suffice is lived with."""

import pytest
import torch
from conftest import distance, forget, run_script, run_stage, stage_of
from safetensors.torch import load_file
from torch import Tensor

from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.models.stable_diffusion import StableDiffusion
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes

CPU = torch.device("cpu")
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
SAMPLE_BOUND = 1e-4  # of a latent, by which another batch shape may move it over a few steps
LORA_BOUND = 2e-2  # of a LoRA's update, relative: AdamW's first steps divide by gradients that are near 0


# ---- batch shapes ----


@pytest.mark.parametrize("key", ["sample.micro_batch_size", "sample.decode_batch_size", "train.micro_batch_size"])
def test_batch_sizes_move_results_by_rounding_only(finished, overrides, tmp_path, key):
    """Sampling, decoding and training one by one: latents within 1e-4, pixels within one level, the LoRA's update within
    2 % of its norm."""
    run_stage(tmp_path, overrides | {key: 1})
    for batch in range(3):
        mine, theirs = (load_file(stage_of(folder).batch(batch)) for folder in (tmp_path, finished))
        assert (mine["latents"] - theirs["latents"]).abs().max() < SAMPLE_BOUND
    for n in range(18):
        mine, theirs = (files.read_image(stage_of(folder).image(n)).int() for folder in (tmp_path, finished))
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
    assert stage_of(tmp_path / "halved").manifest("sample")["batch_sizes"] == {
        "sample.micro_batch_size": 2,
        "sample.decode_batch_size": 2,
    }
    assert stage_of(tmp_path / "halved").manifest("train")["batch_sizes"] == {"train.micro_batch_size": 2}
    said = [record.message for record in caplog.records if "out of memory with" in record.message]
    assert len(said) == 3
    assert "out of memory with sample.micro_batch_size=4, going on with 2" in said[0]
    caplog.clear()
    run_stage(tmp_path / "halved", settings, 1)
    assert not [record for record in caplog.records if "out of memory" in record.message]
    sizes = ("train.micro_batch_size", "sample.micro_batch_size", "sample.decode_batch_size")
    run_stage(tmp_path / "configured", settings | dict.fromkeys(sizes, 2))
    for name in ("samples/batch_00002.safetensors", "images/00017.png", f"checkpoints/checkpoint_2/{LORA_FILE}"):
        halved, configured = ((stage_of(tmp_path / which).folder / name).read_bytes() for which in ("halved", "configured"))
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
    assert not stage_of(workplace).finished(verb)


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
