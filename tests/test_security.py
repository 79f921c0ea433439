"""Nobody gets in: no code of a model's or a checkpoint's folder runs, no name leaves its folder, no secret is written."""

import base64
import contextlib
import itertools
import json
import os
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from conftest import (
    ROOT,
    VERBS,
    Ended,
    assert_refused,
    call,
    experiment,
    make_config,
    refuse,
    run_evaluation,
    run_script,
    snapshot,
)
from foreign import original_layout

from b2diffurl import export
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.features import load_features
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.models import stable_diffusion
from b2diffurl.rewards import http, load_reward
from b2diffurl.runtime import files

CPU = torch.device("cpu")


class Hostile:
    """An object that, unpickled, makes a folder."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker, 0o777, True)


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """What hostile code makes if it runs; it must not be there in the end. Whoever is asked whether to run it says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield tmp_path / "owned"
    assert not (tmp_path / "owned").exists()


def hostile_code(marker: Path) -> bytes:
    return f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\nclass Evil:\n    pass\n".encode()


def hostile_pickles(marker: Path, tmp_path: Path) -> list[bytes]:
    """In each form that torch reads: a bare pickle, and its own of old and of today."""
    forms = [pickle.dumps(Hostile(marker))]
    for zipped in (False, True):
        torch.save({"weight": Hostile(marker)}, tmp_path / "saved", _use_new_zipfile_serialization=zipped)
        forms.append((tmp_path / "saved").read_bytes())
    (tmp_path / "saved").unlink()
    return forms


PICKLES = (
    "state.pkl", "optimizer.bin", "scheduler.bin", "scheduler.pt", "random_states_0.pkl", "training_args.bin", "model.ckpt",
    "model.pt", "model.pth", "pytorch_lora_weights.bin", "pytorch_model.bin", "diffusion_pytorch_model.bin",
    "adapter_model.bin", "batch_00000.pt", "rewards.npy", "sampler.bin", "scaler.pt",
)  # fmt: skip
CODE = ("None.py", "pipeline.py", "modeling_x.py", "custom.py", "unet.py", "handler.py", "conftest.py", "generate.py")


def plant(folder: Path, marker: Path) -> None:
    """Hostile files in a folder and all below it."""
    forms = itertools.cycle(hostile_pickles(marker, folder))
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in PICKLES:
            (place / name).write_bytes(next(forms))
        for name in CODE:
            (place / name).write_bytes(hostile_code(marker))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def name_code(folder: Path) -> None:
    """Every configuration of a model that can name code of its own does."""
    names = {"AutoConfig": "modeling_x.Evil", "AutoModel": "modeling_x.Evil", "AutoTokenizer": ["modeling_x.Evil", None]}
    names |= {"AutoImageProcessor": "modeling_x.Evil", "AutoProcessor": "modeling_x.Evil"}
    names |= {f"AutoModelFor{what}": "modeling_x.Evil" for what in ("ImageTextToText", "ImageClassification")}
    for path in folder.rglob("*.json"):
        if "config" in path.name:
            edit_json(path, auto_map=names)
        if path.name == "model_index.json":
            edit_json(path, _class_name=["pipeline", "Evil"], scheduler=["custom", "Evil"], image_encoder=["custom", "Evil"])


@pytest.mark.parametrize("form", range(3))
def test_the_hostile_files_are_hostile(tmp_path, form):
    """Read without care, each of them runs: the counterpart of what follows."""
    (tmp_path / "file").write_bytes(hostile_pickles(tmp_path / "owned", tmp_path)[form])
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "owned").exists() or form == 0
    pickle.loads(pickle.dumps(Hostile(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()
    exec(hostile_code(tmp_path / "again"))
    assert (tmp_path / "again").exists()


@pytest.fixture
def own(models, overrides, tmp_path) -> dict:
    """Settings with models and prompts of their own, in tmp_path / "own"."""
    shutil.copytree(models, tmp_path / "own")
    moved = {
        key: value.replace(str(models), str(tmp_path / "own")) for key, value in overrides.items() if type(value) is str
    }
    return overrides | moved


def test_nothing_hostile_runs_beside_what_is_loaded(own, marker, tmp_path):
    """Pickles and code in the base model's folders, the scorer's, the prompts', the experiment's, its stages', its
    checkpoints' and the current one, and configurations that name code: a stage and the beginning of the next, judging and
    every export end as without them."""
    work, settings = tmp_path / "work", own | SMALL
    for folder in (experiment(work) / "stage0" / "checkpoints", experiment(work) / "stage1" / "samples"):
        folder.mkdir(parents=True)
    plant(tmp_path / "own", marker)
    name_code(tmp_path / "own")
    refuse(work, "sample", settings, r"sd is a \['pipeline', 'Evil'\]; supported are StableDiffusionPipeline")
    settings |= {"pretrained.family": "stable_diffusion"}
    for index, verb in ((0, "sample"), (0, "select"), (0, "train"), (1, "sample")):
        plant(work, marker)
        ended = run_script(work, verb, settings | {"run_name": f"stage{index}"})
        assert ended.code == 0, ended.stderr
    plant(work, marker)
    run_evaluation(work, settings)
    for form in export.FORMATS:
        ended = call(work, ["export.py", "tiny", f"--format={form}"], export.main)
        assert not ended.code, ended.stderr


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_no_pickle_stands_in_for_a_base_model_s_weights(own, marker, tmp_path, part):
    """Weights that are only there as .bin, or a pickle called .safetensors, are refused with the folder's or file's name."""
    folder = tmp_path / "own" / "sd" / part
    (weights,) = folder.glob("*.safetensors")
    name = weights.name
    weights.unlink()
    plant(folder, marker)
    work = tmp_path / "work"
    work.mkdir()
    refuse(work, "sample", own, rf"sd/{part} has no \*\.safetensors")
    for form in hostile_pickles(marker, tmp_path):
        (folder / name).write_bytes(form)
        refuse(work, "sample", own, r"safetensors|header", arguments=())


def test_no_pickle_stands_in_for_a_scorer_s_weights(own, marker, tmp_path):
    """A scorer's .bin is read for its tensors alone, and so is the head of the aesthetic reward."""
    work, clip = tmp_path / "work", tmp_path / "own" / "clip"
    work.mkdir()
    tiny.aesthetic_head(tmp_path / "own" / "head", tiny.WIDTH)
    (clip / "model.safetensors").unlink()
    (tmp_path / "own" / "head" / "head.safetensors").unlink()
    for form in hostile_pickles(marker, tmp_path):
        (clip / "pytorch_model.bin").write_bytes(form)
        with pytest.raises(ValueError, match="own/clip"):
            load_reward("clip", read_settings(make_config(own)).rewards, CPU)
    shutil.copy(experiment_free_clip(tmp_path), clip / "model.safetensors")
    settings = make_config(
        own, **{"reward.aesthetic.clip": str(clip), "reward.aesthetic.head": str(tmp_path / "own" / "head")}
    )
    load_reward("aesthetic", read_settings(settings).rewards, CPU)
    for form in hostile_pickles(marker, tmp_path):
        (tmp_path / "own" / "head" / "head.pth").write_bytes(form)
        with pytest.raises(ValueError, match=r"head\.pth is not an aesthetic head"):
            load_reward("aesthetic", read_settings(settings).rewards, CPU)


def experiment_free_clip(tmp_path: Path) -> Path:
    return tiny.clip(tmp_path / "clip") / "model.safetensors"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("resume_from", "lora.pt"), ("resume_from", "lora.pth"), ("resume_from", "lora.bin"), ("resume_from", "lora.ckpt"),
        ("resume_from", "lora.pkl"), ("resume_from", LORA_FILE), ("resume_from", ""), ("pretrained.model", "model.ckpt"),
        ("pretrained.model", "model.bin"), ("pretrained.model", "model.safetensors"), ("prompt_file", "prompts.pkl"),
        ("prompt_file", "prompts.json"), ("eval.prompt_file", "prompts.txt"),
    ],
)  # fmt: skip
def test_no_pickle_is_taken_for_what_is_named(own, marker, tmp_path, key, name):
    """As a LoRA, a folder that holds only pickled ones, a base model in one file, or prompts: refused by every script that
    reads it."""
    work, folder = tmp_path / "work", tmp_path / "given"
    work.mkdir()
    folder.mkdir()
    for form in hostile_pickles(marker, tmp_path):
        if name:
            (folder / name).write_bytes(form)
        else:
            plant(folder, marker)
        more = {"eval.judge": "clip", "pretrained.config": str(tmp_path / "own" / "sd")}
        refuse(work, "sample", own | more | {key: str(folder / name)}, "given")


def test_no_code_of_a_single_file_s_configs_runs(own, marker, tmp_path, monkeypatch):
    """model_index.json may name the classes of Stable Diffusion and no others; code beside it stays unread."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    sd, work = tmp_path / "own" / "sd", tmp_path / "work"
    work.mkdir()
    monkeypatch.syspath_prepend(str(work))
    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    save_file(original_layout(pipeline), tmp_path / "single.safetensors")
    settings = own | {"pretrained.model": str(tmp_path / "single.safetensors"), "pretrained.config": str(sd)}
    plant(sd, marker)
    model = read_settings(make_config(settings)).model
    stable_diffusion.FAMILY.load(model, device=CPU, dtype=torch.float32, seed=0, decoder=True)
    whole = (sd / "model_index.json").read_text()
    (work / "evil_module.py").write_bytes(hostile_code(marker))
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for named in (["evil_module", "Evil"], ["transformers", "AutoTokenizer"], ["os", "system"]):
            edit_json(sd / "model_index.json", **{part: named})
            refuse(work, "sample", settings, rf"model_index\.json names .* as its {part}")
            (sd / "model_index.json").write_text(whole)


def test_no_code_that_a_scorer_names_runs(marker, tmp_path, overrides):
    """bertscore's two models, the classifier of diversity, CLIP: they load by the library's own classes, though their
    configurations name others and somebody says yes; a kind of model that the library lacks is refused."""
    zoo = tmp_path / "zoo"
    for make in (tiny.llava, tiny.deberta, tiny.classifier, tiny.clip):
        make(zoo / make.__name__)
    plant(zoo, marker)
    name_code(zoo)
    settings = {
        "reward.bertscore.captioner": str(zoo / "llava"), "reward.bertscore.scorer": str(zoo / "deberta"),
        "reward.bertscore.num_layers": 2, "reward.clip.model": str(zoo / "clip"),
        "eval.inception.model": str(zoo / "classifier"),
    }  # fmt: skip
    chosen = read_settings(make_config(overrides, **settings))
    load_reward("bertscore", chosen.rewards, CPU)
    load_reward("clip", chosen.rewards, CPU)
    load_features("inception", chosen.judging, chosen.rewards, CPU, {})
    for name in ("llava", "deberta", "classifier"):
        edit_json(zoo / name / "config.json", model_type="evil")
    with pytest.raises((ValueError, OSError)):
        load_reward("bertscore", chosen.rewards, CPU)
    with pytest.raises((ValueError, OSError)):
        load_features("inception", chosen.judging, chosen.rewards, CPU, {})


def test_no_expression_of_a_command_line_is_evaluated(marker, tmp_path, overrides):
    """Lists and mixtures are literals."""
    work = tmp_path / "work"
    work.mkdir()
    code = f"__import__('os').makedirs('{marker}')"
    for key in ("reward.weights", "reward.watch", "eval.diversity", "seed", "train.learning_rate"):
        refuse(work, "sample", overrides | {key: code})
        refuse(work, "sample", overrides | {key: f"({code},)"})


# ---- names and links ----


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "a/b", "/tmp/x", "x/..", "~", "x\n", "x y", "..\\x", "-x/../../y"])
def test_an_experiment_s_name_stays_in_its_folders(finished, overrides, tmp_path, name):
    """Refused by every script, and no folder, log or report is made anywhere by it."""
    work = tmp_path / "deep" / "work"
    shutil.copytree(finished, work)
    shutil.copytree(experiment(finished), work / "model" / "x")
    before = snapshot(tmp_path, log=True)
    settings = overrides | {"exp_name": name}
    for verb in VERBS:
        assert_refused(run_script(work, verb, settings), "exp_name is ")
    for arguments in (("--due",), ("--checkpoint=base",), ("--prompt=a red circle",), ("--all",)):
        assert_refused(run_script(work, "eval", settings, *arguments), "exp_name is ")
    assert snapshot(tmp_path, log=True) == before


def test_everything_may_be_a_link(finished, own, tmp_path):
    """save_path, the experiment's folder, a stage's samples, the base model, the scorer, prompts and the log's folder are
    links to elsewhere: the run is the same, bit for bit, links stay links, and what is read later finds everything."""
    work, far = tmp_path / "work", tmp_path / "far"
    for name in ("lora", "experiment", "samples", "selected", "log"):
        (far / name).mkdir(parents=True)
    (work / "model").mkdir(parents=True)
    shutil.move(tmp_path / "own", far / "own")
    links = {work / "model" / "lora": far / "lora", far / "lora" / "tiny": far / "experiment", work / "log": far / "log"}
    (far / "experiment" / "stage0").mkdir()
    links |= {far / "experiment" / "stage0" / name: far / name for name in ("samples", "selected")}
    (tmp_path / "own").mkdir()
    links |= {tmp_path / "own" / name: far / "own" / name for name in ("sd", "clip", "prompts.json")}
    for link, target in links.items():
        link.symlink_to(target)
    for verb in VERBS:
        ended = run_script(work, verb, own | {"keep.samples": False})
        assert ended.code == 0, ended.stderr
    lora = Path("stage0") / "checkpoints" / "checkpoint_2" / LORA_FILE
    assert (far / "experiment" / lora).read_bytes() == (experiment(finished) / lora).read_bytes()
    path = experiment(work) / "stage0"
    run_evaluation(work, own, ["base", "last", str(path)])
    named = {row["checkpoint"] for row in files.read_json_lines(far / "experiment" / "eval.jsonl")}
    assert named == {"base", "stage0", "stage0/checkpoint_2"}  # as inside the experiment, by whatever path they were given
    assert not call(work, ["export.py", "tiny"], export.main).code
    assert all(link.is_symlink() for link in links)
    assert (far / "log" / "tiny.log").is_file()
    assert not list(far.rglob("*" + files.TEMPORARY))
    assert not list((far / "samples").iterdir())


# ---- who may read, and what ----

SMALL = {
    "stage_cnt": 1, "sample.num_batches_per_epoch": 1, "train.num_epochs": 1, "eval.num_images": 2, "eval.every": 1,
    "eval.deployed.num_steps": 2, "keep.samples": True,
}  # fmt: skip
SECRETS = {
    name: f"{prefix}0123456789abcdef{number}"
    for number, (name, prefix) in enumerate({
        "HF_TOKEN": "hf_", "HUGGING_FACE_HUB_TOKEN": "hf_", "WANDB_API_KEY": "", "AWS_SECRET_ACCESS_KEY": "aws",
        "GITHUB_TOKEN": "ghp_", "OPENAI_API_KEY": "sk-", "REWARD_VLM_API_KEY": "", "REWARD_HTTP_AUTHORIZATION": "Bearer ",
    }.items())
}  # fmt: skip


@pytest.fixture
def secrets(monkeypatch, tmp_path) -> None:
    """Tokens in the environment, and no account of anybody's."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def assert_unwritten(work: Path, *ended: Ended) -> None:
    """No secret, and no encoding of one, in any file or on a stream."""
    said = "".join(one.stdout + one.stderr for one in ended).encode()
    texts = {str(path): path.read_bytes() for path in work.rglob("*") if path.is_file()} | {"streams": said}
    for name, value in SECRETS.items():
        forms = [value.encode(), value.split()[-1].encode(), base64.b64encode(value.encode())]
        assert not [where for where, text in texts.items() if any(form in text for form in forms)], name


def whole_run(work: Path, settings: dict) -> list[Ended]:
    """Everything that writes, once; the report and the trackers go with the evaluation."""
    work.mkdir()
    ended = [run_script(work, verb, settings) for verb in VERBS]
    ended.append(run_script(work, "eval", settings, "--checkpoint=base,last", "--sampler=training,deployed"))
    ended.append(run_script(work, "eval", settings, "--prompt=a red circle"))
    ended += [call(work, ["export.py", "tiny", f"--format={form}"], export.main) for form in export.FORMATS]
    assert not [one for one in ended if one.code], ended
    return ended


@pytest.mark.parametrize(
    ("umask", "trackers"),
    [
        (0o027, ()),
        pytest.param(0o027, ("tensorboard", "wandb"), marks=pytest.mark.slow),
        pytest.param(0o002, ("tensorboard", "wandb"), marks=pytest.mark.slow),
    ],
)
def test_files_are_as_the_umask_has_them_and_hold_no_secret(secrets, overrides, tmp_path, umask, trackers):
    """A whole run with judging, report, exports and (slow) trackers: every file is rw and every folder rwx for whom the
    umask leaves, not for the owner alone (wandb does as it likes in its own folder); and no token of the environment is in
    any of them, or was said."""
    before = os.umask(umask)
    try:
        ended = whole_run(tmp_path / "work", overrides | SMALL | {"track_with": trackers})
    finally:
        os.umask(before)
    odd = []
    for path in (tmp_path / "work").rglob("*"):
        mode = path.lstat().st_mode & 0o777
        usual = 0o777 if path.is_dir() else 0o666
        if not path.is_symlink() and "wandb" not in path.parts and mode != usual & ~umask:
            odd.append(f"{path.relative_to(tmp_path)} {mode:o}")
    assert not odd
    assert_unwritten(tmp_path / "work", *ended)
    kinds = {path.suffix for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert kinds >= {".safetensors", ".json", ".jsonl", ".png", ".html", ".log", ".md", *([".wandb"] if trackers else ())}


def test_a_plan_tells_no_secret(secrets, overrides, tmp_path):
    """--dry_run prints neither, and writes nothing."""
    from absl import flags

    from b2diffurl.start import start

    def main() -> None:
        flags.DEFINE_boolean("dry_run", False, "")
        flags.DEFINE_string("calls", "", "")
        from b2diffurl.configuration.command_line import run_script as run

        run("process", start)

    argv = ["start", f"--config={ROOT}/config/stage_process.py:sd14", "--dry_run"]
    argv += [f"--config.{key}={value}" for key, value in overrides.items()]
    ended = call(tmp_path, argv, main)
    assert ended.code == 0, ended.stderr
    assert "base model" in ended.stdout
    assert_unwritten(tmp_path, ended)
    assert not snapshot(tmp_path, log=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward.http.url", "http://me:s3cret@localhost:9/"),
        ("reward.http.url", "https://s3cret@localhost:9/score"),
        ("pretrained.model", "https://me:s3cret@huggingface.co/owner/name"),
        ("reward.http.url", f"http://localhost:9/?token={SECRETS['HF_TOKEN']}"),
        ("prompt", f"a picture of {SECRETS['WANDB_API_KEY']}"),
    ],
)
def test_a_setting_with_a_secret_is_refused(secrets, overrides, tmp_path, key, value):
    """A password in a URL, or what a variable holds, would be in config.json and the log: every script refuses it, says
    where it belongs, and does not repeat it; whether or not the setting is in use."""
    work = tmp_path / "work"
    work.mkdir()
    for settings in ({key: value}, {key: value, "reward.name": "http"}):
        for verb in VERBS:
            ended = run_script(work, verb, overrides | settings)
            assert_refused(ended, rf"{key} has .*config\.json and log would keep")
            assert "s3cret" not in ended.stdout + ended.stderr
            assert_unwritten(work, ended)
        assert_refused(run_script(work, "eval", overrides | settings, "--checkpoint=base"), key)
    assert not [path for path, data in snapshot(work, log=True).items() if b"s3cret" in data]


def test_a_reward_server_is_told_who_asks(secrets, overrides, tmp_path, monkeypatch):
    """REWARD_HTTP_AUTHORIZATION goes with every request as its header; refused or not, it is written nowhere. Without the
    variable there is no such header."""
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.headers["Authorization"])
            prompts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompts"]
            right = asked[-1] == SECRETS["REWARD_HTTP_AUTHORIZATION"]
            body = json.dumps({"scores": list(range(len(prompts)))} if right else {"error": "who are you?"}).encode()
            self.send_response(200 if right else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        work = tmp_path / "work"
        work.mkdir()
        url = f"http://127.0.0.1:{server.server_port}/"
        settings = overrides | SMALL | {"reward.name": "http", "reward.http.url": url, "reward.http.num_retries": 0}
        with monkeypatch.context() as patch:
            patch.delenv("REWARD_HTTP_AUTHORIZATION")
            sampled = run_script(work, "sample", settings)
            assert sampled.code == 0, sampled.stderr
            refused = run_script(work, "select", settings)
        assert_refused(refused, "answered 401.*who are you")
        assert set(asked) == {None}
        asked.clear()
        selected = run_script(work, "select", settings)
        assert selected.code == 0, selected.stderr
        server.shutdown()
    assert set(asked) == {SECRETS["REWARD_HTTP_AUTHORIZATION"]}
    assert_unwritten(work, sampled, refused, selected)


def test_a_secret_that_no_header_can_have_or_a_server_repeats(monkeypatch):
    """A line's end around it is taken off; inside, it is refused by the variable's name; what a server says loses it."""
    secret = SECRETS["REWARD_HTTP_AUTHORIZATION"]
    monkeypatch.setenv(http.AUTHORIZATION, f"{secret}\n")
    assert http.shown(f"no such user: {secret}".encode()) == "no such user: Bearer ***"
    with pytest.raises(ConnectionError) as refused:
        http.post(b"", url="http://127.0.0.1:9/", timeout_sec=1.0, num_retries=0)
    assert secret.split()[-1] not in str(refused.value)
    monkeypatch.setenv(http.AUTHORIZATION, f"{secret}\nX-Other: 1")
    with pytest.raises(ValueError, match=http.AUTHORIZATION) as refused:
        http.post(b"", url="http://127.0.0.1:9/", timeout_sec=1.0, num_retries=0)
    assert secret.split()[-1] not in str(refused.value)


def test_secrets_are_looked_for_before_values_are_shown(overrides, monkeypatch):
    """Also where the variable holds more than the setting: `Bearer abc…`."""
    monkeypatch.setenv("REWARD_HTTP_AUTHORIZATION", "Bearer abcdefgh12345678")
    for url in ("http://host/?token=abcdefgh12345678", "http://me:abcdefgh@host/\n"):
        with pytest.raises(ValueError, match=r"config\.json and log would keep") as refused:
            check(make_config(overrides, **{"reward.http.url": url}))
        assert "abcdefgh" not in str(refused.value)
