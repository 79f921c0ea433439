"""Experiments are compared image by image, on the same noise or not at all."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import experiment

from b2diffurl.evaluation.pairing import pair, pair_all
from b2diffurl.experiment.evaluation_table import every_evaluation, identity, lora_sha256
from b2diffurl.runtime.files import read_json, write_json, write_json_lines, write_record


@pytest.fixture
def two(reported, tmp_path) -> tuple[Path, Path]:
    """Two experiments whose newest stages have other values: the judged one, and a copy of it, changed."""
    roots = tmp_path / "lora" / "a", tmp_path / "lora" / "b"
    for root in roots:
        shutil.copytree(experiment(reported), root, ignore=shutil.ignore_patterns("samples", "selected", "images", "*.html"))
        rows = [row for row in every_evaluation(root) if row["prompts"] == "test"]  # training's are the same ones here
        write_json_lines(root / "eval.jsonl", rows, sealed=True)
    return roots


def change(root: Path, how, checkpoint: str = "stage1", prompts: str = "test") -> None:
    """Apply `how` to the result of a checkpoint."""
    for row in every_evaluation(root):
        if (row["checkpoint"], row["prompts"]) == (checkpoint, prompts):
            path = root / row["folder"] / "result.json"
            result = read_json(path)
            how(result)
            write_record(path, result)


def rejudge(root: Path, conditions: str = "ffffffffffff", **facts) -> None:
    """As if everything had been judged under other conditions."""
    rows = []
    for row in every_evaluation(root):
        lora = "" if row["stage"] is None else lora_sha256(root, row["stage"], row["lora"])
        folder = row["folder"].rsplit("_", 1)[0] + "_" + identity(conditions + row["prompts"], lora)
        (root / row["folder"]).rename(root / folder)
        rows.append(row | {"conditions": conditions + row["prompts"], "folder": folder} | facts)
    write_json_lines(root / "eval.jsonl", rows, sealed=True)


def test_differences_are_paired_by_image(two):
    """Hand-worked: the mean of the second's minus the first's values, and its error, which is 0 for a constant shift."""
    a, b = two
    values = {a: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], b: [0.3, 0.3, 0.6, 0.5, 0.9, 0.6]}
    for root, numbers in values.items():
        change(root, lambda result, numbers=numbers: result["values"].update(reward=numbers))
    change(b, lambda result: result["values"].update(accuracy=[1.0] * 6))
    change(a, lambda result: result["values"].update(accuracy=[0.0] * 6))
    found = pair(two, "test", "training")
    compared = {one.figure: one.change for one in found.compared}
    gaps = np.subtract(values[b], values[a])
    assert compared["clip"].mean == pytest.approx(gaps.mean())
    assert compared["clip"].error == pytest.approx(gaps.std(ddof=1) / np.sqrt(6))
    assert not compared["clip"].is_significant
    assert (compared["accuracy"].mean, compared["accuracy"].error) == (1.0, 0.0)
    assert compared["accuracy"].is_significant
    assert compared["diversity/clip"].mean == 0.0
    assert found.compared[0].figure == "accuracy"
    assert not found.others


def test_the_base_model_s_images_show_that_the_noise_is_one(two):
    """Under other conditions, such as another reward, what pairs is the noise; a figure of another scorer is left out."""
    rejudge(two[1])
    assert {one.figure for one in pair(two, "test", "training").compared} >= {"accuracy", "clip"}
    change(two[1], lambda result: result["values"].update(reward=[9.0] * 6), "base")
    found = pair(two, "test", "training")
    assert "accuracy" in {one.figure for one in found.compared}
    assert "clip" in found.others
    change(two[1], drawn_otherwise, "base")
    assert not pair(two, "test", "training").judged


def drawn_otherwise(result: dict) -> None:
    """As if the base model had drawn other images, with other values."""
    result["values"] = {key: [value + 1.0 for value in values] for key, values in result["values"].items()}
    for measures in result["diversity"].values():
        measures.update({name: {prompt: value + 1.0 for prompt, value in one.items()} for name, one in measures.items()})
    result.update(images_sha256="0" * 64)


def test_rounding_hides_no_noise(two):
    """Another number of threads rounds the base's images otherwise: all else being equal they pair, and figures that are the
    same but for rounding are compared; of another base model they do not."""
    rejudge(two[1])

    def rounded(result: dict) -> None:
        result["values"]["reward"] = [value * 1.0003 for value in result["values"]["reward"]]
        result.update(images_sha256="0" * 64)

    change(two[1], rounded, "base")
    assert {one.figure for one in pair(two, "test", "training").compared} >= {"accuracy", "clip"}
    record = read_json(two[1] / "config.json")
    write_json(two[1] / "config.json", record | {"base_model": record["base_model"] | {"unet": "another"}})
    assert not pair(two, "test", "training").judged


@pytest.mark.parametrize(
    ("facts", "result", "reason", "option"),
    [
        ({"seed": 7}, {}, "eval.seed 0 and 7", "--config.eval.seed=0"),
        ({"batch_size": 3}, {}, "eval.batch_size 4 and 3", "--config.eval.batch_size=4"),
        ({"num_steps": 50}, {}, "the samplers are others", "--sampler=training"),
        ({}, {"n_images": 3}, "6 and 3 images", "--config.eval.num_images=6"),
        ({}, {"shown_prompts": ["a dog"] * 6}, "the prompts are others", "--prompts=test"),
        ({}, {}, "other machines, or by other versions", "--checkpoint=base,last"),
    ],
)
def test_what_cannot_be_paired_says_why_and_what_to_do(two, facts, result, reason, option):
    rejudge(two[1], **facts)
    change(two[1], lambda found: found.update(result))
    change(two[1], drawn_otherwise, "base")
    found = pair(two, "test", "training")
    assert not found.compared
    assert reason in "; ".join(found.reasons)
    command = found.commands[two[1]]
    assert command[:2] == ("python", "run_eval.py")
    assert option in command
    assert {"--config.exp_name=b", f"--config.save_path={two[1].parent}"} <= set(command)


def test_what_was_never_judged_gets_its_command(two):
    """On these prompts; of another base model none can help; each experiment gets one command."""
    (two[1] / "eval.jsonl").unlink()
    found = pair(two, "test", "training")
    assert found.reasons == ("b was not judged on held-out prompts by the training sampler",)
    assert f"--config.eval.num_images={6}" in found.commands[two[1]]
    third = shutil.copytree(two[1], two[1].parent / "c")
    assert [list(one.commands) for one in pair_all((*two, third), "test", "training")] == [[two[1]], [third], []]
    shutil.copy(two[0] / "eval.jsonl", two[1])
    rejudge(two[1])
    change(two[1], lambda result: result.update(images_sha256="0" * 64), "base")
    record = read_json(two[1] / "config.json")
    write_json(two[1] / "config.json", record | {"base_model": record["base_model"] | {"unet": "another"}})
    found = pair(two, "test", "training")
    assert "other base models" in found.reasons[0].replace("different", "other")
    assert "unet" in found.reasons[0]
    assert not found.commands


def test_prompts_are_known_by_their_text(two):
    """An evaluation on the other's prompt file, as the command makes it, pairs though it has another name."""
    rows = [row | {"prompts": "/elsewhere/test.json"} for row in every_evaluation(two[1]) if row["prompts"] == "test"]
    write_json_lines(two[1] / "eval.jsonl", rows, sealed=True)
    assert pair(two, "test", "training").compared
    assert pair(two[::-1], "test", "training").compared
