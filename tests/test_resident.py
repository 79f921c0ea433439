"""One process for the whole run: the bits of single scripts."""

from pathlib import Path

import pytest
from conftest import PROMPTS, assert_same, experiment, make_config, run_stage

from b2diffurl.models import policy
from b2diffurl.resident import run_stages


@pytest.mark.long
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_process_gives_the_bits_of_three_scripts_a_stage(new_accelerator, overrides, tmp_path, monkeypatch, precision):
    """Both stages, the model loaded once: every file as from a model loaded anew for each phase."""
    monkeypatch.setattr(policy, "_kept", None)
    settings = overrides | {"eval.every": 0, "mixed_precision": precision, "eval.diversity": ()}
    for name in ("scripts", "resident"):
        (tmp_path / name).mkdir()
    for index in range(2):
        run_stage(tmp_path / "scripts", settings, index)
    loaded = []
    load = policy.load_base
    monkeypatch.setattr(policy, "load_base", lambda *given, **options: loaded.append(1) or load(*given, **options))
    monkeypatch.chdir(tmp_path / "resident")
    run_stages(make_config(settings | {"eval.prompt_file": str(write_prompts(tmp_path))}))
    assert len(loaded) == 1
    for name in ("stage0", "stage1"):
        for folder in ("scripts", "resident"):
            (tmp_path / "compared" / folder).mkdir(parents=True, exist_ok=True)
            (experiment(tmp_path / folder) / name).rename(tmp_path / "compared" / folder / name)
    assert_same(tmp_path / "compared" / "resident", tmp_path / "compared" / "scripts")


def write_prompts(folder: Path) -> Path:
    path = folder / "held_out.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_several_processes_do_not_share_one(overrides, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Resident=1 is for one process"):
        run_stages(make_config(overrides))
