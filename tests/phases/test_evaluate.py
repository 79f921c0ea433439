"""run_eval.py: it leaves the experiment alone, takes from it what no flag says, and ends in a verdict."""

from pathlib import Path

import pytest
from conftest import experiment, judged, ran, run_script, snapshot

from b2diffurl.configuration.keys import KEYS
from b2diffurl.runtime.files import read_json, read_json_lines, write_record

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_judging_leaves_the_experiment_alone(workplace, overrides):
    """Evaluations, report and verdict are added, a second call changes nothing, and --json prints its answer alone."""
    before = snapshot(workplace)
    arguments = ("--checkpoint=base,last", "--prompts=train,test", "--sampler=training")
    first = run_script(workplace, "eval", overrides, *arguments)
    assert first.code == 0, first.stderr
    after = snapshot(workplace)
    assert {name: after[name] for name in before} == before
    added = {name.removeprefix("model/lora/tiny/").split("/")[0] for name in after.keys() - before.keys()}
    assert added == {"eval", "eval.jsonl", "eval_seconds.jsonl", "report", "report.html", "verdict.json"}
    line = judged(workplace, overrides, *arguments)
    assert snapshot(workplace) == after
    text = read_json(experiment(workplace) / "verdict.json")["text"]
    assert first.stdout.splitlines()[-len(text) :] == text
    assert {"reward", "accuracy", "n_images", "checkpoint"} <= line.keys()
    assert (line["n_images"], line["checkpoint"], line["prompts"], line["sampler"]) == (6, "stage1", "test", "training")
    assert str(experiment(workplace).relative_to(workplace) / "report.html") in first.stdout


def test_other_settings_than_the_training_s_are_named(workplace, overrides):
    """What stands as `reward` and as `training` sampler would be another: one line says which, and nothing is refused."""
    settings = overrides | {"reward.name": "jpeg_compressibility", "sample.num_steps": 5}
    ended = run_script(workplace, "eval", settings, "--checkpoint=base", "--sampler=training")
    assert ended.code == 0, ended.stderr
    said = [line for line in ended.stdout.splitlines() if "in training it was" in line]
    assert len(said) == 1
    assert "reward is jpeg_compressibility, in training it was clip; sample.num_steps is 5, in training it was 4;" in said[0]
    ended = run_script(workplace, "eval", overrides, "--checkpoint=base", "--sampler=training")
    assert "in training it was" not in ended.stdout


def test_what_no_flag_says_is_as_in_training(workplace, overrides):
    """Reward, its model, sampler and LoRA rank of another preset: with the flags of what may differ from call to call alone,
    what was judged with all of them is found again. A line names what was taken from config.json."""
    arguments = ("--checkpoint=base,last", "--sampler=training")
    path = experiment(workplace) / "config.json"
    before = path.read_bytes()
    full = run_script(workplace, "eval", overrides, *arguments)
    assert full.code == 0, full.stderr
    assert " has it: " not in full.stdout
    judged_once = snapshot(experiment(workplace) / "eval")
    few = {key: value for key, value in overrides.items() if KEYS[key].may_change}
    assert {"sample.num_steps", "reward.clip.model", "train.learning_rate"} <= overrides.keys() - few.keys()
    judges = ("--config.eval.judge=", "--config.eval.diversity=('clip',)")  # which are as the call has them
    short = run_script(workplace, "eval", few, *arguments, *judges, preset="shapes")
    assert short.code == 0, short.stderr
    assert judged(workplace, few, *arguments, *judges, preset="shapes") == judged(workplace, overrides, *arguments)
    assert snapshot(experiment(workplace) / "eval") == judged_once
    assert path.read_bytes() == before
    (said,) = (line for line in short.stdout.splitlines() if " as model/lora/tiny/config.json has it: " in line)
    for words in ("sample.num_steps 4", "sample.guidance_scale 5.0", "train.lora_rank 4", "reward.clip.model '"):
        assert words in said
    assert "in training it was" not in short.stdout


@pytest.mark.parametrize("record", [{"name": "own_code:f", "weights": None}, {"weights": {"clip": 1.0, "own_code:f": 1.0}}])
def test_code_that_only_a_record_names_is_not_run(workplace, overrides, record):
    """An experiment's folder may come from somebody else: its own reward is imported only where the call names it."""
    (workplace / "own_code.py").write_text(
        "open('ran', 'w')\n\ndef f(images, prompts):\n    return images.float().mean((1, 2, 3))\n"
    )
    path = experiment(workplace) / "config.json"
    found = read_json(path)
    found["config"]["reward"] |= record
    write_record(path, found)
    few = {key: value for key, value in overrides.items() if KEYS[key].may_change}
    ended = run_script(workplace, "eval", few, "--checkpoint=base")
    assert ended.code == 2
    assert "code of its own and is not run because a file says so" in ended.stderr
    assert not (workplace / "ran").exists()


def test_both_samplers_are_reported_by_default(workplace, overrides):
    """Held-out prompts, base and newest checkpoint, training's sampler and the deployed one: four rows of eval.jsonl, those
    of one sampler on the same noise, and the two samplers' images differ."""
    last = judged(workplace, overrides)
    rows = read_json_lines(experiment(workplace) / "eval.jsonl")
    assert [(row["checkpoint"], row["sampler"]) for row in rows] == [
        ("base", "training"),
        ("base", "deployed"),
        ("stage1", "training"),
        ("stage1", "deployed"),
    ]
    assert [(row["scheduler"], row["num_steps"], row["eta"]) for row in rows[:2]] == [
        ("", 4, 1.0),
        ("DDIMScheduler", 6, 0.0),
    ]
    assert rows[0]["reward"] != rows[1]["reward"]
    for base, tuned in zip(rows[:2], rows[2:], strict=True):
        assert base["conditions"] == tuned["conditions"]
        assert tuned["reward_gain"] == pytest.approx(tuned["reward"] - base["reward"])
    assert last == rows[-1]


def test_all_is_the_learning_curve_and_best_names_its_top(workplace, overrides):
    """Base and both stages, each judged once; --best takes what is there, chooses by some of the prompts and judges by the
    others, whose mean it gives, and says so. With a file to choose by it judges by all."""
    ended = run_script(workplace, "eval", overrides, "--all", "--sampler=training")
    assert ended.code == 0, ended.stderr
    path = experiment(workplace) / "eval.jsonl"
    rows = read_json_lines(path)
    assert [(row["checkpoint"], row["stage"]) for row in rows] == [("base", None), ("stage0", 0), ("stage1", 1)]
    files = snapshot(workplace)
    found = judged(workplace, overrides, "--best", "--sampler=training")
    assert snapshot(workplace) == files
    choice = found.pop("choice")
    assert found in rows
    values = {row["checkpoint"]: read_json(experiment(workplace) / row["folder"] / "result.json") for row in rows}
    means = {name: {prompt: [] for prompt in one["shown_prompts"]} for name, one in values.items()}
    for name, one in values.items():
        for prompt, value in zip(one["shown_prompts"], one["values"]["reward"], strict=True):
            means[name][prompt].append(value)
    (chooses,) = (
        prompt
        for prompt, (one, other) in means["base"].items()
        if max((sum(means[name][prompt]) / 2, name) for name in means) == (choice["chosen_by"]["mean"], choice["checkpoint"])
    )
    others = [value for prompt, pair in means[choice["checkpoint"]].items() if prompt != chooses for value in pair]
    assert choice["judged_by"]["mean"] == pytest.approx(sum(others) / len(others))
    said = ran(workplace, "eval", overrides, "--best", "--sampler=training")
    assert f"Best of 3 checkpoints: {choice['checkpoint']}, by reward on half of the held-out prompts (1)." in said
    (workplace / "others.txt").write_text("a red circle\na blue circle\n")
    choice = judged(workplace, overrides, "--best", "--sampler=training", "--validation=others.txt")["choice"]
    assert (Path(choice["chosen_by"]["prompts"]).name, choice["judged_by"]["n_prompts"]) == ("others.txt", 2)


def test_what_cannot_choose_is_refused(workplace, overrides):
    """A single prompt has no halves, and the same prompts would judge what they have chosen; nothing is judged."""
    (workplace / "one.txt").write_text("a red circle\n")
    for given, said in (
        ("--prompts=one.txt", "has a single one. Give another file to choose by"),
        ("--validation=test", "chosen and judged by the same prompts"),
        ("--validation=train", "has every prompt of --prompts=test"),  # under another name
    ):
        ended = run_script(workplace, "eval", overrides, "--best", given)
        assert ended.code == 2
        assert said in ended.stderr
    assert not (experiment(workplace) / "eval").exists()


def test_due_judges_every_so_many_stages(workplace, overrides):
    """After stage 1 of eval.every 2, base and stage 1 on held-out prompts; of 3, or with 0, nothing, but the report is
    written; for a stage that is not the newest not even that."""
    root = experiment(workplace)
    for every, stage, judged_now in ((2, 0, False), (3, 1, False), (0, 1, False), (2, 1, True)):
        ended = run_script(workplace, "eval", overrides | {"eval.every": every, "run_name": f"stage{stage}"}, "--due")
        assert ended.code == 0, ended.stderr
        assert (root / "eval.jsonl").is_file() == judged_now
        assert (root / "report.html").is_file() == (stage == 1)
    rows = read_json_lines(root / "eval.jsonl")
    assert [(row["checkpoint"], row["prompts"], row["sampler"]) for row in rows] == [
        ("base", "test", "training"),
        ("stage1", "test", "training"),
    ]
