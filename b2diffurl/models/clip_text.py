"""CLIP's text encoders, which most families have: their tokens, how many are cut off, and whether tokenizer and encoder fit.

P prompts, L tokens
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from b2diffurl.models import whole
from b2diffurl.models.diffusers_files import PipelineSpec, class_of


def tokenize(tokenizer: Any, prompts: list[str]) -> Any:
    """The tokens of prompts, input_ids and attention_mask [P,L], padded and cut to the tokenizer's length.

    As in diffusers' own pipelines.
    """
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )


def num_tokens_cut(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """How many tokens are cut off at the end of each prompt."""
    # CLIP's tokens never reach over a blank. So each distinct word goes to the tokenizer once, in one call. For 200,000
    # prompts of few words that takes 0.4 s; a call for each prompt would take half a minute.
    words = [*{word for prompt in prompts for word in prompt.split()}]
    marks, *tokens = tokenizer(["", *words], verbose=False, return_attention_mask=False).input_ids
    lengths = {word: len(ids) - len(marks) for word, ids in zip(words, tokens, strict=True)}
    room = tokenizer.model_max_length - len(marks)
    return [max(0, sum(map(lengths.__getitem__, prompt.split())) - room) for prompt in prompts]


def check_tokenizer(root: Path, tokenizer: str, encoder: str, parts: Mapping[str, nn.Module], spec: PipelineSpec) -> None:
    """Refuse a tokenizer that does not fit its text encoder, both parts of the model directory `root` by their names."""
    text = parts[encoder].config
    read = whole.read_tokenizer(root / tokenizer, class_of(tokenizer, spec), text.vocab_size)
    if read.model_max_length > text.max_position_embeddings:
        raise ValueError(
            f"{root}/{tokenizer} does not fit its text encoder: model_max_length is {read.model_max_length}, and "
            f"max_position_embeddings is {text.max_position_embeddings}. Lower it in tokenizer_config.json."
        )


def require_words(name: str, encoder: str, nothing: Tensor, word: Tensor) -> None:
    """Refuse part `encoder` of model `name` if a word is to it as good as none, or embedded as what is not finite.

    `nothing` and `word` are the embeddings of "" and of a word, of any shape.
    """
    if torch.equal(nothing, word) or not word.isfinite().all():
        raise ValueError(f"the {encoder} of {name} embeds all prompts alike, or as NaN. Get its files anew.")
