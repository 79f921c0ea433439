"""Prompt files, and which prompts a sampling batch gets."""

import json
from pathlib import Path

import torch


def load_prompts(path: str | Path) -> list[str]:
    """Read a JSON list of strings, or a .txt file with one prompt a line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}. Give a JSON list of strings, or a .txt with a prompt a line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text. A prompt file is a JSON list of strings, or .txt.") from None
    if path.suffix == ".txt":
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            prompts = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}). A prompt file is a JSON list of strings.") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"{path} must be a JSON list of non-empty strings.")
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return prompts


def batch_prompts(prompts: list[str], count: int, batch: int, generator: torch.Generator | None) -> list[str]:
    """The prompts of global batch `batch`: drawn at random with `generator`, or in turn through the list without one."""
    if generator is None:
        return [prompts[(batch * count + n) % len(prompts)] for n in range(count)]
    return [prompts[n] for n in torch.randint(len(prompts), (count,), generator=generator).tolist()]
