"""The reward of a vision-language model behind an OpenAI-compatible endpoint: its questions, its answers, and what a server
may do wrong."""

import asyncio
import contextlib
import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from chat_server import Request, TinyModel, chat_server, completion, image_of, text_of
from conftest import assert_refused, json_lines, make_config, ran, refuse, run_script, run_shell, snapshot, stage_of
from scored import BATCH, pixels, redness, scores

from b2diffurl.configuration.settings import read_settings
from b2diffurl.rewards import chat, load_reward, score, vlm
from b2diffurl.rewards.answers import LONGEST, rating, shortened, yes_probability
from b2diffurl.rewards.http import encode

CPU = torch.device("cpu")


def red(request: Request) -> float:
    """How red the request's image is, 0.05 to 0.95: the probability of yes of the model below."""
    image = image_of(request)
    return 0.05 + 0.9 * redness(np.asarray(image)) if image else 0.5


def judge(request: Request) -> dict:
    """A model that sees: yes as likely as the image is red, in two spellings, or a rating of as many tenths."""
    if request.get("logprobs"):
        chance = red(request)
        likeliest = {"Yes": 0.75 * chance, " yes": 0.25 * chance, "No": 0.5 * (1 - chance), "no": 0.5 * (1 - chance)}
        return completion("Yes", {token: math.log(value) - 0.1 for token, value in likeliest.items()})
    return completion(json.dumps({"reason": f"{len(text_of(request))} letters", "score": round(10 * red(request), 3)}))


def own(url: str, **more) -> dict:
    """Settings of the reward, of a model `m` at a server."""
    given = {"url": url, "model": "m", "timeout_sec": 10.0, "num_retries": 1, "concurrency": 3} | more
    return {"reward.name": "vlm"} | {f"reward.vlm.{key}": value for key, value in given.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Short waits between tries, no server known from another test, and no key of the user's."""
    monkeypatch.setattr(chat, "FIRST_WAIT_SEC", 0.01)
    vlm.probed.clear()
    monkeypatch.delenv("REWARD_VLM_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def images() -> torch.Tensor:
    """Four random images uint8 [4,16,16,3] of different redness, and the last one again."""
    found = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for n in range(5):
        found[n, :, :, 0] = found[n, :, :, 0] // (n + 1)
    found[4] = found[3]
    return found


PROMPTS = ["a red circle", "a blue {square}", 'a "green" cross', "a cat", "a cat"]


@pytest.fixture
def reward() -> Callable:
    """reward(url, **settings) -> the loaded reward."""
    return lambda url, **more: load_reward("vlm", read_settings(make_config(own(url, **more))).rewards, CPU)


# ---- what an answer says ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"reason": "good", "score": 7}', 0.7),
        ('```json\n{"score": 10}\n```', 1.0),
        ('{"score": "8"}', 0.8),
        ('{"score": 8} … so {"score": 8}', 0.8),
        ("Score: 7", 0.7),
        ("7/10", 0.7),
        ("10/10", 1.0),
        ("7.5 out of 10.", 0.75),
        ("It is an 8.", 0.8),
        ("1e1", 1.0),
        ("0", 0.0),
        ('{"score": 8} or {"score": 9}', None),
        ("7/100", None),
        ("I give 2 apples a 7", None),
        ("11", None),
        ("-1", None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e999}', None),
        ('{"score": ' + "1" * 400 + "}", None),
        ('{"score": "7/10"}', 0.7),
        ('{"reason": "the "2" is {red}", "score": 7,}', 0.7),
        ("{'reason': '2 apples', 'score': 7}", 0.7),
        ('{"reason": "There are 2 apples of the', None),
        ('{"reason": "red", "score": 1', None),
        ("<think>2 apples, so 4?</think>\n7", 0.7),
        ("Score: **7**/10", 0.7),
        ("7 (out of 10)", 0.7),
        ("There are 2 apples. " + "They are red. " * 200, None),
        ("Hm. " * 1000 + '{"score": 7}', 0.7),
        ("9" * 100_000, None),
        ("good", None),
        ("", None),
    ],
)
def test_a_rating_is_read_or_it_is_not(text, value):
    """One number within the scale, alone or as JSON; several different ones, or one outside, are no answer."""
    found = rating(text, 0, 10)
    assert math.isnan(found) if value is None else found == pytest.approx(value)


def test_a_rating_of_another_scale():
    assert [rating(text, 1, 5) for text in ("1", "2", "5")] == [0.0, 0.25, 1.0]
    assert math.isnan(rating("0", 1, 5))


def test_a_number_in_an_answer_that_was_cut_off_is_no_rating():
    """It may be part of the reason, or of a longer number. The whole object counts, and so does a bare number."""
    texts = ["<think>The image has 2 apples", "There are 2", '{"score": 7} I say so bec', " 7"]
    found = [rating(text, 0, 10, is_cut=True) for text in texts]
    assert found == pytest.approx([math.nan, math.nan, 0.7, 0.7], nan_ok=True)


def test_of_a_long_answer_beginning_and_end_are_kept():
    assert shortened("a" * LONGEST) == "a" * LONGEST
    kept = shortened("a" * 3000 + "b" * 3000)
    assert (len(kept), kept.strip("ab")) == (LONGEST, "…")


def test_the_probability_of_yes():
    """Spellings add up, what is neither is left out, and without either there is none."""
    log = math.log
    assert yes_probability({"Yes": log(0.5), " yes": log(0.1), "No": log(0.2), "The": log(0.2)}) == pytest.approx(0.75)
    assert yes_probability({"no": log(0.5), "YES": -math.inf}) == 0.0
    assert math.isnan(yes_probability({"Sure": -0.1}))
    assert yes_probability({"Ġyes": log(0.5), "▁Yes.": log(0.1), "**no": log(0.2)}) == pytest.approx(0.75)
    assert yes_probability({"yes": 1e9, "no": -9999.0}) == 1.0


def test_a_model_that_says_something_else_has_not_said_yes():
    """What thinks first may think yes and no at the end of its list: that is no answer."""
    assert math.isnan(yes_probability({"<think>": 0.0, "Yes": -20.0, "No": -21.0}))


# ---- what is asked ----


def test_the_probability_of_yes_is_the_reward(reward, images):
    """Each image is asked about by itself, with its prompt as it is; a repeated one once. The answer is kept."""
    with chat_server(judge) as (url, requests):
        loaded = reward(url)
        del requests[:]
        rewards, parts = score(loaded, images, PROMPTS)
    shares = [0.05 + 0.9 * redness(image.numpy()) for image in images]
    assert rewards.tolist() == pytest.approx(shares, abs=1e-6)
    assert parts == {"answer": ["Yes"] * 5}
    assert len(requests) == 4
    assert {text_of(request) for request in requests} == {
        f'Does this image show "{prompt}"? Answer with yes or no.' for prompt in PROMPTS
    }
    sent = {image_of(request).tobytes() for request in requests}
    assert sent == {image.numpy().tobytes() for image in images}
    asked = ("model", "temperature", "seed", "logprobs", "top_logprobs")
    assert [requests[0][key] for key in asked] == ["m", 0, 0, True, 20]
    assert loaded.spent() == {"requests": 4, "prompt_tokens": 40, "completion_tokens": 4}
    assert loaded.spent() == {}


def test_several_questions_are_weighted(reward, images):
    """The reward is the weighted mean of the questions' scores, and parts have each."""
    with chat_server(lambda request: completion("8" if "sharp" in text_of(request) else "4/10")) as (url, _):
        settings = {"score": "rating", "questions": ("Is it {prompt}?", "Is it sharp?"), "question_weights": (3.0, -1.0)}
        of_reward = read_settings(make_config(own(url, **settings))).rewards.own["vlm"]
        rewards, parts = score(vlm.Judge(of_reward), images, PROMPTS)  # a model that says the same of all images
    assert rewards.tolist() == pytest.approx([(3 * 0.4 - 0.8) / 4] * 5)
    assert parts["question1"].tolist() == pytest.approx([0.4] * 5)
    assert parts["question2"].tolist() == pytest.approx([0.8] * 5)
    assert parts["answer1"] == ["4/10"] * 5


def test_a_rating_asks_for_a_schema_and_goes_on_without(reward, images, caplog):
    """A server that refuses a field is asked without it, or with its newer name, from then on; the log says so once."""

    def picky(request: Request):
        if "response_format" in request:
            return 400, {}, {"error": {"message": "This model does not support response format `json_schema`"}}
        for field in ("temperature", "max_tokens"):
            if field in request:
                return 400, {}, {"error": {"message": f"Unsupported parameter: '{field}'", "param": field}}
        return judge(request)

    with chat_server(picky) as (url, requests), caplog.at_level("INFO"):
        rewards, parts = score(reward(url, score="rating", extra_body={"top_k": 1}), images, PROMPTS)
    shares = [round(0.5 + 9 * redness(image.numpy()), 3) / 10 for image in images]
    assert rewards.tolist() == pytest.approx(shares, abs=1e-6)
    assert all("letters" in answer for answer in parts["answer"])
    assert requests[-1]["max_completion_tokens"] == 256
    assert requests[-1]["top_k"] == 1
    assert requests[0]["response_format"]["json_schema"]["schema"]["required"] == ["reason", "score"]
    assert [caplog.text.count(f"takes no {field}") for field in ("response_format", "temperature", "max_tokens")] == [2] * 3


def test_an_answer_that_cannot_be_read_is_asked_for_once_more(reward, images):
    """The second try goes on with the conversation; what cannot be read then scores NaN, and its text is kept."""

    def shy(request: Request):
        if "circle" in text_of(request) or "square" in text_of(request):
            return completion("Hm, 3 or 4?\x1b[31m" + "x" * 5000)
        if len(request["messages"]) == 3 and "square" in request["messages"][0]["content"][-1]["text"]:
            return completion("5")
        return completion("it depends") if len(request["messages"]) == 3 else completion("7")

    with chat_server(shy) as (url, requests):
        rewards, parts = score(reward(url, score="rating", questions=("About {prompt}:",)), images, PROMPTS)
    assert rewards.isnan().tolist() == [True, False, False, False, False]
    assert rewards[1:].tolist() == pytest.approx([0.5, 0.7, 0.7, 0.7])
    assert parts["answer"][0] == "it depends"
    again = next(request for request in requests if len(request["messages"]) == 3)
    assert [message["role"] for message in again["messages"]] == ["user", "assistant", "user"]
    assert len(again["messages"][1]["content"]) == LONGEST
    assert text_of(again).startswith("Answer with a JSON object")


def with_logprobs(*positions: dict[str, float | None]) -> dict:
    """A completion with these tokens, each position's first one chosen."""
    found = completion("")
    rows = [[{"token": token, "logprob": value} for token, value in one.items()] for one in positions]
    found["choices"][0]["logprobs"] = {"content": [row[0] | {"top_logprobs": row} for row in rows]}
    return found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "7"}]}, "7"),
        ({"content": None, "refusal": "I will not look"}, "I will not look"),
        ({"content": None, "reasoning_content": "hm"}, ""),
    ],
    ids=["parts", "refusal", "thoughts"],
)
def test_forms_of_an_answers_text(answer, expected):
    with chat_server(lambda _: {"choices": [{"message": answer, "finish_reason": "length"}], "usage": None}) as (url, _):
        assert chat.Chat(chat.Endpoint(url, "m", 10, 0, 1), {}).ask([[]]) == [chat.Answer(expected, None, None, True)]


def test_the_first_token_is_the_first_with_a_word_in_it():
    positions = {"\n": -0.1}, {"**": -0.2, "Yes": -3.0}, {"Yes": -0.3, "No": None}
    with chat_server(lambda _: with_logprobs(*positions)) as (url, _):
        (answer,) = chat.Chat(chat.Endpoint(url, "m", 10, 0, 1), {}).ask([[{"role": "user", "content": []}]])
    assert answer.first_token == {"Yes": -0.3}


def test_an_image_that_a_server_will_not_look_at_is_unreadable(reward, images):
    """A hosted server refuses one image by its filter: the others are scored, and its answer says why."""
    refused = (400, {}, {"error": {"code": "content_filter", "message": "filtered"}})
    with chat_server(lambda request: refused if "a cat?" in json.dumps(request["messages"]) else judge(request)) as (url, _):
        rewards, parts = score(reward(url, questions=("{prompt}?",)), images, PROMPTS)
    assert rewards.isnan().tolist() == [False, False, False, True, True]
    assert parts["answer"][3] == "filtered"


# ---- the key ----


def test_the_key_is_the_environments(reward, images, monkeypatch):
    """REWARD_VLM_API_KEY is sent; OPENAI_API_KEY to OpenAI alone; and a server that repeats the key is not repeated."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-secret")
    with chat_server(judge) as (url, requests):
        reward(url)
        assert requests[-1]["authorization"] == "Bearer none"
        monkeypatch.setenv("REWARD_VLM_API_KEY", "sk-own-secret")
        vlm.probed.clear()
        reward(url)
        assert requests[-1]["authorization"] == "Bearer sk-own-secret"
    assert chat.Endpoint("https://api.openai.com/v1", "m", 1, 0, 1).key == "sk-own-secret"
    monkeypatch.delenv("REWARD_VLM_API_KEY")
    assert chat.Endpoint("https://api.openai.com/v1", "m", 1, 0, 1).key == "sk-openai-secret"
    assert chat.Endpoint("https://api.openai.com.evil.org/v1", "m", 1, 0, 1).key == ""
    monkeypatch.setenv("REWARD_VLM_API_KEY", "sk-own-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    assert chat.Chat(chat.Endpoint("https://api.openai.com/v1", "m", 1, 0, 1), {}).client().organization == "org-secret"
    assert chat.Chat(chat.Endpoint("https://openai.com/v1", "m", 1, 0, 1), {}).client().organization is None
    refused = (401, {}, {"error": {"message": "no such key: sk-own-secret"}})
    said = r"refuses the key in REWARD_VLM_API_KEY \(401: no such key: \*\*\*\)"
    with chat_server(lambda _: refused) as (url, _), pytest.raises(ValueError, match=said):
        reward(url)


@pytest.mark.parametrize("key", ["schlüssel", "two words", "a\nb"])
def test_a_key_that_no_header_can_have(reward, monkeypatch, key):
    monkeypatch.setenv("REWARD_VLM_API_KEY", key)
    with pytest.raises(ValueError, match="has a character in it that no header can have") as refused:
        vlm.check("vlm", read_settings(make_config(own("http://127.0.0.1:9/v1"))).rewards.own["vlm"], [])
    assert key not in str(refused.value)


def test_a_server_on_this_machine_is_asked_without_a_proxy(reward, images, monkeypatch):
    """Whatever the environment says: the proxy would see the images, or knows no way here."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with chat_server(judge) as (url, _):
        assert score(reward(url), images, PROMPTS)[0].isfinite().all()


# ---- what a server may do wrong ----


def first(*answers) -> Callable:
    """A server whose first answers are these, and whose others are right."""
    left = list(answers)
    return lambda request: left.pop(0) if left else judge(request)


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, b"internal"),
        (429, {"Retry-After": "0.02"}, {"error": {"message": "slow down"}}),
        (503, {}, b""),
        (-1, {}, b'{"choices": ['),
        (200, {}, b"<html>"),
        (200, {}, b"[]"),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": 7}}]}),
        (200, {}, b"[" * 100_000),
        (200, {}, {"error": {"code": 502, "message": "bad gateway"}}),
        (529, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"<html>"),
    ],
    ids=["500", "429", "503", "cut off", "html", "list", "no choice", "no text", "brackets", "error in 200", "529"],
)
def test_a_fault_that_passes_costs_one_request(reward, images, fault, caplog):
    """Sent again, to the same scores, with a line in the log."""
    with chat_server(judge) as (url, _):
        expected = score(reward(url), images, PROMPTS)[0]
    with chat_server(first(fault)) as (url, _):
        loaded = reward(url, concurrency=1)
        assert torch.equal(score(loaded, images, PROMPTS)[0], expected)
    assert caplog.text.count("asking again (1 of 1)") == 1
    assert loaded.chat.spent["requests"] == 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _: (500, {}, b"out of memory"), r"answered 500: out of memory.*asked 2 times"),
        (lambda _: (429, {}, {"error": {"message": "quota"}}), r"answered 429: quota.*Lower reward.vlm.concurrency"),
        (lambda _: (0, {}, b""), r"did not answer within 0.3 s \(reward.vlm.timeout_sec\); asked 2 times"),
        (lambda _: time.sleep(0.6) or judge(_), "did not answer within 0.3 s"),
        (lambda _: (-1, {}, b"{"), "has cut its answer off|cannot be asked"),
        (lambda _: b"x" * (2**24 + 9), "is longer than 16777216 bytes"),
        (lambda _: (404, {}, {"error": {"message": "The model `m` does not exist"}}), "has no model 'm'"),
        (lambda _: (401, {}, {"detail": "who?"}), "wants a key; set the variable REWARD_VLM_API_KEY"),
        (lambda _: (302, {"Location": "http://127.0.0.1:9/"}, b""), "refuses the request to 'm', reward.vlm.model \\(302"),
        (lambda _: (400, {}, {"error": {"message": "m is not a multimodal model"}}), "m is not a multimodal model"),
        (lambda _: (400, {}, {"error": "no logprobs here"}), "no logprobs here.*reward.vlm.score=rating"),
        (lambda _: {"error": {"code": 402, "message": "no credits"}}, r"refuses the request to 'm'.*\(402: no credits\)"),
        (lambda _: completion("a red square", {"a": -0.1}, tokens=9), "does not see them"),
        (lambda r: completion(f"{red(r):.2f}"), "gives no log-probabilities.*reward.vlm.score=rating"),
        (lambda r: completion(f"{red(r):.2f}", {"The": -0.1}), "was told 'Answer with yes or no.' and answered '0"),
    ],
    ids=[
        "500",
        "429",
        "drips",
        "slow",
        "cut",
        "huge",
        "404",
        "401",
        "302",
        "400",
        "logprobs",
        "402",
        "blind",
        "no log-probs",
        "no yes",
    ],
)
def test_a_server_that_will_not_do_is_told_before_anything_is_sampled(empty, overrides, answer, said):
    """One sentence, soon, and nothing written."""
    with chat_server(answer) as (url, _):
        timeout = 0.3 if "did not answer" in said else 10.0
        refuse(empty, "sample", overrides | own(url, timeout_sec=timeout), said)


def test_nobody_there(empty, overrides):
    with chat_server(judge) as (url, _):
        pass
    refuse(empty, "sample", overrides | own(url), f"{url} cannot be asked .*is it running.*asked 2 times")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": ""}, "reward.vlm.url is ''"),
        ({"url": "http://127.0.0.1:9/v1/chat/completions"}, "up to its version"),
        ({"url": "http://[::1/v1"}, "reward.vlm.url is"),
        ({"url": "http://127.0.0.1:99999/v1"}, "reward.vlm.url is"),
        ({"url": "https://x.openai.azure.com/openai?api-version=1"}, "reward.vlm.url is"),
        ({"scale": (5, 1)}, r"reward.vlm.scale is \(5, 1\)"),
        ({"scale": (5,)}, r"reward.vlm.scale is \(5,\)"),
        ({"questions": ("",)}, "reward.vlm.questions is"),
        ({"question_weights": (1.0,)}, "question_weights has 1 numbers and reward.vlm.questions 0"),
        ({"questions": ("a", "b"), "question_weights": (1.0, 0.0)}, "none of them 0"),
        ({"score": "maybe"}, "reward.vlm.score is 'maybe'; known: 'yes', 'rating'"),
    ],
)
def test_settings_that_cannot_work(empty, overrides, settings, said):
    refuse(empty, "sample", overrides | own(**{"url": "http://127.0.0.1:9/v1"} | settings), said)


def test_a_model_without_a_name_is_told_the_names(empty, overrides):
    with chat_server(judge) as (url, _):
        refuse(empty, "sample", overrides | own(url, model=""), f"reward.vlm.model is empty.*{url} serves m")


@pytest.mark.parametrize(
    ("listed", "names"),
    [([f"m{n}" for n in range(500)], ["m0", "m19 and 480 more"]), ([None, 5, "\x1b"], [r"\\x1b"])],
    ids=["many", "odd"],
)
def test_names_of_models_that_are_told(listed, names, monkeypatch):
    """At most twenty, and only what can be printed."""
    body = json.dumps({"object": "list", "data": [{"id": name} for name in listed]}).encode()
    monkeypatch.setattr("chat_server.MODELS", body)
    with chat_server(judge) as (url, _), pytest.raises(ValueError, match=".*".join(names)) as refused:
        vlm.check("vlm", read_settings(make_config(own(url, model=""))).rewards.own["vlm"], [])
    assert len(str(refused.value)) < 300


def test_whether_a_server_repeats_itself_is_said(reward, caplog):
    """Once, at the start: yes, or which scores one image got."""
    with chat_server(judge) as (url, _), caplog.at_level("INFO"):
        reward(url)
        reward(url)
    assert caplog.text.count("repeats itself: 3 times the score") == 1
    numbers = iter(range(3, 100))
    with chat_server(lambda _: completion(f"{next(numbers) % 10}")) as (url, _):
        reward(url, score="rating")
    assert "does not repeat itself: one image scored 0." in caplog.text


def test_it_works_where_an_event_loop_runs(reward, images):
    """As in a notebook."""

    async def cell():
        with chat_server(judge) as (url, _):
            return score(reward(url), images, PROMPTS)[0]

    assert asyncio.run(cell()).isfinite().all()


# ---- in a run ----


def test_a_stage_is_scored_and_its_cost_is_said(begin, monkeypatch):
    """Scores, answers and cost of a stage are on disk, of each distinct image one request; the key is not."""
    monkeypatch.setenv("REWARD_VLM_API_KEY", "0123456789abcdef")
    further = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    with chat_server(judge) as (url, requests):
        folder, settings = begin(own("http://127.0.0.1:9/v1", **further))
        said = ran(folder, "select", settings | own(url, **further))
    assert {request["authorization"] for request in requests} == {"Bearer 0123456789abcdef"}
    assert all(request["chat_template_kwargs"] == {"enable_thinking": False} for request in requests)
    assert not [name for name, data in snapshot(folder, log=True).items() if b"0123456789abcdef" in data]
    expected = [0.05 + 0.9 * redness(image) for image in pixels(folder)]
    assert [row["reward"] for row in scores(folder)] == pytest.approx(expected, abs=1e-6)
    assert {row["parts"]["answer"] for row in scores(folder)} == {"Yes"}
    assert "reward vlm has cost 18 requests, 180 prompt tokens, 18 completion tokens" in said
    manifest = json.loads((stage_of(folder).folder / "select.json").read_text())
    assert manifest["spent"] == {"vlm": {"requests": 18, "prompt_tokens": 180, "completion_tokens": 18}}
    assert len(requests) == 18 + 5
    assert not stage_of(folder).scored.exists()


def moody(request: Request) -> dict:
    """A rating, but of one image of the stage none."""
    image = image_of(request)
    same = image and image.size == (64, 64) and np.array_equal(np.asarray(image), moody.image)
    return completion("I had rather not") if same else judge(request)


def test_an_unreadable_answer_stops_the_run_or_gets_the_prompts_mean(begin):
    """By default the run stops with the image's id, and what was scored is not asked for again; or such an image gets the
    mean of its prompt's other images, and is counted."""
    folder, settings = begin(own("http://127.0.0.1:9/v1", score="rating"))
    moody.image = pixels(folder)[6]
    with chat_server(moody) as (url, requests):
        settings |= own(url, score="rating")
        assert_refused(
            run_script(folder, "select", settings), r"vlm is not finite for images \[6\].*reward.vlm.unreadable=mean"
        )
        assert scores(folder)[6]["reward"] is None
        assert scores(folder)[6]["parts"]["answer"] == "I had rather not"
        del requests[:]
        said = ran(folder, "select", settings | own(url, score="rating", unreadable="mean"))
    assert len([request for request in requests if image_of(request) and image_of(request).size == (64, 64)]) == BATCH + 1
    rows = scores(folder)
    others = [row["reward"] for row in rows if row["prompt"] == rows[6]["prompt"] and row["id"] != 6]
    assert rows[6]["reward"] == pytest.approx(sum(others) / len(others), abs=1e-6)
    assert "1 unreadable" in said


def test_an_unreadable_answer_that_is_filled_is_asked_for_once(begin):
    """A batch with one is kept as others are, when the run stops by another fault: the key runs out of credits."""
    lenient = {"score": "rating", "unreadable": "mean", "concurrency": 1}
    folder, settings = begin(own("http://127.0.0.1:9/v1", **lenient))
    moody.image = pixels(folder)[1]
    left, scored = [True] * BATCH, lambda request: image_of(request).size == (64, 64)

    def poor(request: Request):
        if not scored(request) or len(request["messages"]) > 1:
            return moody(request)
        return moody(request) if left and left.pop() else (402, {}, {"error": {"message": "no credits"}})

    with chat_server(poor) as (url, requests):
        settings |= own(url, **lenient)
        assert_refused(run_script(folder, "select", settings), "402: no credits")
        assert [path.name for path in stage_of(folder).scored.iterdir()] == ["vlm_00000.json"]
        left[:] = [True] * 100
        del requests[:]
        said = ran(folder, "select", settings)
    assert len([request for request in requests if image_of(request) and scored(request)]) == len(pixels(folder)) - BATCH
    rows = scores(folder)
    others = [row["reward"] for row in rows if row["prompt"] == rows[1]["prompt"] and row["id"] != 1]
    assert rows[1]["reward"] == pytest.approx(sum(others) / len(others), abs=1e-6)
    assert "1 unreadable" in said


def test_an_evaluation_leaves_out_what_cannot_be_filled(overrides, workplace):
    """One image a prompt has no others: its figure is then the mean of those that were read, and says of how many."""

    def answer(request: Request):
        is_drawn = image_of(request) and image_of(request).size == (64, 64)
        return completion("no") if is_drawn and "blue" in json.dumps(request["messages"]) else judge(request)

    with chat_server(answer) as (url, _):
        settings = {f"reward.vlm.{key}": value for key, value in (("score", "rating"), ("unreadable", "mean"))}
        settings = overrides | own(url) | settings | {"reward.name": "clip", "eval.judge": "vlm", "eval.num_images": 3}
        said = ran(workplace, "eval", settings, "--checkpoint=base", "--sampler=training")
    assert "reward vlm is not finite for images [1], the only ones of their prompts" in said
    result = json.loads(next(workplace.rglob("eval/*/result.json")).read_text())
    assert [value is None for value in result["values"]["accuracy"]] == [False, True, False]
    assert (result["accuracy_n"], result["accuracy"] > 0) == (2, True)


def test_bits_do_not_depend_on_the_neighbours(reward, images, tmp_path):
    """A real model behind the server: an image's score has the same bits alone, in a batch, and in another order."""
    with chat_server(TinyModel(tiny.llava(tmp_path / "llava", answers=("yes", "no")))) as (url, _):
        loaded = reward(url)
        together = score(loaded, images, PROMPTS)[0]
        backwards = score(loaded, images.flip(0), PROMPTS[::-1])[0].flip(0)
        alone = torch.cat([score(loaded, images[n : n + 1], PROMPTS[n : n + 1])[0] for n in range(5)])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) > 2


# ---- a server of others ----


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """(URL, name of the model) of `transformers serve` with a tiny random LLaVA that answers with a digit."""
    folder = tmp_path_factory.mktemp("served")
    root, log = tiny.llava(folder / "llava", answers=tuple("0123456789")), folder / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", root, "--port", str(port), "--device", "cpu"]
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as server:
        try:
            until = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1):
                    break
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, "transformers serve has not started"
                time.sleep(0.2)
            yield f"http://localhost:{port}/v1", str(root)
        finally:
            server.kill()


@pytest.mark.long
def test_transformers_serve_gives_ratings(transformers_server, reward, images):
    """A rating is the digit that the model itself says of the image, greedily; it sees, and it repeats itself."""
    url, model = transformers_server
    loaded, itself = reward(url, model=model, score="rating", max_tokens=1), TinyModel(Path(model))
    rewards, parts = score(loaded, images, PROMPTS)
    asked = [loaded.message(encode(image), loaded.text(0, prompt)) for image, prompt in zip(images, PROMPTS, strict=True)]
    said = [itself({"messages": [message]})["choices"][0]["message"]["content"] for message in asked]
    assert parts["answer"] == said
    assert len(set(said)) > 1
    assert rewards.tolist() == pytest.approx([int(digit) / 10 for digit in said])
    assert loaded.spent()["prompt_tokens"] > 4 * 16  # an image takes 16 tokens


@pytest.mark.long
def test_transformers_serve_gives_no_log_probabilities(transformers_server, reward):
    url, model = transformers_server
    with pytest.raises(ValueError, match="gives no log-probabilities"):
        reward(url, model=model)


@pytest.mark.long
def test_a_stage_of_the_embedded_model_is_judged_by_transformers_serve(transformers_server, tmp_path):
    """The default run, cut to one stage, by the shell script: ratings are digits, cost is told, the LoRA is judged."""
    url, model = transformers_server
    settings = own(url, model=model, score="rating", max_tokens=1, timeout_sec=60.0)
    settings |= {
        "num_threads": 1,
        "log_path": str(tmp_path),
        "sample.batch_size": 2,
        "eval.num_images": 4,
        "eval.batch_size": 4,
        "eval.deployed.num_steps": 4,
    }
    names = {"ExpName": "judged", "SavePath": str(tmp_path), "StageCnt": "1", "BatchCnt": "2"}
    run_shell(tmp_path, settings, names)
    rows = json_lines(tmp_path / "judged" / "stage0" / "scores.jsonl")
    assert len(rows) == 2 * 2 * 5
    assert [row["reward"] for row in rows] == pytest.approx([int(row["parts"]["answer"]) / 10 for row in rows])
    log = next(tmp_path.glob("judged*.log")).read_text()
    assert log.count("repeats itself") == 1
    assert "reward vlm has cost" in log
    assert (tmp_path / "judged" / "report.html").is_file()
