"""A vision-language model behind an OpenAI-compatible chat endpoint answers questions about the image.

Two ways to score (`score`): the probability of "yes", from the log-probabilities of the answer's first token, as VQAScore
does (Lin et al. 2024, arXiv 2404.01291); or a rating, a number that the model writes.

N images, Q questions
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from b2diffurl.rewards import Parts, Reward, different
from b2diffurl.rewards.answers import rating, shortened, yes_probability
from b2diffurl.rewards.chat import API_KEY, OPENAI_API_KEY, Answer, Chat, Endpoint, Message
from b2diffurl.rewards.http import encode
from b2diffurl.runtime.logs import logger, printable

WAITS = True  # for a server: a batch can be scored while the next images are sampled
NOT_DECISIVE = ("url", "concurrency", "timeout_sec", "num_retries")
QUESTIONS = {
    "yes": 'Does this image show "{prompt}"?',
    "rating": 'How well does this image show "{prompt}", in what is there, how many, which colours and where?',
}
# A schema's entries are written in its order: with the reason first, the model has thought before it gives the number.
SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "number"}},
    "required": ["reason", "score"],
    "additionalProperties": False,
}
NUM_LIKELIEST = 20  # first tokens whose log-probabilities are asked for; servers allow no more
NUM_NAMED = 20  # models that an error names
NUM_REPEATS = 3  # of one request at the start, which show whether the server repeats itself
SIDE_PX = 112  # of the images of these requests

NOT_FINITE = (
    "the answers there, which scores.jsonl has, cannot be read. Allow longer answers by reward.vlm.max_tokens, or set "
    "reward.vlm.unreadable=mean, which gives such images the mean of their prompt's others, where it has any"
)

probed: set[str] = set()  # settings with which this process has tried the server


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    if importlib.util.find_spec("openai") is None:
        raise ModuleNotFoundError("reward vlm needs the package openai: pip install -r requirements-rewards.txt")
    url, (lowest, highest) = own["url"], two_numbers(own["scale"])
    if not is_base(url):
        raise ValueError(
            f"reward.vlm.url is {url!r}; give the address of an OpenAI-compatible server up to its version, such as "
            "http://localhost:8000/v1 or https://api.openai.com/v1"
        )
    key = endpoint(own).key
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the variable {API_KEY} or {OPENAI_API_KEY} has a character in it that no header can have")
    if not own["model"]:
        served = Chat(endpoint(own), {}).models()
        more = f" and {len(served) - NUM_NAMED} more" if len(served) > NUM_NAMED else ""
        there = f"; {url} serves {printable(', '.join(served[:NUM_NAMED]))}{more}" if served else ""
        raise ValueError(f"reward.vlm.model is empty; name the model as the server calls it{there}")
    if not lowest < highest:
        raise ValueError(f"reward.vlm.scale is {tuple(own['scale'])}; it must be the lowest and the highest rating")
    questions, weights = own["questions"], own["question_weights"]
    if not all(isinstance(question, str) and question.strip() for question in questions):
        raise ValueError(f"reward.vlm.questions is {questions!r}; it must be texts, ('Does this image show {{prompt}}?',)")
    if weights and len(weights) != len(questions):
        raise ValueError(
            f"reward.vlm.question_weights has {len(weights)} numbers and reward.vlm.questions {len(questions)} texts; "
            "give each question a weight, or none"
        )
    if not all(type(weight) in (int, float) and math.isfinite(weight) and weight for weight in weights):
        raise ValueError(f"reward.vlm.question_weights is {weights!r}; it must be numbers, none of them 0")


def is_base(url: str) -> bool:
    """Whether a request's path can be added to a URL."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # half an IPv6 address, or no such port
        return False
    is_clean = not (parts.query or parts.fragment) and url.isprintable() and " " not in url
    return bool(is_whole and is_clean) and not url.rstrip("/").endswith("/completions")


def two_numbers(scale: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest rating, equal if the setting does not have the two of them."""
    return (scale[0], scale[1]) if len(scale) == 2 else (0, 0)


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return []


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    probe(name, own)
    return Judge(own)


def endpoint(own: Mapping[str, Any]) -> Endpoint:
    limits = {key: own[key] for key in ("timeout_sec", "num_retries", "concurrency")}
    return Endpoint(url=own["url"].rstrip("/"), model=own["model"], **limits)


class Judge:
    """Scores images by a model's answers. Call it with images uint8 [N,H,W,3] and prompts [N].

    Each image and question is a request of its own, so a score does not depend on the other images. An image whose answer
    cannot be read, not even at a second try, scores NaN.
    """

    def __init__(self, own: Mapping[str, Any]):
        self.rates = own["score"] == "rating"
        self.questions = list(own["questions"]) or [QUESTIONS[own["score"]]]
        weights = torch.tensor(list(own["question_weights"]) or [1.0] * len(self.questions), dtype=torch.float64)
        self.weights = weights / weights.abs().sum()  # [Q]
        lowest, highest = two_numbers(own["scale"])
        if self.rates:
            self.read = lambda answer: rating(answer.text, lowest, highest, is_cut=answer.is_cut)
            self.order = (
                'Answer with a JSON object that has "reason", one short sentence, and then "score", a number from '
                f"{lowest} (worst) to {highest} (best)."
            )
            schema = {"type": "json_schema", "json_schema": {"name": "rating", "strict": True, "schema": SCHEMA}}
            asked = {"max_tokens": own["max_tokens"], "response_format": schema}
        else:
            self.read = lambda answer: yes_probability(answer.first_token or {})
            self.order = "Answer with yes or no."
            # A model may begin with blanks, so there is more than one token.
            asked = {"max_tokens": 3, "logprobs": True, "top_logprobs": NUM_LIKELIEST}
        fields = {"temperature": 0, "seed": 0} | asked | dict(own["extra_body"] or {})
        self.chat = Chat(endpoint(own), fields)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        first, rows = different(images, prompts)
        pairs = [(encode(images[row]), prompts[row]) for row in first]
        asked = [self.message(image, self.text(n, prompt)) for image, prompt in pairs for n in range(len(self.questions))]
        answers, values = self.answers([[message] for message in asked])
        by_question = torch.tensor(values, dtype=torch.float64).unflatten(0, (-1, len(self.questions)))[rows]  # [N,Q]
        parts: Parts = {}
        for n in range(len(self.questions)):
            number = n + 1 if len(self.questions) > 1 else ""
            texts = [shortened(answers[row * len(self.questions) + n].text) for row in rows]
            parts |= {f"answer{number}": [printable(text) for text in texts]}
            parts |= {f"question{number}": by_question[:, n].float()} if number else {}
        return (by_question @ self.weights).float(), parts

    def text(self, n: int, prompt: str) -> str:
        """Question n about an image that was drawn from `prompt`."""
        return f"{self.questions[n].replace('{prompt}', prompt)} {self.order}"

    @staticmethod
    def message(image: str, text: str) -> Message:
        """A user's message: an image, as PNG in base64, and a text. Without an image, the text."""
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        return {"role": "user", "content": [*([picture] if image else []), {"type": "text", "text": text}]}

    def answers(self, conversations: list[list[Message]]) -> tuple[list[Answer], list[float]]:
        """The answers, and the number that each gives or NaN. One that cannot be read is asked for once more."""
        answers = self.chat.ask(conversations)
        unread = [n for n, answer in enumerate(answers) if math.isnan(self.read(answer))]
        second = self.chat.ask([self.once_more(conversations[n], answers[n]) for n in unread])
        for n, answer in zip(unread, second, strict=True):
            answers[n] = answer
        return answers, [self.read(answer) for answer in answers]

    def once_more(self, messages: list[Message], answer: Answer) -> list[Message]:
        """The conversation goes on: the same request would get the same answer."""
        said = {"role": "assistant", "content": shortened(answer.text) or "…"}
        return [*messages, said, {"role": "user", "content": [{"type": "text", "text": self.order}]}]

    def spent(self) -> dict[str, int]:
        """Requests, retries and tokens since this was last asked."""
        spent, self.chat.spent = self.chat.spent, {}
        return spent


# ---- before any work ----


def probe(name: str, own: Mapping[str, Any]) -> None:
    """Try the server: is it there, does its model see, can its answers be read, does it repeat itself.

    A process tries it once. A ValueError or ConnectionError says what is wrong. The log says whether it repeats itself.
    """
    tried = json.dumps(dict(own), sort_keys=True, default=str)
    if tried in probed:
        return
    judge = Judge(own)
    require_sight(judge)
    require_readable(judge)
    probed.add(tried)


def require_sight(judge: Judge) -> None:
    """Raise a ValueError if the model answers to two unlike images as if there were none.

    Some servers drop images without a word if the model cannot see.
    """
    images = [encode(image) for image in test_images()]
    question = "Which colours are in this image?"
    first, second = judge.chat.ask([[judge.message(image, question)] for image in images])
    if (first.text, first.first_token) != (second.text, second.first_token):
        return
    blind = judge.chat.ask([[judge.message("", question)]])[0]
    if first.prompt_tokens is None or first.prompt_tokens == blind.prompt_tokens:
        where = f"{judge.chat.endpoint.model} at {judge.chat.endpoint.url}"
        raise ValueError(
            f"reward vlm: {where} gives two unlike images the same answer, so it does not see them. Serve a model for "
            "images and text, such as a Qwen-VL, with all that the server needs for images"
        )


def require_readable(judge: Judge) -> None:
    """Raise a ValueError if the first question's answers have no number in them, and log whether they are all the same."""
    image = encode(test_images()[0])
    asked = [[judge.message(image, judge.text(0, "a red square"))]] * NUM_REPEATS
    answers, values = judge.answers(asked)
    where = f"{judge.chat.endpoint.model} at {judge.chat.endpoint.url}"
    if not judge.rates and not any(answer.first_token for answer in answers):
        raise ValueError(
            f"reward vlm: {where} gives no log-probabilities, so the probability of yes is not known; take "
            "reward.vlm.score=rating, or a server that gives them"
        )
    if all(map(math.isnan, values)):
        said = printable(answers[0].text[:200])
        raise ValueError(
            f"reward vlm: {where} was told {judge.order!r} and answered {said!r}; ask in other words "
            "(reward.vlm.questions), allow a longer answer (reward.vlm.max_tokens) or take another model"
        )
    read = [value for value in values if not math.isnan(value)]
    if len(set(values)) == 1:
        logger.info("reward vlm: %s repeats itself: %d times the score %.4f", where, NUM_REPEATS, read[0])
    else:
        told = "reward vlm: %s does not repeat itself: one image scored %s. So rewards have noise of that size"
        logger.warning(told, where, ", ".join(f"{value:.4f}" for value in values))


def test_images() -> Tensor:
    """Two unlike images uint8 [2,H,W,3]: a red square on white, and blue and green stripes."""
    images = torch.full((2, SIDE_PX, SIDE_PX, 3), 255, dtype=torch.uint8)
    images[0, SIDE_PX // 4 : -SIDE_PX // 4, SIDE_PX // 4 : -SIDE_PX // 4, 1:] = 0
    images[1, :, :, 0] = 0
    images[1, :, ::2, 1] = 0
    images[1, :, 1::2, 2] = 0
    return images
