"""The autoencoder: 64 x 64 pictures to latents [4, 8, 8] and back."""

import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from b2diffurl.shapes.dataset import to_uint8, to_unit, training_pictures
from b2diffurl.shapes.training import fit

log = logging.getLogger(__name__)

NUM_STEPS, BATCH, PEAK_LR, SEED = 3000, 32, 2e-3, 11
L1_WEIGHT, KL_WEIGHT = 0.1, 1e-4
ENCODE_BATCH = 100


def new_vae() -> AutoencoderKL:
    """0.25 M parameters; few channels at full size, where the time goes."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    return vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def train_vae(base_dir: Path) -> None:
    """Train and save `vae/` with the scaling factor that gives the latents unit standard deviation."""
    images = training_pictures()
    vae = new_vae()

    def loss_at(step: int, noise: torch.Generator) -> torch.Tensor:
        x = to_unit(images[torch.randint(len(images), (BATCH,), generator=noise)])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(noise)).sample - x
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        return error.square().mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl

    vae = fit("vae", vae, loss_at, num_steps=NUM_STEPS, peak_lr=PEAK_LR, seed=SEED)
    latents = encode(vae, images[:2000])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(base_dir / "vae")
    log.info("vae: latent mean %.3f, std %.3f", latents.mean(), latents.std())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Mean latents of uint8 images, unscaled, float [N, 4, 8, 8]."""
    return torch.cat([vae.encode(to_unit(chunk)).latent_dist.mean for chunk in images.split(ENCODE_BATCH)]).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures of unscaled latents, uint8 [N, 64, 64, 3]."""
    return torch.cat([to_uint8(vae.decode(chunk).sample) for chunk in latents.split(ENCODE_BATCH)])


def round_trip(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """uint8 images [N, 64, 64, 3] as the autoencoder renders them."""
    return decode(vae, encode(vae, images))


def load_vae(base_dir: Path) -> AutoencoderKL:
    """The saved autoencoder, ready to use."""
    vae = AutoencoderKL.from_pretrained(base_dir / "vae").eval().requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)
