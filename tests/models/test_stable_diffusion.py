"""Stable Diffusion as the library calls it: guidance, its table of steps, the fresh LoRA on it."""

import logging
import re

import pytest
import tiny
import torch
from conftest import PROMPTS, make_config
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from b2diffurl.algorithm.transition import put_together
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import read_settings
from b2diffurl.models import stable_diffusion
from b2diffurl.models.policy import warn_of_cut_prompts
from b2diffurl.models.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")


def test_no_gradient_through_the_unconditional_half(models):
    """The same output within rounding; its derivative is that of the text half alone, times the scale."""
    config = make_config({"pretrained.model": str(models / "sd")})
    model = stable_diffusion.FAMILY.load(read_settings(config).model, device=CPU, dtype=torch.float32, seed=0, decoder=True)
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
    model = stable_diffusion.FAMILY.load(read_settings(config).model, device=CPU, dtype=torch.float32, seed=0, decoder=False)
    whole, nothing = model.sampler(4, 1.0), model.sampler(4, 1.0, [])
    mixed = put_together(model.sampler(4, 0.0), whole, nothing, Window(1, 4))
    stock = DDIMScheduler.from_config(model.scheduler_config)
    stock.set_timesteps(4)
    deviations = [stock._get_variance(t, t - 250).sqrt() for t in stock.timesteps]
    torch.testing.assert_close(mixed.sigma, torch.stack([torch.tensor(0.0), *deviations[1:]]), rtol=1e-3, atol=0)
    halved = put_together(model.sampler(4, 0.5), whole, nothing, Window(2, 4))
    assert halved.sigma.tolist() == [
        s * f for s, f in zip(model.sampler(4, 1.0).sigma.tolist(), (0.5, 0.5, 1, 1), strict=True)
    ]


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_fresh_lora_changes_nothing(models, rank):
    """With B = 0 the network gives the base's own output, to the bit; alpha equals rank, so the scaling is 1; A is
    gaussian of deviation 1 / rank; there is no dropout, and only the attention is trained."""
    model = tiny.load_model(models / "sd", rank=rank)
    base = UNet2DConditionModel.from_pretrained(models / "sd", subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 16, generator=generator)
    with torch.no_grad():
        assert torch.equal(model.network(x, 500, text).sample, base(x, 500, text).sample)
    lora = model.unet.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (rank, rank, 0)
    assert {module.scaling["default"] for module in model.unet.modules() if hasattr(module, "lora_A")} == {1.0}
    names = model.trainable().keys()
    assert {re.search(r"\.(to_\w+(?:\.0)?)\.lora_[AB]\.", name)[1] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(names) == 2 * sum(name.split(".")[-1] in ("to_q", "to_k", "to_v") or name.endswith("to_out.0")
                                 for name, _ in base.named_modules())  # fmt: skip
    gaussian = torch.cat([value.flatten() for name, value in model.trainable().items() if "lora_A" in name])
    assert abs(gaussian.std().item() * rank - 1) < 0.2
    assert {name for name, value in model.unet.named_parameters() if value.requires_grad} == set(names)


def test_a_fresh_lora_follows_from_the_seed(models):
    """The same seed gives the same initial A, another seed another, and torch's global generator is left alone."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = tiny.load_model(models / "sd", seed=1).adapter_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    same, other = (tiny.load_model(models / "sd", seed=seed).adapter_state() for seed in (1, 2))
    for name, value in one.items():
        assert torch.equal(value, same[name])
        assert "lora_B" in name or not torch.equal(value, other[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainable_parameters_are_float32_in_every_precision(models, dtype):
    """A half-precision base carries a float32 LoRA, and it is saved so."""
    model = tiny.load_model(models / "sd", dtype=dtype)
    assert {value.dtype for value in model.trainable().values()} == {torch.float32}
    assert {value.dtype for value in model.adapter_state().values()} == {torch.float32}
    assert {value.dtype for name, value in model.unet.named_parameters() if ".lora_" not in name} == {dtype}


def test_long_prompts_are_counted_in_one_call_of_the_tokenizer(models, caplog):
    """As many as a call for each says, whatever the blanks and letters. Of those cut the log names five, and the number of
    the others."""
    config = make_config({"pretrained.model": str(models / "sd")})
    model = stable_diffusion.FAMILY.load(read_settings(config).model, device=CPU, dtype=torch.float32, seed=0, decoder=True)
    tokenizer, asked = model.tokenizer, []
    longest = tokenizer.model_max_length
    prompts = [
        text * n
        for n in (1, 20, 74, 75, 76, 77, 90)
        for text in ("b", "a ", "ü", "日", "İ", "ﷺ", "\u0958", "it's 7,", "\t\u3000é")
    ]
    expected = [max(0, len(tokenizer(prompt).input_ids) - longest) for prompt in prompts]
    assert len({*expected}) > 5
    model.tokenizer = lambda some, **options: asked.append(some) or tokenizer(some, **options)
    model.tokenizer.model_max_length = longest
    assert model.num_tokens_cut(prompts) == expected
    assert len(asked) == 1
    assert model.num_tokens_cut(["a cat"] * 1000) == [0] * 1000
    assert len(asked[1]) == 3
    logger = logging.getLogger("b2diffurl")
    logger.propagate = True
    try:
        warn_of_cut_prompts(model, [(f"line {n}", "b" * (70 + n)) for n in range(20)])
    finally:
        logger.propagate = False
    said = [*dict.fromkeys(record.getMessage() for record in caplog.records)]  # some are seen by two loggers
    assert [line.partition(":")[0] for line in said[:-1]] == [f"line {n}" for n in range(6, 11)]
    assert said[-1] == "prompts that are cut off, too: 9 more"
