"""The benchmark of a stage: its arithmetic is right, and its page says what the runs say."""

import pytest
from conftest import experiment

from b2diffurl.configuration.plan import checked_settings
from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files
from benchmarks import full_size, stage, stage_report

# ---- arithmetic ----


def run_of(num_images: int, scale: float = 1.0) -> stage_report.Run:
    """A run with hand-made figures, its work `scale` times as slow."""
    return {
        "wall": {"sample": 5 + 20 * scale, "select": 4 + 6 * scale, "train": 3 + 11 * scale},
        "seconds": {
            "sample": {"load": 4, "sample": 20 * scale, "decode": 3 * scale, "write": 1 * scale, "share": 1},
            "select": {"load": 2, "score": 5 * scale, "select": 0.5 * scale, "read": 0.5 * scale},
            "train": {"load": 2, "train": 11 * scale, "read": 1 * scale, "share": 1},
        },
        "peak_bytes": {"sample": 2**30, "select": 2**28, "train": 2**29},
        "device_bytes": {},
        "written_bytes": {"sample": 6 * 2**20, "select": 2**20, "train": 2**20},
        "num_images": num_images,
        "num_evaluations": 10 * num_images,
        "num_transitions": 2 * num_images,
    }


MACHINE = {"matmul_tflops": 2.0, "evaluation_flops": 1e11, "transition_flops": 2e12}


def test_phases_add_up_to_the_wall_clock():
    """Decoding and writing are taken out of sampling, reading out of training, and what is left is start-up."""
    assert stage_report.phases(run_of(40)) == {
        "start-up, loading and end": 12,
        "sampling": 16,
        "decoding": 3,
        "scoring": 5,
        "selecting": 0.5,
        "training": 10,
        "reading and writing": 2.5,
    }


def test_manifests_without_the_finer_keys_do(finished):
    """What today's manifests lack counts as part of the phase that holds it."""
    manifests = {verb: Stage(experiment(finished), 0).manifest(verb) for verb in stage_report.VERBS}
    ended = {verb: stage.Ended(100.0, 1, 1) for verb in stage_report.VERBS}
    run = stage.summarise(ended, manifests, manifests["sample"]["num_evaluations"], cuda=False)
    assert run["num_images"] == 18
    assert sum(stage_report.phases(run).values()) == pytest.approx(300)


def test_fewer_images_of_the_peers_are_scaled_up_and_their_start_is_not():
    """A quarter of the images and a half of the transitions."""
    few = run_of(10) | {"num_transitions": 40}
    scaled = stage_report.scaled(few, run_of(40))
    assert scaled["start-up, loading and end"] == 12
    assert scaled["sampling"] == 64
    assert scaled["training"] == 20
    assert scaled["whole stage"] == 12 + 64 + 12 + 20 + 2 + 20 + 10
    assert stage_report.written(few, run_of(40)) == 32 * 2**20


def test_rates():
    """400 evaluations of 0.1 TFLOP in 16 s, 80 transitions of 2 TFLOP in 10 s."""
    assert stage_report.rates(run_of(40), MACHINE) == {"images": 2, "transitions": 8, "sampling": 2.5, "training": 16}


def test_page_has_ratios_and_the_share_of_attention():
    """Peers three times as slow in everything but start-up, twice as slow with fused attention: half of the difference."""
    runs = {"ours": [run_of(40)], "peers": [run_of(40, 3)], "fused": [run_of(40, 2)]}
    facts = dict.fromkeys(("command", "date", "hardware", "versions", "threads", "precision"), "so")
    page = stage_report.markdown(facts | {"runs": runs, "machine": MACHINE})
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in page.splitlines() if line.startswith("|")}
    assert rows["| start-up, loading and end"] == ["12.0", "12.0", "12.0", "1.00×", "1.00×"]
    assert rows["| sampling"] == ["16.0", "48.0", "32.0", "3.00×", "1.50×"]
    assert rows["| **whole stage**"] == ["**49.0**", "**123**", "**86.0**", "**2.51×**", "**1.43×**"]
    assert "saves 50.0 % of the difference" in page
    assert rows["| TFLOP/s of training (of matmul peak)"] == ["16.0 (800.0 %)", "5.33 (266.7 %)", "8.00 (400.0 %)"]
    assert rows["| peak memory, MiB"] == ["1,024"] * 3


def test_medians_are_of_runs_beside_each_other():
    """The middle of three runs, each scaled to the work of ours of its own turn."""
    runs = {"ours": [run_of(40), run_of(80), run_of(40)], "peers": [run_of(40, 2), run_of(40, 3), run_of(40, 9)]}
    found = stage_report.typical({"runs": runs})
    assert found["ours"]["sampling"] == 16
    assert found["peers"]["sampling"] == 2 * 48


def test_startup_is_told_in_imports_of_torch():
    """Medians first, then their ratio."""
    seconds = {"import torch": [2.0, 9.0, 1.0], "sample": [5.0, 6.0, 4.0]}
    facts = dict.fromkeys(("command", "date", "hardware", "versions"), "so") | {"seconds": seconds}
    page = stage_report.startup_markdown(facts)
    assert "| sample | 5.00 | 2.50× |" in page
    assert "medians of 3" in page


def test_of_models_whose_flops_are_not_counted():
    """The page of one has its seconds, memory and first ratio, and no FLOPs."""
    runs = {"ours": [run_of(40) | {"first_log_ratio": 1.5e-5, "device_bytes": dict.fromkeys(stage_report.VERBS, 2**34)}]}
    facts = dict.fromkeys(("command", "date", "hardware", "versions", "threads", "precision"), "so")
    page = stage_report.markdown(facts | {"runs": runs, "machine": {"matmul_tflops": 2.0}})
    assert "| largest log-ratio, at the first update | 1.5e-05 |" in page
    assert "| peak GPU memory of train, MiB | 16,384 |" in page
    assert "FLOPs are counted" not in page
    assert "TFLOP/s of" not in page


# ---- processes ----


def test_a_process_is_measured():
    """Its bytes are counted each time they are written, its memory is its own, its time ends with it or with a line."""
    write = "[open('/dev/null', 'wb').write(bytes(10**6)) for _ in range(3)]; hold = b'x' * 10**8"
    ended = stage.run_process(["-c", write])
    assert 3_000_000 <= ended.written_bytes < 3_100_000
    assert ended.peak_bytes > 10**8
    until = stage.run_process(["-c", "import time; print('here we go'); time.sleep(60)"], until="we go")
    assert until.seconds < 30
    with pytest.raises(RuntimeError, match="no such thing"):
        stage.run_process(["-c", "raise SystemExit('no such thing')"])
    with pytest.raises(RuntimeError, match="ended with 0"):
        stage.run_process(["-c", ""], until="we go")


def test_settings_become_the_configuration_of_the_scripts(tmp_path):
    """Our flags resolve as the scripts resolve them; the last word is the overrides'."""
    given = stage.parse(["--quick", "--threads", "2", "--overrides", "split_time=4", "train.learning_rate=1e-3"])
    config = stage.resolve(stage.settings_of(given, tmp_path))
    assert (config.num_threads, config.split_time, config.sample.batch_size) == (2, 4, 4)
    assert config.train.learning_rate == 1e-3
    assert config.is_locked


@pytest.mark.parametrize("model", ["sdxl", "sd35_medium"])
def test_stages_of_the_large_models_may_run(tmp_path, model):
    """Their settings are none that our scripts refuse, and the objective has ratios. The peers have no such models."""
    full_size.write_holes(tmp_path / model, full_size.FULL_SIZE[model].with_shallow_encoders())
    paths = [f"pretrained.model={tmp_path / model}", "reward.clip.model=here"]
    given = stage.parse(["--model", model, "--no-peers", "--overrides", *paths])
    settings = checked_settings(stage.resolve(stage.settings_of(given, tmp_path)))
    assert not settings.training.objective.on_noised_images
    with pytest.raises(SystemExit):
        stage.parse(["--model", model])


@pytest.fixture
def quick(models) -> list[str]:
    """Arguments of a benchmark of the tiny model."""
    tiny = {
        "pretrained.model": models / "sd",
        "reward.clip.model": models / "clip",
        "eval.judge": "",
        "eval.diversity": "()",
    }
    tiny |= {"prompt_file": models / "prompts.json", "eval.prompt_file": models / "prompts.json"}
    return ["--quick", "--threads", "1", "--overrides", *(f"{key}={value}" for key, value in tiny.items())]


@pytest.mark.slow
def test_the_benchmark_runs_end_to_end(quick, capsys, monkeypatch, tmp_path):
    """Three shapes of three processes each, and every phase in the table; the figures join those of other models."""
    monkeypatch.setattr(stage, "RESULTS", tmp_path / "performance.json")
    files.write_json(stage.RESULTS, {"sd14 on cuda": {}})
    stage.main(["--write", *quick])
    assert list(files.read_json(stage.RESULTS)) == ["sd14 on cuda", "shapes on cpu"]
    page = capsys.readouterr().out
    for phase in ("sampling", "decoding", "scoring", "training", "**whole stage**"):
        assert f"| {phase} |" in page
    assert "A stage of 12 images, 28 evaluations" in page


@pytest.mark.slow
def test_startup_is_measured(quick, capsys, monkeypatch):
    """Each script is stopped where its work begins, and begins again the next time."""
    monkeypatch.setattr(stage, "STARTUP_REPEATS", 2)
    stage.main(["--startup", *quick])
    page = capsys.readouterr().out
    for name in ("import torch", *stage_report.VERBS):
        assert f"| {name} |" in page
