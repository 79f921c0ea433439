"""A checkpoint holds the LoRA and AdamW's state, bit for bit."""

import tiny
import torch

from b2diffurl.algorithm.average import Average
from b2diffurl.experiment.checkpoints import load_average, load_optimizer, save_checkpoint, whole_checkpoints
from b2diffurl.experiment.stage import LORA_FILE


def test_checkpoint_round_trip_is_exact(models, tmp_path):
    """LoRA and AdamW's state come back from disk bit for bit, and the next step is the same as without the trip."""
    model = tiny.load_model(models / "sd", seed=0)
    parameters = model.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)

    def step(model, optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.trainable().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    step(model, optimizer, 0)
    state = {"stage": 0, "epoch": 1, "base_model_sha256": model.fingerprint, "scaler": None}
    save_checkpoint(tmp_path / "checkpoint_1", model.adapter_state(), optimizer, list(parameters), state)
    other = tiny.load_model(models / "sd", seed=9)
    other.load_adapter(tmp_path / "checkpoint_1" / LORA_FILE)
    other_optimizer = torch.optim.AdamW(other.trainable().values(), lr=1e-2)
    load_optimizer(tmp_path / "checkpoint_1" / LORA_FILE, other_optimizer, list(other.trainable()))
    for _ in range(2):
        for one, two in zip(parameters.values(), other.trainable().values(), strict=True):
            assert torch.equal(one, two)
            for key, value in optimizer.state[one].items():
                assert torch.equal(value, other_optimizer.state[two][key])
        step(model, optimizer, 1)
        step(other, other_optimizer, 1)


def test_an_average_comes_back_and_what_is_not_ours_stays(models, tmp_path):
    """The average is read from beside its LoRA, with its count. A checkpoint that is made again keeps the notes of the user,
    also those in its folders; and of what is ours each file is whole or the checkpoint is not."""
    model = tiny.load_model(models / "sd", seed=0)
    optimizer = torch.optim.AdamW(model.trainable().values())
    adapter = model.adapter_state()
    average = Average(0.5, {name: torch.rand_like(value) for name, value in adapter.items()}, num_updates=7)
    folder, state = tmp_path / "checkpoint_1", {"base_model_sha256": model.fingerprint}
    notes = ("notes.txt", "ema/notes.txt", "mine/ema/notes.txt")
    for _ in range(2):
        save_checkpoint(folder, adapter, optimizer, list(model.trainable()), state, average)
        for name in notes:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    save_checkpoint(folder, adapter, optimizer, list(model.trainable()), state, average)
    assert [(folder / name).read_text() for name in notes] == list(notes)
    found = load_average(folder / LORA_FILE, 0.9, adapter)
    assert (found.decay, found.num_updates) == (0.9, 7)
    assert list(found.tensors) == list(adapter)
    assert all(torch.equal(found.tensors[name], value) for name, value in average.tensors.items())
    assert load_average(folder / "ema" / LORA_FILE, 0.9, adapter).num_updates == 0
    assert whole_checkpoints([folder]) == [folder]
    for name in (LORA_FILE, "optimizer.safetensors", "state.json", f"ema/{LORA_FILE}", "ema/state.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert whole_checkpoints([folder]) == []
        (folder / name).write_bytes(kept)
