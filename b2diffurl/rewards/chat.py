"""Conversations with a model behind an OpenAI-compatible chat endpoint: vLLM, SGLang, llama.cpp, Ollama, a hosted one.

They go through the package openai, many at once. The key is in the environment variable REWARD_VLM_API_KEY, or for OpenAI's
own endpoint in OPENAI_API_KEY. It is never written to disk, and OPENAI_API_KEY is sent to nobody else.
"""

import asyncio
import json
import os
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from b2diffurl.rewards.answers import word
from b2diffurl.rewards.http import MAX_ANSWER_BYTES, is_local, shown
from b2diffurl.runtime.logs import logger

API_KEY, OPENAI_API_KEY, OPENAI_HOST = "REWARD_VLM_API_KEY", "OPENAI_API_KEY", "api.openai.com"
FIRST_WAIT_SEC, LONGEST_WAIT_SEC = 0.5, 60.0  # before the first retry, each further wait is twice as long; and before any
# Fields that a server may refuse, and what is sent in their place. The others are sent always.
REPLACED_BY = {"temperature": "", "seed": "", "response_format": "", "max_tokens": "max_completion_tokens"}
CALLED = {"response_format": ("response_format", "response format", "json_schema")}  # by servers; others by their own names
# Codes of a server that will not look at this one image or prompt.
WILL_NOT_LOOK = ("content_filter", "content_policy_violation", "moderation_blocked", "data_inspection_failed")

Message = dict[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """Where a model is, and how it is asked."""

    url: str  # ends before /chat/completions
    model: str
    timeout_sec: float  # longest wait for an answer
    num_retries: int
    concurrency: int  # conversations at once

    @property
    def key(self) -> str:
        """The key for this host from the environment; "" if there is none."""
        own = os.environ.get(API_KEY, "").strip()
        return own or (os.environ.get(OPENAI_API_KEY, "").strip() if urlsplit(self.url).hostname == OPENAI_HOST else "")


@dataclass(frozen=True)
class Answer:
    """What a model has answered."""

    text: str
    first_token: Mapping[str, float] | None  # log-probabilities of the likeliest first tokens; None: the server gives none
    prompt_tokens: int | None  # tokens that it has read, images among them; None: the server does not say
    is_cut: bool = False  # whether it has reached its longest length


class PassingError(Exception):
    """A failure that may be over when the server is asked again."""

    def __init__(self, problem: str, wait_sec: float | None = None):
        super().__init__(problem)
        self.wait_sec = wait_sec  # what the server asks for; None: it does not


@dataclass
class Chat:
    """Asks one model. `fields` are the request's fields beside the messages."""

    endpoint: Endpoint
    fields: dict[str, Any]
    spent: dict[str, int] = field(default_factory=dict)  # adds up requests, retries, prompt_tokens, completion_tokens

    def ask(self, conversations: Sequence[list[Message]]) -> list[Answer]:
        """The answers to some conversations, in their order.

        A request that fails by the server's fault, or that is one too many, is sent again, `num_retries` times at most, and
        then a ConnectionError says what happened last. What the server refuses is a ValueError.
        """
        return run(self.ask_all(conversations))

    async def ask_all(self, conversations: Sequence[list[Message]]) -> list[Answer]:
        room = asyncio.Semaphore(self.endpoint.concurrency)
        async with self.client() as client:

            async def ask_one(messages: list[Message]) -> Answer:
                async with room:
                    return await self.ask_again(client, messages)

            tasks = [asyncio.create_task(ask_one(messages)) for messages in conversations]
            try:
                return await asyncio.gather(*tasks)
            finally:  # the first that fails ends the others
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def client(self) -> Any:
        import openai

        # What runs on this machine is never asked by way of a proxy, whatever the environment says.
        web = openai.DefaultAsyncHttpxClient(
            trust_env=not is_local(urlsplit(self.endpoint.url).hostname or ""), follow_redirects=False
        )
        options = {"timeout": self.endpoint.timeout_sec, "max_retries": 0, "http_client": web}
        client = openai.AsyncOpenAI(base_url=self.endpoint.url, api_key=self.endpoint.key or "none", **options)
        if urlsplit(self.endpoint.url).hostname != OPENAI_HOST:
            client.organization = client.project = None  # the package takes them from the environment, for any host
        return client

    async def ask_again(self, client: Any, messages: list[Message]) -> Answer:
        """Send one conversation until it is answered, or until it has been sent often enough."""
        for attempt in range(self.endpoint.num_retries + 1):
            try:
                return await self.ask_once(client, messages)
            except PassingError as error:
                problem, wait_sec = str(error), error.wait_sec
            if attempt < self.endpoint.num_retries:
                self.count("retries", 1)
                wait_sec = min(wait_sec or FIRST_WAIT_SEC * 2**attempt, LONGEST_WAIT_SEC)
                told = "reward vlm: %s; asking again (%d of %d) in %.3g s"
                logger.warning(told, problem, attempt + 1, self.endpoint.num_retries, wait_sec)
                await asyncio.sleep(wait_sec)
        times = f"asked {self.endpoint.num_retries + 1} time{'s' if self.endpoint.num_retries else ''}"
        raise ConnectionError(f"reward vlm: {problem}; {times}")

    async def ask_once(self, client: Any, messages: list[Message]) -> Answer:
        """Send one conversation. A field that the server refuses is left out, and it is sent again."""
        import httpx2  # what openai sends by
        import openai

        url = self.endpoint.url
        while True:
            fields = dict(self.fields)
            try:
                self.count("requests", 1)
                body = await asyncio.wait_for(self.exchange(client, messages, fields), self.endpoint.timeout_sec)
                return self.read(body)
            except (TimeoutError, openai.APITimeoutError):
                raise PassingError(
                    f"{url} did not answer within {self.endpoint.timeout_sec:g} s (reward.vlm.timeout_sec)"
                ) from None
            except openai.APIConnectionError as error:
                reason = shown(str(error.__cause__ or error), self.endpoint.key)
                raise PassingError(f"{url} cannot be asked ({reason}); is it running? (reward.vlm.url)") from None
            except httpx2.HTTPError as error:
                cut = shown(str(error) or type(error).__name__, self.endpoint.key)
                raise PassingError(f"{url} has cut its answer off ({cut})") from None
            except openai.APIStatusError as error:
                if error.status_code == 400 and error.code in WILL_NOT_LOOK:
                    return Answer(said_by(error), None, None)
                if not self.give_up_field(error, fields):
                    raise self.refusal(error.status_code, said_by(error), wait_asked_for(error)) from None

    async def exchange(self, client: Any, messages: list[Message], fields: dict[str, Any]) -> bytes:
        """Send a request and read the whole answer; `PassingError` if it is cut off or far too long."""
        create = client.chat.completions.with_streaming_response.create
        data = bytearray()
        async with create(model=self.endpoint.model, messages=messages, extra_body=fields) as response:
            async for piece in response.iter_bytes():
                data += piece
                if len(data) > MAX_ANSWER_BYTES:
                    raise PassingError(f"the answer of {self.endpoint.url} is longer than {MAX_ANSWER_BYTES} bytes")
        return bytes(data)

    def read(self, body: bytes) -> Answer:
        """The answer in a response; `PassingError` if it is no chat completion."""
        try:
            completion = json.loads(body)
            choice = completion["choices"][0]
            text = written(choice["message"])
            usage = {key: value for key, value in (completion.get("usage") or {}).items() if type(value) is int}
            first_token = read_first_token(choice.get("logprobs"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if fault := read_fault(body):
                raise self.refusal(*fault) from None
            answered = shown(body, self.endpoint.key)
            raise PassingError(f"{self.endpoint.url} answered what is no chat completion: '{answered}'") from None
        for key in ("prompt_tokens", "completion_tokens"):
            self.count(key, usage.get(key, 0))
        return Answer(text, first_token, usage.get("prompt_tokens"), choice.get("finish_reason") == "length")

    def give_up_field(self, error: Any, fields: dict[str, Any]) -> bool:
        """Leave out the field that the server refuses, from now on; whether there is one.

        Some models take no temperature, and some servers know no seed or schema.
        """
        if error.status_code not in (400, 422):
            return False
        said = said_by(error)
        refused = [key for key in REPLACED_BY if key in fields and any(name in said for name in CALLED.get(key, (key,)))]
        for key in refused:
            if key in self.fields:  # another conversation may have left it out in the meantime
                value, instead = self.fields.pop(key), REPLACED_BY[key]
                self.fields |= {instead: value} if instead else {}
                told = f"is asked with {instead} instead" if instead else "is asked without it"
                logger.info("reward vlm: %s takes no %s, and %s", self.endpoint.url, key, told)
        return bool(refused)

    def refusal(self, status: int, said: str, wait_sec: float | None = None) -> Exception:
        """What an error status means to the user, or `PassingError` if it may pass; `said` by the server."""
        url, model, said = self.endpoint.url, self.endpoint.model, shown(said, self.endpoint.key)
        if status in (408, 409, 429) or status >= 500:
            too_many = " Lower reward.vlm.concurrency if it says so often." if status == 429 else ""
            return PassingError(f"{url} answered {status}: {said}.{too_many}".replace("..", "."), wait_sec)
        if status in (401, 403):
            have = f"refuses the key in {API_KEY}" if self.endpoint.key else f"wants a key; set the variable {API_KEY}"
            return ValueError(f"reward vlm: {url} {have} ({status}: {said})")
        if status == 404:
            wrong = f"{url} has no model {model!r} (reward.vlm.model), or no chat there: does reward.vlm.url end as in /v1?"
            return ValueError(f"reward vlm: {wrong} (404: {said})")
        remedy = "; reward.vlm.score=rating asks for none, and reward.vlm.extra_body={'top_logprobs': 5} for fewer"
        remedy = remedy if "logprobs" in said else ""
        return ValueError(f"reward vlm: {url} refuses the request to {model!r}, reward.vlm.model ({status}: {said}){remedy}")

    async def list_models(self) -> list[str]:
        async with self.client() as client:
            return [model.id async for model in client.models.list() if isinstance(model.id, str)]

    def models(self) -> list[str]:
        """The names of the models that the server lists; [] if it does not say."""
        import openai

        try:
            return run(asyncio.wait_for(self.list_models(), self.endpoint.timeout_sec))
        except (openai.OpenAIError, TimeoutError, ValueError, TypeError, AttributeError, RecursionError):
            return []

    def count(self, what: str, number: int) -> None:
        self.spent[what] = self.spent.get(what, 0) + number


def run(work: Coroutine) -> Any:
    """What `work` returns, also where this thread has an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def read_fault(body: bytes) -> tuple[int, str] | None:
    """(status, what is said) of an error in a response of status 200, as some routers send them; None if there is none."""
    try:
        fault = json.loads(body)["error"]
        return (fault["code"], str(fault["message"])) if type(fault["code"]) is int else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def written(message: Mapping[str, Any]) -> str:
    """The text of a message, or why the model has refused. Some servers send it in parts, of which some are thoughts."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    text = content or message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError
    return text


def read_first_token(logprobs: Any) -> dict[str, float] | None:
    """{token: log-probability} of the first token with a word in it, from a choice's `logprobs`; None if there are none."""
    positions = (logprobs or {}).get("content") or []
    if not positions:
        return None
    first = next((one for one in positions if word(one["token"])), positions[0])
    # The chosen token is not always among the likeliest, which a server may leave out.
    likeliest = [*(first.get("top_logprobs") or []), first]
    return {one["token"]: float(one["logprob"]) for one in likeliest if one["logprob"] is not None}


def said_by(error: Any) -> str:
    """What a server said in its error, with the name of the parameter if it gives one."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or error.response.text or error.message
    return f"{said} ({body['param']})" if body.get("param") and str(body["param"]) not in str(said) else str(said)


def wait_asked_for(error: Any) -> float | None:
    """The seconds of a header Retry-After; None if there is none, or if it is a date."""
    try:
        return max(0.0, float(error.response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
