"""What a vision model reads is what its image processor makes."""

import pytest
import torch
from transformers import CLIPImageProcessor

from b2diffurl.rewards.pixels import Pixels

SQUARE = {"size": {"height": 32, "width": 32}, "do_center_crop": False}


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}, SQUARE])
def test_the_numbers_are_those_of_the_processor(tmp_path, settings):
    """To the bit, for images that have the model's size, and for others, which are resized and cut."""
    usual = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**usual | settings).save_pretrained(tmp_path)
    pixels = Pixels(tmp_path)
    for size in ((32, 32), (32, 48), (20, 25), (64, 64)):
        images = torch.randint(256, (3, *size, 3), generator=torch.Generator().manual_seed(0)).byte()
        expected = pixels.processor(images=[*images.permute(0, 3, 1, 2)], return_tensors="pt").pixel_values
        assert torch.equal(pixels(images), expected)
        assert pixels.keeps((3, *size)) == (size == (32, 32))
