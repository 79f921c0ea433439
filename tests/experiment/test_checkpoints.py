"""A checkpoint holds the LoRA and AdamW's state, bit for bit."""

import tiny
import torch

from b2diffurl.experiment.checkpoints import load_optimizer, save_checkpoint
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
