"""Prompts of the user's own: what a preset has for its own alone steps back, and what is trained on is not held out."""

import json

import pytest
from conftest import ROOT, get_config, make_config, parse_command, plan, refuse, start

from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.loop import calls
from b2diffurl.configuration.own_prompts import step_back
from b2diffurl.configuration.prompts import named_prompts, overlap_text
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.evaluation_table import describe, set_title

WORLD = ["a red circle", "a blue square left of a green cross"]
FOREIGN = [*WORLD, "a wizard on a hill"]
FORMS = {
    "p.txt": "\n".join,
    "p.json": json.dumps,
    "p.jsonl": lambda prompts: "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts),
}


def stepped(tmp_path, preset="shapes", trained=None, judged=None, form="p.txt", **given):
    """(configuration after the user's files and settings, what was said) of a preset."""
    config, before = get_config(preset), get_config(preset).to_dict()
    given = {key.replace("__", "."): value for key, value in given.items()} | {"save_path": str(tmp_path)}
    for key, prompts in (("prompt_file", trained), ("eval.prompt_file", judged)):
        if prompts:
            path = tmp_path / f"{key}{form}"
            path.write_text(FORMS[form](prompts))
            given[key] = str(path)
    config.update_from_flattened_dict(given)
    changes, said = step_back(flatten(config.to_dict()), flatten(before), given.keys())
    config.update_from_flattened_dict(changes)
    return config.eval, said


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prompts", [FOREIGN, FOREIGN[2:], [FOREIGN[2]] * 3], ids=["mixed", "one", "twice"])
def test_the_worlds_checker_steps_back_for_other_prompts(tmp_path, prompts, form):
    """From a file of any form, of one prompt or with duplicates. Its own prompts are judged on, and both is said."""
    judging, said = stepped(tmp_path, trained=prompts, form=form)
    assert (judging.judge, judging.diversity, judging.prompt_file) == ("", ("clip",), "")
    assert [("wizard" in one, "EvalPromptFile" in one) for one in said] == [(False, True), (True, False)]


def test_a_prompt_that_quotes_is_shown_as_it_is(tmp_path):
    """As prompts of the reward ocr do."""
    _, said = stepped(tmp_path, trained=['a sign that says "OPEN"'])
    assert said[1].startswith("""'a sign that says "OPEN"' is no prompt of the small world""")


def test_held_out_prompts_of_another_world_are_enough(tmp_path):
    judging, said = stepped(tmp_path, judged=FOREIGN)
    assert (judging.judge, judging.diversity, judging.prompt_file) == (
        "",
        ("clip",),
        str(tmp_path / "eval.prompt_filep.txt"),
    )
    assert len(said) == 1


def test_prompts_of_the_world_change_nothing(tmp_path):
    """Nor do the preset's own, given by another path: they are judged as ever, on the preset's held-out ones."""
    own = f"{ROOT}/{get_config('shapes').prompt_file}"
    for given in ({"trained": WORLD}, {"prompt_file": own}, {"prompt": WORLD[0]}, {}):
        judging, said = stepped(tmp_path, **given)
        assert said == []
        assert judging.to_dict() == get_config("shapes").eval.to_dict()


def test_what_the_user_asks_for_does_not_step_back(tmp_path):
    """It is refused, by the sentence of before."""
    judging, said = stepped(tmp_path, trained=FOREIGN, judged=WORLD, eval__judge="shapes", eval__diversity=("layout",))
    assert (judging.judge, judging.diversity, said) == ("shapes", ("layout",), [])


@pytest.mark.parametrize(("preset", "prompt_file"), [("sd14", ""), ("b2", "")])
def test_a_single_prompt_is_judged_on_itself(tmp_path, preset, prompt_file):
    judging, _ = stepped(tmp_path, preset, prompt=FOREIGN[2])
    assert judging.prompt_file == prompt_file


def test_an_experiment_that_was_begun_with_the_presets_held_out_prompts_keeps_them(tmp_path):
    root = tmp_path / get_config("sd14").exp_name
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"config": {"eval": {"prompt_file": "config/prompt/template1_test.json"}}}))
    judging, said = stepped(tmp_path, "sd14", trained=FOREIGN)
    assert (judging.prompt_file, said) == (get_config("sd14").eval.prompt_file, [])


def test_the_scripts_take_such_prompts(tmp_path):
    """The variables of run_process.sh are these flags; it is said once, and the configuration is what the run has."""
    (tmp_path / "mine.txt").write_text("\n".join(FOREIGN))
    argv = ["run_train.py", f"--config={ROOT}/config/stage_process.py:shapes", "--config.prompt_file=mine.txt"]
    ended = parse_command(tmp_path, argv)
    assert ended.code == 0, ended.stderr
    evaluation = json.loads(ended.stdout.splitlines()[-1])["eval"]
    assert (evaluation["judge"], evaluation["prompt_file"]) == ("", "")


# ---- nothing is held out ----


def test_without_held_out_prompts_test_means_train(tmp_path, overrides):
    """The same prompts, judged once: no call asks for a set `test`."""
    settings = read_settings(make_config(overrides | {"eval.prompt_file": "", "eval.every": 1}))
    assert named_prompts(settings.prompts, "test") == named_prompts(settings.prompts, "train")
    asked = {prompts for call in calls(settings) for _, prompts, _ in call.evaluations(2, 1)}
    assert asked == {"train"}
    assert all("--prompts=train" in call.flags for call in calls(settings) if call.stage is None)
    assert overlap_text(settings.prompts) == ""


# ---- trained on, too ----


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        (["a cat"], ""),
        (
            ["A  Red\tcircle ", "a cat", "a cat"],
            "trained on, too: 1 of 2 held-out prompts (eval.prompt_file), such as 'A  Red",
        ),
        (["a red circle"], "the one prompt of eval.prompt_file is trained on, 'a red circle', so none"),
        (WORLD[::-1], "all 2 prompts of eval.prompt_file are trained on, such as 'a blue square"),
    ],
)
def test_an_overlap_is_named_with_an_example(tmp_path, overrides, held_out, said):
    """Whatever the letters' case and the blanks; in the plan of the run, and in its log."""
    (tmp_path / "train.json").write_text(json.dumps(WORLD))
    (tmp_path / "test.json").write_text(json.dumps(held_out))
    files = {"prompt_file": str(tmp_path / "train.json"), "eval.prompt_file": str(tmp_path / "test.json")}
    found = overlap_text(read_settings(make_config(overrides | files)).prompts)
    assert found.startswith(said) and bool(found) == bool(said)


def test_the_plan_warns_of_it(empty, overrides):
    """The tiny experiment's prompts are all trained on."""
    for more, words in (((), "plan: all 3 prompts of eval"), (("--dry_run",), "(warning: all 3 prompts of eval")):
        ended = start(empty, overrides, *more)
        assert ended.code == 0, ended.stderr
        assert words in ended.stdout + ended.stderr


def test_prompts_that_are_trained_on_are_not_called_held_out():
    """In titles, which the report and the model card show, and in the log's lines."""
    row = {"prompts": "test", "sampler": "training", "n_images": 2, "checkpoint": "base", "values": []}
    row |= {"reward": None, "accuracy": None}
    titles = [set_title(row | more) for more in ({}, {"trained_on": "2 of 3"}, {"trained_on": "all"})]
    assert titles == ["Held-out prompts", "Held-out prompts (2 of 3 are trained on, too)", "Training prompts, as test"]
    assert (set_title("test"), set_title("train"), set_title("a/b.txt")) == ("Held-out prompts", "Training prompts", "b.txt")
    assert describe(row) == "base on test prompts, training sampler, 2 images:"
    assert describe(row | {"trained_on": "all"}) == "base on test prompts (all trained on), training sampler, 2 images:"


def test_a_missing_file_is_named_with_its_key(tmp_path, overrides):
    for key in ("prompt_file", "eval.prompt_file"):
        with pytest.raises(FileNotFoundError, match=rf"^{key}: no prompt file at {tmp_path}/none.txt"):
            settings = plan(tmp_path, overrides | {key: f"{tmp_path}/none.txt"}).settings
            named_prompts(settings.prompts, "test")


def test_a_judge_that_was_asked_for_is_refused(empty, overrides):
    """Before anything is sampled; without the flag the run would go on without it."""
    (empty / "mine.txt").write_text("\n".join(FOREIGN))
    settings = overrides | {"prompt_file": str(empty / "mine.txt"), "eval.judge": "shapes"}
    refuse(empty, "sample", settings, "eval.judge, shapes, cannot score the prompts")
