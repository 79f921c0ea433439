"""The verdict says what a run has changed, as the files have it, in a few lines that need no explanation.

Two stages of 18 images; 6 images judged of 3 prompts, fewer than speak for others
"""

import shutil

import numpy as np
import pytest
from conftest import run_script

from b2diffurl.evaluation.intervals import student
from b2diffurl.experiment.evaluation_table import evaluation_rows
from b2diffurl.reporting.page import write_report
from b2diffurl.reporting.verdict import refresh, verdict
from b2diffurl.reporting.verdict_text import NO_CHANGE, cells
from b2diffurl.runtime.files import read_json, read_json_lines, write_json, write_json_lines

pytestmark = pytest.mark.usefixtures("no_pictures")


def plant(root, **figures: tuple[float, float, float]) -> None:
    """Let the evaluations have other figures, (of the base, of both stages, every error), and no values of images."""
    rows = read_json_lines(root / "eval.jsonl")
    for row in rows:
        for key, (base, tuned, error) in figures.items():
            row |= {key: base if row["stage"] is None else tuned, f"{key}_se": error}
            row |= {} if row["stage"] is None else {f"{key}_gain": tuned - base, f"{key}_gain_se": error}
    write_json_lines(root / "eval.jsonl", rows, sealed=True)
    shutil.rmtree(root / "eval")


def test_its_figures_are_those_of_the_images(root):
    """Means, paired changes and intervals by numpy from the values of single images; held-out prompts come first."""
    found = verdict(root)
    assert (found["stage"], found["num_stages"], found["images"], found["judge"]) == (1, 2, 36, "")
    assert [(one["prompts"], one["sampler"]) for one in found["tables"]] == [("test", "training"), ("train", "training")]
    for table in found["tables"]:
        base, tuned = (read_json(root / row["folder"] / "result.json")["values"]["reward"] for row in table["rows"])
        (figure,) = (one for one in table["figures"] if one["key"] == "reward")
        change = np.subtract(tuned, base)
        half = student(5) * change.std(ddof=1) / 6**0.5
        assert figure["base"]["mean"] == pytest.approx(np.mean(base))
        assert figure["tuned"]["mean"] == pytest.approx(np.mean(tuned))
        assert list(figure["change"].values()) == pytest.approx([change.mean(), change.mean() - half, change.mean() + half])
        assert figure["significant"] == (abs(change.mean()) > half)
    assert refresh(root) == found
    assert read_json(root / "verdict.json")["text"] == found["text"]


def test_its_text_is_short_and_whole(root):
    """At most 20 lines; at most 104 characters but for commands and paths; the outcome in words, files and what to do."""
    found = verdict(root)
    assert len(found["text"]) <= 20
    assert [
        line for line in found["text"] if len(line) > 104 and not line.startswith(("LoRA: ", "report: ", "log: ", "Draw "))
    ] == []
    assert found["text"][0] == "Verdict on tiny after 2 of 2 stages, 36 images scored by clip."
    done = {"risen": "has risen", "fallen": "has fallen", NO_CHANGE: f"shows {NO_CHANGE}"}
    assert found["text"][1] == (
        f"On held-out prompts: reward {done[found['outcome']['reward']]}; accuracy {done[found['outcome']['accuracy']]}."
    )
    said = "Held-out prompts and Training prompts: so few that the intervals say nothing about other prompts."
    assert said in found["text"]  # there are 3
    assert "No sign of reward hacking." in found["text"]
    for start in ("LoRA: ", "report: ", "log: ", "Draw a prompt: python run_eval.py --config=", "Go on: the same command"):
        assert any(line.startswith(start) for line in found["text"])


def test_what_may_be_chance_is_no_change(root):
    """Four in ten of an error up is no significant change; ten errors up is a rise; the figures are planted."""
    plant(root, reward=(0.2, 0.204, 0.01), accuracy=(0.5, 0.7, 0.02))
    found = verdict(root)
    assert (found["outcome"]["reward"], found["outcome"]["accuracy"]) == (NO_CHANGE, "risen")
    by_name = {one["key"]: cells(one) for one in found["tables"][0]["figures"]}
    assert by_name["reward"] == (
        "reward",
        "0.200 [0.180, 0.220]",
        "0.204 [0.184, 0.224]",
        "not significant [-0.016, +0.024]",
    )
    assert by_name["accuracy"] == ("accuracy, %", "50.0 [46.1, 53.9]", "70.0 [66.1, 73.9]", "+20.0 [+16.1, +23.9]")
    assert found["next"].keys() == {"Draw a prompt", "Export the LoRA", "Go on"}


def test_numbers_of_many_digits_stay_apart(root):
    """A change that is far narrower than the base's own interval adds digits to all three."""
    plant(root, reward=(-100.338, -100.338, 0.003))
    rows = evaluation_rows(root)
    found = verdict(root, rows=[row | {"reward_gain_se": 1e-6} for row in rows])
    lines = [one for one in found["text"] if one.startswith("reward ")]
    assert lines
    assert all("]-" not in one and len(one.split()) == 11 for one in lines), lines


def test_a_run_that_learnt_nothing_is_told_what_to_try(root):
    plant(root, reward=(0.2, 0.2, 0.01), accuracy=(0.5, 0.5, 0.02))
    assert "a higher LR" in verdict(root)["next"]["Or"]


def test_reward_hacking_stands_in_verdict_and_report(root):
    """Accuracy from 52.7 to 0.8 % while the reward rises; verdict and report name it at their top, and the remedy."""
    plant(root, reward=(-1.852, -1.418, 0.006), accuracy=(0.527, 0.008, 0.022))
    found = verdict(root)
    (said,) = (line for line in found["text"] if line.startswith("WARNING, reward hacking: held-out prompts"))
    assert "accuracy fell from 52.7 ± 2.2 % (base) to 0.8 ± 2.2 %" in said
    assert found["next"]["Compare the checkpoints"].endswith(" --all")  # by the reward none is better: there is no judge
    page = write_report(root).read_text()
    top = page[: page.index("<h2>Figures</h2>")]
    assert page.index("<h2>Verdict</h2>") < page.index("<h2>Warnings</h2>") < page.index("<h2>Figures</h2>")
    assert top.count("accuracy fell from 52.7 ± 2.2 % (base) to 0.8 ± 2.2 %") >= 2
    assert '<td class="number">52.7 <span class="interval">[48.4, 57.0]</span></td>' in top


def test_with_a_judge_there_may_be_a_better_checkpoint(root):
    """Without one --best would choose by the reward, which is what has been hacked."""
    plant(root, reward=(-1.852, -1.418, 0.006), accuracy=(0.527, 0.008, 0.022))
    record = read_json(root / "config.json")
    record["config"]["eval"]["judge"] = "shapes"
    write_json(root / "config.json", record)
    assert verdict(root)["next"]["Find a better checkpoint"].endswith(" --best")


def test_a_sign_of_an_earlier_stage_is_not_forgotten(root):
    """The newest evaluation has none, the one before had: no sign any more, and which stage had one."""
    plant(root, reward=(-1.852, -1.418, 0.006), accuracy=(0.527, 0.008, 0.022))
    rows = evaluation_rows(root)
    found = verdict(root, rows=[row | ({"stage": 0, "checkpoint": "stage0"} if row["stage"] else {}) for row in rows])
    assert found["hacking"]
    found = verdict(
        root,
        rows=[
            *(row | ({"stage": 0, "checkpoint": "stage0"} if row["stage"] else {}) for row in rows),
            *(row | {"accuracy": 0.52, "accuracy_gain": -0.007} for row in rows if row["stage"]),
        ],
    )
    assert (found["hacking"], found["hacked_before"]) == ([], [0])
    assert "No sign of reward hacking any more; stage 0 had one, see the report." in found["text"]


def test_a_fall_below_the_limits_is_no_sign_of_health(root):
    """Accuracy three errors down while the reward is up: too little for a warning, and not kept silent."""
    plant(root, reward=(0.2, 0.3, 0.01), accuracy=(0.5, 0.44, 0.02))
    found = verdict(root)
    assert found["hacking"] == []
    said = "Perhaps reward hacking: accuracy has fallen, less than a warning takes. Look at the images."
    assert said in found["text"]


def test_without_the_base_there_is_no_verdict(workplace, overrides):
    """And the command says which is missing; nothing is written."""
    ended = run_script(workplace, "eval", overrides, "--checkpoint=last", "--sampler=training")
    assert ended.code == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "No verdict: judge the base model and a stage alike, by --checkpoint=base,last."
    assert not list(workplace.rglob("verdict.json"))
