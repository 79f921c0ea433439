"""Prompt files, and which prompts a sampling batch gets."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from b2diffurl.configuration.limits import is_surrogate
from b2diffurl.configuration.settings import PromptSources

FORMS = 'Give a .json list of strings, a .jsonl with {"prompt": …} a line, or a .txt with a prompt a line.'


def load_prompts(path: str | Path) -> list[str]:
    """Read a prompt file: a JSON list of strings, JSON lines with a `prompt` each, or text with a prompt a line.

    Blank lines are skipped.
    """
    return [prompt for _, prompt in place_prompts(path)]


def place_prompts(path: str | Path) -> list[tuple[str, str]]:
    """Read a prompt file as (place, prompt) pairs; a place is the file with the line or entry, for error messages.

    A ValueError names the place of what is not a prompt.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file it is False, not an error, for a name that is too long
        raise FileNotFoundError(f"no prompt file at {path}. {FORMS}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text. {FORMS}") from None
    placed = PARSERS.get(path.suffix, parse_json)(path, text)
    for place, prompt in placed:
        if not isinstance(prompt, str) or not prompt.strip() or has_surrogates(prompt):
            raise ValueError(f"{place}: {json.dumps(prompt):.100} is no prompt; it must be a string of text, not empty")
    if not placed:
        raise ValueError(f"{path} holds no prompt. {FORMS}")
    return placed


def has_surrogates(text: str) -> bool:
    """Whether the text has half of a character (a surrogate). JSON can contain one, but a tokenizer's UTF-8 cannot."""
    return any(map(is_surrogate, text))


def named_prompts(sources: PromptSources, name: str) -> list[tuple[str, str]]:
    """(place, prompt) of each prompt in the set `name`: `train`, `test`, or the path of a prompt file."""
    if name == "train" and sources.one_prompt:
        return [("prompt", sources.one_prompt)]
    return place_prompts({"train": sources.train_file, "test": sources.held_out_file}.get(name, name))


def parse_text(path: Path, text: str) -> list[tuple[str, Any]]:
    return [(f"{path}, line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    placed = []
    for place, line in parse_text(path, text):
        row = load_json(place, line)
        if not isinstance(row, dict) or "prompt" not in row:
            raise ValueError(f'{place} has no "prompt". {FORMS}')
        placed.append((place, row["prompt"]))
    return placed


def parse_json(path: Path, text: str) -> list[tuple[str, Any]]:
    prompts = load_json(path, text)
    if not isinstance(prompts, list):
        raise ValueError(f"{path} is not a list. {FORMS}")
    return [(f"{path}, entry {n}", prompt) for n, prompt in enumerate(prompts, 1)]


def load_json(place: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a RecursionError for lists nested thousands deep
        raise ValueError(f"{place} is not JSON ({error}). {FORMS}") from None


PARSERS: dict[str, Callable[[Path, str], list[tuple[str, Any]]]] = {".txt": parse_text, ".jsonl": parse_json_lines}


def batch_prompts(prompts: list[str], count: int, batch: int, generator: torch.Generator | None) -> list[str]:
    """The `count` prompts of batch number `batch`: drawn at random by `generator`, or without one in turn through the list.

    `batch` counts over the whole experiment, so the turn goes on from stage to stage.
    """
    if generator is None:
        return [prompts[(batch * count + n) % len(prompts)] for n in range(count)]
    return [prompts[n] for n in torch.randint(len(prompts), (count,), generator=generator).tolist()]
