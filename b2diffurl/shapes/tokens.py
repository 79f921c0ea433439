"""A CLIP tokenizer whose vocabulary is the caption grammar: one token a word, single characters for the rest."""

import string

from transformers import CLIPTokenizer

from b2diffurl.shapes.scene import COLOURS, RELATIONS, SHAPES

MAX_TOKENS = 16  # the longest caption has 8 words, a start and an end
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges that join each word of the grammar into one token; padding is the end token, as in CLIP."""
    words = sorted({"a", "and", *COLOURS, *SHAPES, *(word for relation in RELATIONS for word in relation.split())})
    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _encode([*word[:-1], f"{word[-1]}</w>"], merges)
        # Later merges have lower priority, so they never disturb a word that is already whole.
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = ["".join(pieces[:2]), *pieces[2:]]
    vocabulary += [*dict.fromkeys("".join(pair) for pair in merges), BOS, EOS]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def _encode(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: apply the merges in order of priority."""
    for left, right in merges:
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == (left, right):
                joined[-1] = left + right
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def special_ids(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """What a CLIP text config must be told: with its defaults the pooled vector is the same for every caption."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
