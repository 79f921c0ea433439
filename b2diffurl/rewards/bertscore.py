"""BERTScore of a caption: a captioner describes the image, and a text model compares the caption with the prompt.

This is the second reward of B2-DiffuRL (arXiv 2503.11240). The question, the reference sentence and the choice of recall as
reward are from DDPO (Black et al. 2023, arXiv 2305.13301, section 5.2). BERTScore: Zhang et al. 2020, arXiv 1904.09675.

N images, L tokens of a text, E width of the text model (the scorer)
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from b2diffurl.rewards import Parts, Reward
from b2diffurl.runtime.hub import load_whole, model_files, model_folder

NOT_DECISIVE = ("captioner", "scorer")
MAX_TOKENS = 128  # that the scorer reads of a caption or reference; the rest is cut
TEXT_BATCH_SIZE = 32


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        raise ModuleNotFoundError("reward bertscore needs torchmetrics: pip install torchmetrics==1.9.0")
    for model in (own["captioner"], own["scorer"]):
        model_folder(model)


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return [*model_files(own["captioner"]), *model_files(own["scorer"])]


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    captioner = Captioner(own["captioner"], own["question"], own["max_new_tokens"], device, dtype)
    scorer = TextScorer(own["scorer"], own["num_layers"], device)

    def bertscore(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        captions = captioner(images)
        references = [own["reference"].format(prompt=prompt) for prompt in prompts]
        scores = scorer(captions, references)
        return scores["recall"], scores | {"caption": captions}

    return bertscore


class Captioner:
    """Captions images by one of transformers' image-text-to-text models. Call it with images uint8 [N,H,W,3]."""

    def __init__(self, model: str, question: str, max_new_tokens: int, device: torch.device, dtype: torch.dtype):
        root = model_folder(model)
        self.model = load_whole(AutoModelForImageTextToText, root, dtype, device)
        self.processor = AutoProcessor.from_pretrained(root, backend="pil", trust_remote_code=False)
        self.max_new_tokens, self.device, self.dtype = max_new_tokens, device, dtype
        self.text = question
        if self.processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            self.text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[str]:
        """One caption for each image, by greedy decoding: no randomness."""
        pictures = [[image] for image in images.permute(0, 3, 1, 2).cpu()]
        inputs = self.processor(images=pictures, text=[self.text] * len(images), return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        question = inputs["input_ids"]
        # A decoder-only model returns the question before its answer, an encoder-decoder the answer alone.
        if torch.equal(tokens[:, : question.shape[1]], question):
            tokens = tokens[:, question.shape[1] :]
        return [caption.strip() for caption in self.processor.batch_decode(tokens, skip_special_tokens=True)]


class TextScorer:
    """BERTScore by the text model `model` (hub id or directory). Call it with texts [N] and references [N].

    torchmetrics computes the score from token embeddings. It gets one pair at a time: in a batch it mixes up pairs of
    different lengths (its issue 2728). The embeddings come from here, so a text that occurs twice is embedded once.
    """

    def __init__(self, model: str, num_layers: int, device: torch.device):
        root = model_folder(model)
        self.tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
        self.model = load_whole(AutoModel, root, torch.float32, device)
        depth = self.model.config.num_hidden_layers
        if not 0 <= num_layers <= depth:
            raise ValueError(f"reward.bertscore.num_layers is {num_layers}; {root} has {depth} layers, and 0 takes the last")
        self.layer = num_layers or depth
        self.known: dict[tuple[int, ...], Tensor] = {}  # tokens of a text -> their embeddings [L,E]

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
        """precision, recall and f1 [N]; all 0 for an empty text."""
        from torchmetrics.functional.text.bert import bert_score

        self.embed([*texts, *references])
        scores: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
        for text, reference in zip(texts, references, strict=True):
            found = bert_score(
                [text],
                [reference],
                model=self.model,
                user_tokenizer=self.tokenizer,
                user_forward_fn=self.look_up,
                max_length=MAX_TOKENS,
                truncation=True,
            )
            for key, values in scores.items():
                values.append(float(found[key]) if text else 0.0)
        return {key: torch.tensor(values) for key, values in scores.items()}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> None:
        """Embed the texts that are new, and remember them.

        Batches are padded to a constant shape [TEXT_BATCH_SIZE, MAX_TOKENS]. Kernels round differently at other shapes, and
        the embedding of a text must not depend on which texts are embedded with it.
        """
        new = [tokens for tokens in dict.fromkeys(map(self.tokens, texts)) if tokens not in self.known]
        for start in range(0, len(new), TEXT_BATCH_SIZE):
            some = new[start : start + TEXT_BATCH_SIZE]
            rows = [*some, *[some[-1]] * (TEXT_BATCH_SIZE - len(some))]
            ids = torch.full((TEXT_BATCH_SIZE, MAX_TOKENS), self.tokenizer.pad_token_id)
            for row, tokens in zip(ids, rows, strict=True):
                row[: len(tokens)] = torch.tensor(tokens)
            mask = torch.arange(MAX_TOKENS) < torch.tensor([len(tokens) for tokens in rows])[:, None]
            ids, mask = ids.to(self.model.device), mask.long().to(self.model.device)
            states = self.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer]
            self.known |= {tokens: state[: len(tokens)].cpu() for tokens, state in zip(some, states, strict=False)}

    def tokens(self, text: str) -> tuple[int, ...]:
        """The token ids of a text, at most MAX_TOKENS."""
        return tuple(self.tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids)

    def look_up(self, _: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The embeddings [1,L,E] of torchmetrics' batch of one text. A copy, because torchmetrics normalises it in place."""
        tokens = batch["input_ids"][0][batch["attention_mask"][0].bool()]
        return self.known[tuple(tokens.tolist())].clone()[None]
