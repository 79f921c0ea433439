"""Prompt files, and which prompts a sampling batch gets."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from b2diffurl.configuration.limits import is_surrogate, naming
from b2diffurl.configuration.settings import PromptSources
from b2diffurl.runtime.paths import resource

FORMS = 'Give a .json list of strings, a .jsonl with {"prompt": …} a line, or a .txt with a prompt a line.'
MAX_BYTES = 10**9  # far more than any list of prompts; a model that was named by mistake may be larger
TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".arrow", ".yaml", ".yml", ".toml", ".xml", ".html", ".md")


def load_prompts(path: str | Path) -> list[str]:
    """The prompts of a prompt file, without their places."""
    return [prompt for _, prompt in place_prompts(path)]


def place_prompts(path: str | Path) -> list[tuple[str, str]]:
    """Read a prompt file as (place, prompt) pairs; a place is the file with the line or entry, for error messages.

    It is a JSON list of strings, JSON lines with a `prompt` each, or text with a prompt a line; the suffix decides or, if
    it is none of ours, the first character. Blank lines are skipped. A ValueError names the place of what is not a prompt.
    """
    path = Path(path)
    text = read_text(path)
    suffix = path.suffix.lower()
    if not text.strip():
        raise ValueError(f"{path} holds no prompt. {FORMS}")
    placed = PARSERS.get(suffix, FIRST_CHARACTERS.get(text.lstrip()[0], parse_text))(path, text)
    for place, prompt in placed:
        if not isinstance(prompt, str) or not prompt.strip() or has_surrogates(prompt):
            raise ValueError(f"{place}: {json.dumps(prompt):.100} is no prompt; it must be a string of text, not empty")
    if not placed:
        raise ValueError(f"{path} holds no prompt. {FORMS}")
    return placed


def read_text(path: Path) -> str:
    """The text of a prompt file, with line ends of Windows and old Macs as `\n`; an error says why it can be none."""
    file = resource(path)
    if not os.path.isfile(file):  # unlike Path.is_file it is False, not an error, for a name that is too long
        if os.path.exists(file):
            raise ValueError(f"{file.absolute()} is a folder, or no file that can be read twice. {FORMS}")
        raise FileNotFoundError(f"no prompt file at {file.absolute()}. {FORMS}")
    if path.suffix.lower() in TABLES:
        raise ValueError(f"{path} is a {path.suffix.lower()} file, which is no list of prompts. {FORMS}")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {file.stat().st_size:,} bytes; a prompt file may have {MAX_BYTES:,}. {FORMS}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text. {FORMS}") from None


def has_surrogates(text: str) -> bool:
    """Whether the text has half of a character (a surrogate). JSON can contain one, but a tokenizer's UTF-8 cannot."""
    return not text.isascii() and any(map(is_surrogate, text))  # the first is quick, for lists of 100,000 prompts


def named_prompts(sources: PromptSources, name: str) -> list[tuple[str, str]]:
    """(place, prompt) of each prompt in the set `name`: `train`, `test`, or the path of a prompt file.

    An error begins with the key that names the file.
    """
    name = sources.meant(name)
    if name == "train" and sources.one_prompt:
        return [("prompt", sources.one_prompt)]
    files = {"train": ("prompt_file", sources.train_file), "test": ("eval.prompt_file", sources.held_out_file)}
    key, path = files.get(name, ("--prompts", name))
    with naming(key):
        return place_prompts(path)


def trained_on(trained: Iterable[str], judged: Iterable[str]) -> list[str]:
    """The distinct ones of the judged prompts that are trained on. Neither case nor the blanks between words count."""
    seen = {plain(prompt) for prompt in trained}
    return [prompt for prompt in dict.fromkeys(judged) if plain(prompt) in seen]


def plain(prompt: str) -> str:
    """A prompt in small letters, with single blanks between its words."""
    return " ".join(prompt.casefold().split())


def overlap_text(sources: PromptSources) -> str:
    """How many held-out prompts are trained on, in a sentence with an example; "" if none are, or if none were asked for."""
    if not sources.held_out_file:
        return ""
    trained, judged = ([prompt for _, prompt in named_prompts(sources, name)] for name in ("train", "test"))
    if not (both := trained_on(trained, judged)):
        return ""
    example = repr(both[0])[:100]  # not as JSON, which escapes the quotes of a text to draw
    if len(both) == len(set(judged)) == 1:
        return f"the one prompt of eval.prompt_file is trained on, {example}, so none is held out"
    if len(both) == len(set(judged)):
        return f"all {len(both)} prompts of eval.prompt_file are trained on, such as {example}, so none is held out"
    return f"trained on, too: {len(both)} of {len(set(judged))} held-out prompts (eval.prompt_file), such as {example}"


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


Parser = Callable[[Path, str], list[tuple[str, Any]]]
PARSERS: dict[str, Parser] = {
    ".txt": parse_text,
    ".json": parse_json,
    ".jsonl": parse_json_lines,
    ".ndjson": parse_json_lines,
}
FIRST_CHARACTERS: dict[str, Parser] = {"[": parse_json, "{": parse_json_lines}  # where the suffix says nothing


def batch_prompts(prompts: list[str], count: int, batch: int, generator: torch.Generator | None) -> list[str]:
    """The `count` prompts of batch number `batch`: drawn at random by `generator`, or without one in turn through the list.

    `batch` counts over the whole experiment, so the turn goes on from stage to stage.
    """
    if generator is None:
        return [prompts[(batch * count + n) % len(prompts)] for n in range(count)]
    return [prompts[n] for n in torch.randint(len(prompts), (count,), generator=generator).tolist()]
