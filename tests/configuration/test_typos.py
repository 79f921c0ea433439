"""Mistyped command lines: one sentence, with the nearest key or option, and no quotes within quotes."""

import difflib
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, call, parse_command, run_script

from b2diffurl.configuration.keys import KEYS
from b2diffurl.configuration.typos import did_you_mean, unknown_name
from b2diffurl.configuration.usage import usage
from b2diffurl.runtime import paths


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.train.learning_rat=1", "there is no key train.learning_rat; did you mean --config.train.learning_rate?"),
        ("--config.learning_rate=1", "there is no key learning_rate; did you mean --config.train.learning_rate?"),
        ("--config.trian.num_epochs=1", "there is no key trian.num_epochs; did you mean --config.train.num_epochs?"),
        ("--config.reward.clip.modell=x", "there is no key reward.clip.modell; did you mean --config.reward.clip.model?"),
        ("-config.seedd=2", "there is no key seedd; did you mean --config.seed?"),
        ("--config.no_such_thing=2", "there is no key no_such_thing"),
        ("--config.seed.x=1", "there is no key seed.x"),
        ("--config.=1", "--config. names no key"),
        ("--config.train=1", "--config.train is a section, not a key; set one of its keys, such as --config.train."),
        ("--preset=sd14", "there is no option --preset; did you mean --config=config/stage_process.py:NAME (Preset=NAME"),
        ("--config.preset=flux", "--config.preset chooses no preset; that is done by --config=config/stage_process.py:NAME"),
        ("--conifg.seed=1", "there is no option --conifg.seed; did you mean --config.seed?"),
        ("--seed=1", "there is no option --seed; did you mean --config.seed?"),
        ("--checkpiont=last", "there is no option --checkpiont; did you mean --checkpoint?"),
        ("--nobset", "there is no option --nobset"),
        ("config.seed=1", "unexpected argument 'config.seed=1'; did you mean --config.seed?"),
        ("stage_cnt=1", "unexpected argument 'stage_cnt=1'; did you mean --config.stage_cnt?"),
        ("stage1", "unexpected argument 'stage1'"),
        ("--config.seed", "Missing value for flag --config.seed"),
        ("--config.seed=", "--config.seed is ''; it must be a whole number"),
        ("--config.train.ema=a lot: 1", "--config.train.ema is 'a lot'; it must be a number"),
        ("--config.train.use_8bit_adam=maybe", "--config.train.use_8bit_adam is 'maybe'; it must be True or False"),
        ("--config=config/stage_process.py:shape", "did you mean shapes?"),
        ("--config=no_file.py", "No such file or directory: 'no_file.py'"),
    ],
)
def test_a_mistake_is_a_sentence_with_the_nearest_key(tmp_path, argument, said):
    """In two lines and exit code 2, before anything is written."""
    ended = run_script(tmp_path, "eval", {}, argument)
    first, _ = ended.stderr.splitlines()
    assert (ended.code, ended.stdout) == (2, "")
    assert first.startswith("error: ")
    assert said in first
    assert not any(mark in first for mark in ("\\", "\"'", "'\"", "Error:", "[Errno"))
    assert list(tmp_path.iterdir()) == []


def test_every_key_is_found_with_a_letter_missing_or_two_exchanged():
    """Of all keys, by their full names; and no key is an unknown one."""
    settings = dict.fromkeys(KEYS)
    for key in KEYS:
        assert unknown_name(f"config.{key}", settings, ()) is None
        for typo in (key[:-1], key[:-2] + key[-1] + key[-2], "_" + key):
            if len(key) > 5 and typo not in KEYS and key != "preset":  # which is chosen by --config
                said = did_you_mean(f"config.{typo}", settings, ())
                assert said.startswith("; did you mean --config."), typo
                near = said.removeprefix("; did you mean --config.").removesuffix("?")
                alike = [difflib.SequenceMatcher(None, one, typo).ratio() for one in (near, key)]
                assert near == key or alike[0] >= alike[1], (typo, near)


def test_what_is_far_from_everything_has_no_suggestion():
    for name in ("", "-", "zzz", "config.", "config.zzz", "n"):
        assert did_you_mean(f"--{name}", dict.fromkeys(KEYS), ["checkpoint", "all"]) == ""


# ---- --help ----


@pytest.mark.parametrize("script", ["run_sample.py", "run_select.py", "run_train.py", "run_eval.py"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_a_script_does_and_ends_well(tmp_path, script, flag):
    """What it does, its options with defaults, the presets, examples; wherever the flag stands."""
    path = str(ROOT / script)
    ended = call(tmp_path, [script, "--config.seed=1", flag], lambda: runpy.run_path(path, run_name="__main__"))
    assert (ended.code, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(f"usage: python {script} ")
    assert lines[2] == (ROOT / script).read_text().partition(":")[0].removeprefix('"""') + "."
    assert "shapes_flow" in ended.stdout
    assert "docs/configuration.md" in ended.stdout
    assert max(map(len, lines)) <= 130
    assert ("(default: base,last)" in " ".join(ended.stdout.split())) == (script == "run_eval.py")
    for example in (line.split() for line in lines if line.startswith(f"    python {script}")):
        parsed = parse_command(tmp_path, [script, *example[2:]])
        assert parsed.code == 0, parsed.stderr


def test_help_of_an_installed_package_has_its_own_commands(tmp_path, monkeypatch):
    """There are no scripts in the user's folder then."""
    monkeypatch.setattr(paths, "INSTALLED", paths.SHIPPED)
    shown = "\n".join(usage("Judge checkpoints: python run_eval.py --all"))
    assert "usage: b2diffurl eval [" in shown and "    b2diffurl eval --config=" in shown and "run_eval.py" not in shown
    for name in ("run_process.sh", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    told = subprocess.run(["bash", tmp_path / "run_process.sh", "-h"], capture_output=True, text=True, check=True).stdout
    assert "    b2diffurl run --dry_run " in told and "    bash run_process.sh" not in told


@pytest.mark.parametrize("command", ["export", "report", "label"])
def test_help_of_a_command_has_an_example(tmp_path, command):
    """What it does, an example, a page of the documentation that is there; exit code 0."""
    path = str(ROOT / "b2diffurl" / f"{command}.py")
    ended = call(tmp_path, [path, "-h"], lambda: runpy.run_path(path, run_name="__main__"))
    shown = " ".join(ended.stdout.split())
    assert (ended.code, ended.stderr) == (0, "")
    assert f"python -m b2diffurl.{command} " in shown.partition("Example")[2]
    assert (ROOT / re.search(r"More in (docs/\w+\.md)", shown)[1]).is_file()


def test_help_imports_nothing_that_takes_long():
    """Neither torch nor diffusers; asked of a process of its own."""
    asks = "import runpy, sys; sys.argv = ['run_eval.py', '--help']; runpy.run_path('run_eval.py', run_name='__main__'); "
    asks += "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'matplotlib')))"
    subprocess.run([sys.executable, "-c", asks], cwd=ROOT, check=True, capture_output=True, timeout=60)
