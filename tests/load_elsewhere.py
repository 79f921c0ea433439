"""Draw with a base or an export in another environment, to compare it with this one. It needs diffusers alone.

    python -m venv OLD
    OLD/bin/pip install torch==2.13.0 diffusers==0.32.2 "transformers==4.54.*" "peft==0.14.*" accelerate
    python -m b2diffurl.export RUN --checkpoint LORA --format kohya --out kohya       # and the other formats
    python tests/load_elsewhere.py BASE here.npy --lora kohya
    OLD/bin/python tests/load_elsewhere.py BASE there.npy --lora kohya --compare here.npy

BASE is a pipeline: for an old environment one that `export --format pipeline` wrote.
"""

import argparse
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("out", help="the images to write, .npy, in 0..255")
    parser.add_argument("--lora", type=Path, help="an exported folder with one LoRA file")
    parser.add_argument("--compare", help="images of another environment")
    args = parser.parse_args()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(args.base, torch_dtype=torch.float32)
    if args.lora:
        (file,) = args.lora.glob("*.safetensors")
        pipeline.load_lora_weights(args.lora, weight_name=file.name)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    size = pipeline.unet.config.sample_size
    noise = torch.randn(3, pipeline.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "a blue square", "a green cross"]
    options = {"num_inference_steps": 6, "guidance_scale": 5.0, "eta": 0.0, "output_type": "np"}
    images = pipeline(prompts, latents=noise, **options).images * 255
    np.save(args.out, images)
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}: mean {images.mean():.4f}")
    if args.compare:
        print(f"largest difference {np.abs(images - np.load(args.compare)).max():.4f} of 255")


if __name__ == "__main__":
    main()
