"""Pictures of what training did."""

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

TILE_PX, GAP_PX, FONT_PX, TEXT_LINES = 128, 10, 12, 4
INK, FAINT, GROUND, RIGHT, WRONG = "#1c1c1c", "#6b6b6b", "#ffffff", "#1a7f37", "#b42318"


def draw_before_after(results: list[dict[str, Any]], path: Path, *, judged: bool) -> None:
    """One PNG: for each prompt set the base model's images above the tuned one's, on the same noise.

    `results` are those of `evaluate` for `base` and one other checkpoint. Under each image stands its reward; with
    `judged`, a coloured frame says whether the judge accepts it. The prompts are the first of the file: none is chosen.
    """
    sets = list(dict.fromkeys(result["prompts"] for result in results))
    blocks = [draw_set([result for result in results if result["prompts"] == name], name, judged=judged) for name in sets]
    width, height = max(block.width for block in blocks), sum(block.height for block in blocks)
    sheet = Image.new("RGB", (width, height), GROUND)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def draw_set(results: list[dict[str, Any]], name: str, *, judged: bool) -> Image.Image:
    """The block of one prompt set: a title, a row of images for each checkpoint, the prompts below."""
    font, bold = ImageFont.load_default(FONT_PX), ImageFont.load_default(FONT_PX + 4)
    pictures = [sorted(Path(result["folder"]).glob("*.png")) for result in results]
    columns = min(len(paths) for paths in pictures)
    label_px, row_px = 84, TILE_PX + FONT_PX + GAP_PX + 6
    title_px = FONT_PX + 4 + 2 * GAP_PX
    width = label_px + columns * (TILE_PX + GAP_PX) + GAP_PX
    height = title_px + len(results) * row_px + TEXT_LINES * (FONT_PX + 3) + GAP_PX
    block = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(block)
    title = {"train": "training prompts", "test": "held-out prompts"}.get(name, name)
    draw.text((GAP_PX, GAP_PX), title, INK, font=bold)
    for row, (result, paths) in enumerate(zip(results, pictures, strict=True)):
        top = title_px + row * row_px
        label = "base" if result["checkpoint"] == "base" else "tuned"
        rewards = result["values"].get("reward")  # none where they are made elsewhere
        figure = f"{result['accuracy']:.1%} right" if judged else f"reward {result['reward']:.3f}" if rewards else ""
        draw.text((GAP_PX, top + TILE_PX // 2 - FONT_PX), f"{label}\n{figure}", INK, font=font)
        for column, path in enumerate(paths[:columns]):
            left = label_px + column * (TILE_PX + GAP_PX)
            picture = Image.open(path).convert("RGB")
            method = Image.Resampling.NEAREST if picture.width < TILE_PX else Image.Resampling.LANCZOS
            block.paste(picture.resize((TILE_PX, TILE_PX), method), (left, top))
            if judged:
                colour = RIGHT if result["values"]["accuracy"][column] else WRONG
                draw.rectangle((left - 2, top - 2, left + TILE_PX + 1, top + TILE_PX + 1), outline=colour, width=3)
            reward = f"{rewards[column]:.3f}" if rewards else ""
            draw.text((left + TILE_PX // 2, top + TILE_PX + 5), reward, FAINT, font=font, anchor="ma")
    for column in range(columns):
        text = textwrap.fill(results[0]["shown_prompts"][column], 21, max_lines=TEXT_LINES)
        left = label_px + column * (TILE_PX + GAP_PX)
        draw.text((left, title_px + len(results) * row_px), text, INK, font=font, spacing=3)
    return block
