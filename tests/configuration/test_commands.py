"""Commands that are printed for people do what they say when they are copied."""

import json
from pathlib import Path

from b2diffurl.configuration.commands import judging_command
from b2diffurl.configuration.presets import preset_config
from b2diffurl.configuration.recorded import preset_differences


def record_of(**changed) -> dict:
    """A config.json of the preset shapes with other settings, given as flat keys."""
    config, preset = preset_config("shapes"), preset_config("shapes").to_dict()
    config.update_from_flattened_dict(changed)
    asked = config.to_dict()
    return json.loads(json.dumps({"config": asked, "differs_from_preset": preset_differences(asked, preset)}))


def test_it_judges_as_the_run_did():
    """What may change comes from the command: watched rewards, held-out prompts, how many. All else is in config.json."""
    record = record_of(
        **{"reward.watch": ("shapes",), "eval.num_images": 256, "eval.every": 1, "eval.prompt_file": "my prompts.txt"},
        **{"train.learning_rate": 0.01, "exp_name": "mine"},
    )
    words = judging_command(Path("model/lora/mine"), record)
    assert words[:4] == ["python", "run_eval.py", "--config=config/stage_process.py:shapes", "--config.exp_name=mine"]
    assert set(words[4:]) == {
        '--config.reward.watch=("shapes",)',
        "--config.eval.num_images=256",
        "--config.eval.prompt_file=my prompts.txt",
    }
    assert "--config.eval.num_images=64" in judging_command(Path("model/lora/mine"), record, {"eval.num_images": 64})


def test_a_moved_experiment_is_found_where_it_is(tmp_path):
    words = judging_command(tmp_path / "copy", record_of(exp_name="mine", save_path="/gone"))
    assert words[3:] == ["--config.exp_name=copy", f"--config.save_path={tmp_path}"]


def test_code_of_one_s_own_is_named(tmp_path):
    """A config.json is not trusted with code, so the command gives it; a notebook's function lies in the experiment."""
    record = record_of(**{"reward.name": "reward_mine:mine"})
    words = judging_command(tmp_path, record)
    assert words[0] == "python"
    assert "--config.reward.name=reward_mine:mine" in words
    (tmp_path / "reward_mine.py").write_text("def mine(images, prompts): ...\n")
    assert judging_command(tmp_path, record)[:3] == ["env", f"PYTHONPATH={tmp_path}", "python"]
