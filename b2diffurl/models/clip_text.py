"""Text encoders, CLIP's and T5: their tokens, how many are cut off, and whether tokenizer and encoder fit.

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


@torch.no_grad()
def encode_t5(encoder: Any, tokenizer: Any, prompts: list[str], num_tokens: int) -> Tensor:
    """The last hidden states [P,L,E] of T5, whose prompts are padded and cut to `num_tokens`."""
    options = {"padding": "max_length", "truncation": True, "max_length": num_tokens, "return_tensors": "pt"}
    return encoder(tokenizer(prompts, **options).input_ids.to(encoder.device))[0]


def num_tokens_cut(tokenizer: Any, prompts: Sequence[str], max_length: int = 0) -> list[int]:
    """How many tokens are cut off at the end of each prompt, at `max_length` or, if it is 0, at the tokenizer's own."""
    # Tokens of CLIP and T5 never reach over a blank. So each distinct word goes to the tokenizer once, in one call. For
    # 200,000 prompts of few words that takes 0.4 s; a call for each prompt would take half a minute.
    words = [*{word for prompt in prompts for word in prompt.split()}]
    marks, *tokens = tokenizer(["", *words], verbose=False, return_attention_mask=False).input_ids
    lengths = {word: len(ids) - len(marks) for word, ids in zip(words, tokens, strict=True)}
    room = (max_length or tokenizer.model_max_length) - len(marks)
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
