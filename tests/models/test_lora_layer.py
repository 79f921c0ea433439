"""The LoRA's layers: what they compute is what peft's compute."""

import peft
import pytest
import tiny
import torch
from torch import nn

from b2diffurl.models.lora_layer import LoraLinear


class One(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.to_q = nn.Linear(width, width)


def layers(width: int, dtype: torch.dtype = torch.float32) -> tuple[LoraLinear, nn.Module]:
    """Our layer and peft's own with the same weights, rank 4."""
    torch.manual_seed(0)
    base, made = One(width).to(dtype).requires_grad_(False), []
    for own in (True, False):
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
        if own:
            config._register_custom_module({nn.Linear: LoraLinear})
        torch.manual_seed(1)
        one = One(width).to(dtype)
        one.load_state_dict(base.state_dict())
        made.append(peft.inject_adapter_in_model(config, one.requires_grad_(False)).to_q)
    for name, parameter in made[0].named_parameters():
        if ".lora_" in f".{name}":
            parameter.data = parameter.data.float()
            dict(made[1].named_parameters())[name].data = parameter.data.clone()
    return tuple(made)


@pytest.mark.parametrize(("width", "dtype"), [(16, torch.float32), (64, torch.float32), (16, torch.bfloat16)])
def test_it_is_the_layer_of_peft(width, dtype):
    """To the bit; in a narrow layer in float32, whose B A is added to W, up to rounding. Gradients, too."""
    ours, theirs = layers(width, dtype)
    assert type(ours) is LoraLinear
    assert type(theirs) is not LoraLinear
    found = []
    for layer in (ours, theirs):
        x = (
            torch.randn(8, 5, width, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
            .to(dtype)
            .requires_grad_()
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = layer(x)
        output.float().square().sum().backward()
        found.append([output, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    added = dtype == torch.float32 and width < 24  # 16 * 16 < 3 * 4 * (16 + 16)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4 if added else 0, atol=1e-4 if added else 0)
    ours.enable_adapters(False)
    assert torch.equal(ours(x), ours.base_layer(x))


def test_a_twin_shares_all_but_gradients_and_what_is_in_place(models):
    """The base's tensors are the same, the LoRA's are the same memory, and neither sees the other's `with_lora`."""
    model = tiny.load_model(models / "sd")
    twin = model.twin()
    for (name, one), other in zip(model.bare.named_parameters(), twin.bare.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
        assert (one is other) == (".lora_" not in name)
    assert twin.bare is twin.network is not model.bare
    with torch.no_grad():
        next(iter(model.trainable().values())).add_(1.0)
    assert all(torch.equal(twin.trainable()[name], value) for name, value in model.trainable().items())
    x, nothing = torch.randn(1, *model.latent_shape), model.unconditional()

    def output(one) -> torch.Tensor:
        return one.predict(x, torch.tensor(501), nothing, nothing, 1.0)

    for value in model.trainable().values():
        value.data.normal_(generator=torch.Generator().manual_seed(0))
    tuned = output(model).detach()
    other_lora = {name: torch.zeros_like(value) for name, value in model.trainable().items()}
    for change in (twin.with_lora(other_lora), twin.base_policy()):
        with change:
            assert not torch.equal(output(twin), tuned)
            assert torch.equal(output(model), tuned)
        assert torch.equal(output(twin), tuned)
    output(twin).sum().backward()
    assert all(value.grad is None for value in model.trainable().values())
    assert all(value.grad is not None for value in twin.trainable().values())
