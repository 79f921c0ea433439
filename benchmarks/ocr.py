"""How well the reward `ocr` reads rendered text, and how fast (docs/rewards.md).

    python -m benchmarks.ocr            # 8 minutes on one core
    python -m benchmarks.ocr --write    # also write docs/results/ocr.json

Every phrase of PHRASES is drawn in every font of FONTS, under each of CONDITIONS. The prompt quotes the phrase.
"""

import argparse
import os
import platform
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from b2diffurl.rewards import Reward, score
from b2diffurl.rewards.ocr import load
from b2diffurl.runtime import files
from benchmarks.page import table

PHRASES = ("OPEN", "Quiet please", "24 hours", "Hello World", "EXIT 7", "Fresh bread")
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneralItalic.ttf", "")  # "": Pillow's own
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Look:
    """How a text is drawn."""

    size_px: int = 512  # of the square image
    width: float = 0.8  # of the text, as a part of the image's
    ink: tuple[int, int, int] = BLACK
    paper: tuple[int, int, int] = WHITE
    noise: float = 0.0  # standard deviation of the background's pixels, in grey levels
    blur: float = 0.0  # standard deviation, as a part of the font's size
    angle: float = 0.0  # degrees anticlockwise
    stacked: bool = False  # one letter below the other
    lines: bool = False  # a word a line


CONDITIONS = {
    "512 px": Look(),
    "1024 px": Look(size_px=1024),
    "256 px": Look(size_px=256),
    "64 px": Look(size_px=64, width=0.9),
    "32 px": Look(size_px=32, width=0.9),
    "a quarter of the width": Look(width=0.25),
    "an eighth of the width": Look(width=0.125),
    "a word a line": Look(lines=True),
    "white on black": Look(ink=WHITE, paper=BLACK),
    "yellow on grey": Look(ink=(250, 220, 60), paper=(150, 150, 150)),
    "on noise": Look(noise=60, paper=(150, 150, 150)),
    "blurred by 0.05 of the font's size": Look(blur=0.05),
    "blurred by 0.1 of it": Look(blur=0.1),
    "blurred by 0.2 of it": Look(blur=0.2),
    "turned by 10 degrees": Look(angle=10, width=0.7),
    "turned by 30 degrees": Look(angle=30, width=0.7),
    "turned by 45 degrees": Look(angle=45, width=0.7),
    "turned by 90 degrees": Look(angle=90),
    "upside down": Look(angle=180),
    "one letter below the other": Look(stacked=True),
}
OTHER = "another phrase"
NOTHING = ("no text", "no text, on noise")


def picture(text: str, look: Look = CONDITIONS["512 px"], font: str = FONTS[0]) -> Image.Image:
    """An image of the text; always the same pixels for the same arguments."""
    size = (look.size_px, look.size_px)
    noise = np.random.default_rng(zlib.crc32(text.encode())).normal(0, look.noise, (*size, 1))
    paper = Image.fromarray((np.array(look.paper) + noise).clip(0, 255).astype(np.uint8))
    shown = "\n".join(text.replace(" ", "")) if look.stacked else text.replace(" ", "\n") if look.lines else text
    mask = mask_of(shown, look, font)
    if look.angle:
        mask = mask.rotate(look.angle, resample=Image.Resampling.BICUBIC)
    paper.paste(Image.new("RGB", size, look.ink), mask=mask)
    return paper


def mask_of(shown: str, look: Look, font: str) -> Image.Image:
    """Where the ink is: the text in the middle, as large as its width allows and no higher than the image, and blurred."""
    mask = Image.new("L", (look.size_px, look.size_px))
    if not shown:
        return mask
    draw, middle = ImageDraw.Draw(mask), (look.size_px / 2, look.size_px / 2)

    def box(points: float) -> tuple[float, float]:
        left, top, right, bottom = draw.multiline_textbbox((0, 0), shown, sized(font, points), align="center")
        return right - left, bottom - top

    wide, high = box(100)
    points = 100 * look.size_px * min(look.width / wide, 0.9 / high)
    draw.multiline_text(middle, shown, 255, sized(font, points), anchor="mm", align="center")
    return mask.filter(ImageFilter.GaussianBlur(look.blur * points)) if look.blur else mask


def sized(font: str, points: float) -> ImageFont.FreeTypeFont:
    """A font of matplotlib's, or Pillow's own."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / font, points) if font else ImageFont.load_default(points)


def measure(reward: Reward, pairs: Iterable[tuple[str, Image.Image]]) -> dict[str, float]:
    """Mean score, share of exact ones, and CPU seconds an image, of (phrase that is asked for, image)."""
    phrases, pictures = zip(*pairs, strict=True)
    images = torch.from_numpy(np.stack([np.asarray(one) for one in pictures]))
    began = time.process_time()
    scores, parts = score(reward, images, [f'a sign that says "{phrase}"' for phrase in phrases])
    spent = time.process_time() - began
    return {
        "images": len(phrases),
        "score": scores.mean().item(),
        "exact": parts["exact"].mean().item(),
        "cpu_seconds": spent / len(phrases),
    }


def measure_all(reward: Reward) -> dict[str, dict[str, float]]:
    cases = [(phrase, font) for phrase in PHRASES for font in FONTS]
    found = {
        name: measure(reward, [(phrase, picture(phrase, look, font)) for phrase, font in cases])
        for name, look in CONDITIONS.items()
    }
    following = dict(zip(PHRASES, (*PHRASES[1:], PHRASES[0]), strict=True))
    found[OTHER] = measure(reward, [(phrase, picture(following[phrase], font=font)) for phrase, font in cases])
    for name, noise in zip(NOTHING, (0.0, 60.0), strict=True):
        greys = [(phrase, picture("", Look(noise=noise, paper=(15 * n % 256,) * 3))) for n, (phrase, _) in enumerate(cases)]
        found[name] = measure(reward, greys)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/results/ocr.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure_all(load("ocr", {}, torch.device("cpu"), torch.float32))
    facts = {
        "command": "python -m benchmarks.ocr",
        "date": str(date.today()),
        "hardware": f"one core of {os.cpu_count()}, {platform.machine()}",
        "versions": {name: version(name) for name in ("rapidocr", "onnxruntime", "pillow", "matplotlib")},
        "conditions": found,
    }
    rows = [
        [name, str(one["images"]), f"{one['score']:.3f}", f"{100 * one['exact']:.0f} %", f"{one['cpu_seconds']:.2f}"]
        for name, one in found.items()
    ]
    print(table(["text", "images", "mean score", "exact", "CPU seconds an image"], rows))
    if given.write:
        files.write_json(Path("docs/results/ocr.json"), facts)


if __name__ == "__main__":
    main()
