"""Judging: the same noise for every checkpoint, figures that numpy agrees with, and one line of JSON at the end."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import PROMPTS, experiment, make_config, run_script, run_stage, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file

from b2diffurl.algorithm.seeding import generator
from b2diffurl.configuration.keys import KEYS, flatten
from b2diffurl.configuration.plan import checked_settings
from b2diffurl.configuration.recorded import take_recorded
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import SamplerSettings, deployed_sampler, sample_images, scheduler_class
from b2diffurl.evaluation.measure import evaluate, prompt_images
from b2diffurl.evaluation.statistics import name_best, summarise_diversity
from b2diffurl.experiment.evaluation_table import describe, describe_sampler, evaluation_rows, with_error
from b2diffurl.experiment.folder import checkpoint_name, resolve_checkpoint
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.models import stable_diffusion
from b2diffurl.models.policy import load_policy
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.files import read_json, read_json_lines, write_record

KNOWN = stable_diffusion.schedulers()
SAMPLERS = {"training": SamplerSettings(num_steps=4, eta=1.0, guidance_scale=5.0)}


def judged(folder, overrides: dict, checkpoints: list[str], prompts: list[str] | None = None, **more) -> list[dict]:
    with contextlib.chdir(folder):
        return evaluate(checked_settings(make_config(overrides, **more)), checkpoints, prompts or ["test"], SAMPLERS)


def test_judging_the_base_twice_gives_the_same_numbers(overrides, tmp_path):
    """Everything sampled and scored anew: every value is the same, and every image that is kept; by one process, also in a
    run of several.

    Both batches ask for the same three prompts, and draw them from noise of their own.
    """
    batch = {"eval.batch_size": len(PROMPTS)}
    (one,) = judged(tmp_path, overrides, ["base"], **batch)
    files = snapshot(tmp_path)
    shutil.rmtree(tmp_path / "model")
    (two,) = judged(tmp_path, overrides, ["base"], num_processes=2, **batch)
    assert one == two
    assert snapshot(tmp_path) == files
    assert len(set(one["values"]["reward"])) == 6


def test_a_lora_that_was_never_updated_equals_the_base(overrides, tmp_path):
    """A stage that selected nothing leaves the base: the same rewards to the bit, image by image, and a gain of 0."""
    run_stage(tmp_path, overrides | {"eval.pos_threshold": 1e9, "eval.neg_threshold": -1e9})
    base, last = judged(tmp_path, overrides, ["last", "base"])
    assert (base["checkpoint"], last["checkpoint"]) == ("base", "stage0")
    assert base["values"] == last["values"]
    assert (last["reward_gain"], last["reward_gain_se"]) == (0.0, 0.0)


def test_figures_by_numpy(workplace, overrides):
    """Means, standard errors and paired gains are those of the single values; a trained LoRA is not the base; both prompt
    sets are judged."""
    results = judged(workplace, overrides, ["stage0", "last", "base"], ["train", "test"], **{"eval.judge": "shapes"})
    assert [result["checkpoint"] for result in results] == ["base"] * 2 + ["stage0"] * 2 + ["stage1"] * 2
    for result in results:
        base = next(one for one in results if one["checkpoint"] == "base" and one["prompts"] == result["prompts"])
        values = {key: np.array(numbers) for key, numbers in result["values"].items()}
        assert values["reward"].shape == values["accuracy"].shape == (6,)
        for key, numbers in values.items():
            assert result[key] == pytest.approx(numbers.mean())
            assert result[f"{key}_se"] == pytest.approx(numbers.std(ddof=1) / 6**0.5)
            difference = numbers - np.array(base["values"][key])
            if result is not base:
                assert result[f"{key}_gain"] == pytest.approx(difference.mean())
                assert result[f"{key}_gain_se"] == pytest.approx(difference.std(ddof=1) / 6**0.5)
        assert (result["values"]["reward"] == base["values"]["reward"]) == (result is base)


def test_diversity_is_reported_by_prompt_and_paired(workplace, overrides):
    """Six images of three prompts are three pairs; the mean, its error over prompts and the paired gain follow from them."""
    base, last = judged(workplace, overrides, ["base", "last"], **{"eval.diversity": ("clip", "layout")})
    pairs = [base["diversity"]["clip"]["all"], last["diversity"]["clip"]["all"]]
    assert pairs[0].keys() == pairs[1].keys() == set(PROMPTS)
    before, after = (np.array([one[prompt] for prompt in PROMPTS]) for one in pairs)
    assert (before > 0).all()
    assert (before != after).all()
    assert last["diversity/clip"] == pytest.approx(after.mean())
    assert last["diversity/clip_se"] == pytest.approx(after.std(ddof=1) / 3**0.5)
    assert last["diversity/clip_gain"] == pytest.approx((after - before).mean())
    assert last["diversity/clip_gain_se"] == pytest.approx((after - before).std(ddof=1) / 3**0.5)
    for result, pair in zip((base, last), pairs, strict=True):  # two images of similarity c: eigenvalues (1 +- c) / 2
        shares = {prompt: np.array([distance / 2, 1 - distance / 2]) for prompt, distance in pair.items()}
        expected = {prompt: np.exp(-(share * np.log(share)).sum()) for prompt, share in shares.items()}
        assert result["diversity"]["clip"]["vendi"] == pytest.approx(expected)
        assert result["diversity/clip_vendi"] == pytest.approx(np.mean(list(expected.values())))
    assert "vendi" not in last["diversity"]["layout"]  # distances of layouts are no similarities
    assert last["diversity/layout"] is None  # an untrained model shows no things, so it has no layouts
    assert "diversity/clip_right" not in last  # without a judge nobody knows which are right


def test_diversity_of_right_images_leaves_the_wrong_ones_out():
    """Rows 1 and 3 are wrong: what is left of prompt a is one pair, of prompt b a single image."""
    features = torch.tensor([[0.0], [50.0], [3.0], [90.0], [1.0]])
    found = summarise_diversity(features, list("aaabb"), [1.0, 0.0, 1.0, 0.0, 1.0], "euclidean")
    assert found == {"all": {"a": pytest.approx((50 + 3 + 47) / 3), "b": 89.0}, "right": {"a": 3.0}}


def test_a_reward_of_the_users_own(overrides, tmp_path, monkeypatch):
    """`package.module:function` names any function on the Python path: its mean is the reward."""
    (tmp_path / "my_rewards.py").write_text(
        "def redness(images, prompts):\n    return images[..., 0].float().mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (result,) = judged(tmp_path, overrides, ["base"], **{"reward.name": "my_rewards:redness", "eval.num_images": 4})
    shown = sorted((experiment(tmp_path) / result["folder"]).glob("*.png"))
    assert result["values"]["reward"] == pytest.approx([np.asarray(Image.open(path))[..., 0].mean() for path in shown])


def test_what_a_reward_is_belongs_to_an_evaluation(overrides, tmp_path, monkeypatch):
    """Another line in the file of your reward, or other weights of the CLIP that only diversity uses: judged anew."""
    source = tmp_path / "constant_reward.py"
    source.write_text("def one(images, prompts):\n    return images[:, 0, 0, 0] * 0.0 + 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    clip = shutil.copytree(overrides["reward.clip.model"], tmp_path / "clip")
    settings = {"reward.name": "constant_reward:one", "reward.clip.model": str(clip), "eval.num_images": 2}
    folders = []
    for changed in (None, None, source, clip / "model.safetensors"):
        if changed == source:
            source.write_text(source.read_text() + "# another version\n")
        elif changed:
            weights = load_file(changed)
            save_file({name: value * 1.5 for name, value in weights.items()}, changed)
        folders.append(judged(tmp_path, overrides, ["base"], **settings)[0]["folder"])
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_evaluation_noise_is_its_own(overrides, tmp_path):
    """It depends on eval.seed and not on the experiment's seed, and is none of the training noise."""
    (one,) = judged(tmp_path, overrides, ["base"])
    (same,) = judged(tmp_path, overrides, ["base"], seed=301, exp_name="other")
    (other,) = judged(tmp_path, overrides, ["base"], exp_name="third", **{"eval.seed": 1})
    assert one["values"] == same["values"]
    assert one["values"] != other["values"]
    assert generator(0, "eval", 0).initial_seed() != generator(0, 0, "sample", 0).initial_seed()


def test_prompts_are_taken_in_turn_and_the_last_batch_is_cut(overrides, tmp_path):
    """Five images of three prompts in batches of four: the prompts in turn, five values, five images."""
    (result,) = judged(tmp_path, overrides, ["base"], **{"eval.num_images": 5})
    assert result["shown_prompts"] == [PROMPTS[n % 3] for n in range(5)]
    assert len(result["values"]["reward"]) == result["n_images"] == 5
    assert len(list(tmp_path.rglob("*.png"))) == 5


def test_judging_leaves_the_experiment_alone(workplace, overrides):
    """Evaluations and the report are added, a second call changes nothing, and its last line is one JSON object."""
    before = snapshot(workplace)
    arguments = ("--checkpoint=base,last", "--prompts=train,test", "--sampler=training")
    first = run_script(workplace, "eval", overrides, *arguments)
    assert first.code == 0, first.stderr
    after = snapshot(workplace)
    assert {name: after[name] for name in before} == before
    added = {name.removeprefix("model/lora/tiny/").split("/")[0] for name in after.keys() - before.keys()}
    assert added == {"eval", "eval.jsonl", "report", "report.html"}
    second = run_script(workplace, "eval", overrides, *arguments)
    assert snapshot(workplace) == after
    line, again = (json.loads(ended.stdout.splitlines()[-1]) for ended in (first, second))
    assert line == again
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
    assert json.loads(short.stdout.splitlines()[-1]) == json.loads(full.stdout.splitlines()[-1])
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


def test_a_reward_that_is_given_stands_alone(workplace, overrides):
    """A name on the command line is not outdone by a recorded mixture, nor a prompt file by a recorded prompt; without
    either both are as recorded. What the record lacks, and what earlier versions called otherwise, is understood."""
    path = experiment(workplace) / "config.json"
    record = read_json(path)
    mixture = {"clip": 1.0, "jpeg_compressibility": 0.5}
    record["config"]["reward"] |= {"weights": mixture, "standardise": True, "model": "another/clip"}
    record["config"]["prompt"] = "a red circle"
    del record["config"]["reward"]["clip"], record["config"]["reward"]["dtype"], record["config"]["sample"]["eta"]
    write_record(path, record)

    def begun(*given: str) -> dict:
        config = make_config({"exp_name": "tiny", "reward.name": "aesthetic", "sample.eta": 0.5, "eval.seed": 7})
        with contextlib.chdir(workplace):
            take_recorded(config, given)
        check(config)
        return flatten(config.to_dict())

    alone = begun("reward.name", "prompt_file")
    assert (alone["reward.name"], alone["reward.weights"], alone["reward.standardise"]) == ("aesthetic", None, False)
    assert alone["prompt"] == ""
    assert begun("reward.weights")["reward.standardise"] is False
    assert begun("reward.standardise")["reward.weights"] == mixture
    recorded = begun("eval.seed")
    assert recorded["reward.weights"] == mixture
    assert (recorded["reward.standardise"], recorded["prompt"]) == (True, "a red circle")
    for found in (alone, recorded):
        assert (found["reward.clip.model"], found["reward.dtype"]) == ("another/clip", "auto")
        assert (found["sample.num_steps"], found["sample.eta"], found["eval.seed"]) == (4, 0.5, 7)


def test_both_samplers_are_reported_by_default(workplace, overrides):
    """Held-out prompts, base and newest checkpoint, training's sampler and the deployed one: four rows of eval.jsonl, those
    of one sampler on the same noise, and the two samplers' images differ."""
    ended = run_script(workplace, "eval", overrides)
    assert ended.code == 0, ended.stderr
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
    assert json.loads(ended.stdout.splitlines()[-1]) == rows[-1]


def test_all_is_the_learning_curve_and_best_names_its_top(workplace, overrides):
    """Base and both stages, each judged once; --best takes what is there, and names the highest of them."""
    ended = run_script(workplace, "eval", overrides, "--all", "--sampler=training")
    assert ended.code == 0, ended.stderr
    path = experiment(workplace) / "eval.jsonl"
    rows = read_json_lines(path)
    assert [(row["checkpoint"], row["stage"]) for row in rows] == [("base", None), ("stage0", 0), ("stage1", 1)]
    files = snapshot(workplace)
    ended = run_script(workplace, "eval", overrides, "--best", "--sampler=training")
    assert snapshot(workplace) == files
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found == max(rows, key=lambda row: row["reward"])
    assert f"best of 3 checkpoints: {found['checkpoint']}" in ended.stdout


def test_the_best_is_by_the_judge_where_there_is_one():
    """On held-out prompts with the sampler that is named; the earliest of equals."""
    common = {"prompts": "test", "sampler": "training", "lora": "", "accuracy_se": 0.1, "reward_se": 0.1}
    figures = {"base": (0.5, 0.9), "stage0": (0.7, 0.1), "stage1": (0.7, 0.2)}
    rows = [common | {"checkpoint": name, "accuracy": a, "reward": r} for name, (a, r) in figures.items()]
    others = [row | {key: "train", "accuracy": 0.9} for row in rows for key in ("prompts", "sampler")]
    assert name_best([*others, *rows], "training")["checkpoint"] == "stage0"
    assert name_best([row | {"accuracy": None} for row in rows], "training")["checkpoint"] == "base"
    with pytest.raises(ValueError, match=r"eval\.judge"):
        name_best([row | {"accuracy": None, "reward": None} for row in rows], "training")


def test_an_earlier_difference_stays_when_the_base_is_not_asked_for(workplace, overrides):
    judged(workplace, overrides, ["base", "last"])
    path = experiment(workplace) / "eval.jsonl"
    before = {row["checkpoint"]: row for row in read_json_lines(path)}
    judged(workplace, overrides, ["last"])
    rows = read_json_lines(path)
    assert {row["checkpoint"]: row for row in rows} == before
    assert rows[-1]["checkpoint"] == "stage1"
    assert rows[-1]["reward_gain"] != 0


def test_only_rows_that_can_be_compared_make_a_curve(workplace, overrides):
    """Rows of another number of images are other conditions: readers get the longest curve, of equals the newest. What was
    judged inside a stage is no part of it."""
    root = experiment(workplace)
    judged(workplace, overrides, ["base", "stage1"])
    judged(workplace, overrides, ["base", "stage1"], **{"eval.num_images": 3})
    assert [(row["checkpoint"], row["n_images"], row["queries"]) for row in evaluation_rows(root)] == [
        ("base", 3, 0),
        ("stage1", 3, 36),
    ]
    judged(workplace, overrides, ["stage0", "model/lora/tiny/stage1/checkpoints/checkpoint_1"])
    judged(workplace, overrides, ["base", "stage1"], **{"eval.num_images": 3})
    names = [row["checkpoint"] for row in read_json_lines(root / "eval.jsonl")]
    assert sorted(names) == ["base", "base", "stage0", "stage1", "stage1", "stage1/checkpoint_1"]
    rows = evaluation_rows(root, prompts="test", sampler="training")
    assert [(row["checkpoint"], row["n_images"], row["queries"]) for row in rows] == [
        ("base", 6, 0),
        ("stage0", 6, 18),
        ("stage1", 6, 36),
    ]
    assert evaluation_rows(root, prompts="train") == []


def test_one_image_has_no_error(overrides, tmp_path):
    """Nor has a mean over one prompt; it is left out of what is said, and is not 0."""
    (result,) = judged(tmp_path, overrides, ["base"], **{"eval.num_images": 1})
    assert result["reward_se"] is None
    assert result["diversity/clip"] is None
    assert describe(result).endswith(f"reward {result['reward']:.4f}")
    assert with_error(result, "reward") == f"{result['reward']:.4f}"


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


def test_a_checkpoint_that_draws_the_base_s_images_is_refused(workplace, overrides):
    """Its weights are all zero though its state tells of updates: somebody lost what was learned."""
    folder = Stage(experiment(workplace), 1).checkpoints()[-1]
    elsewhere = shutil.copytree(folder, workplace / "copied")
    weights = load_file(elsewhere / LORA_FILE)
    save_file({name: value * 0 for name, value in weights.items()}, elsewhere / LORA_FILE)
    state = read_json(elsewhere / "state.json")
    del state["files"]  # of an earlier version, which noted no checksums
    write_record(elsewhere / "state.json", state)
    said = r"updates and draws exactly the base model's images"
    with pytest.raises(ValueError, match=said):  # whether the base is judged, too, or not
        judged(workplace, overrides, [str(elsewhere)])
    with pytest.raises(ValueError, match=said):
        judged(workplace, overrides, ["base", str(elsewhere)])
    with pytest.raises(ValueError, match=said):  # the base was judged before
        judged(workplace, overrides, [str(elsewhere)])
    with contextlib.chdir(workplace), pytest.raises(ValueError, match=said):
        prompt_images(checked_settings(make_config(overrides)), str(elsewhere), "a red circle", SAMPLERS["training"])
    shutil.copy(folder / LORA_FILE, elsewhere)
    base, tuned = judged(workplace, overrides, ["base", str(elsewhere)])
    assert base["images_sha256"] != tuned["images_sha256"]


def test_a_prompt_is_drawn_by_base_and_checkpoint(workplace, overrides):
    """One PNG of two rows on the same noise, which differ; the same bytes each time; base against itself is alike."""
    ended = run_script(workplace, "eval", overrides, "--prompt=a red circle", "--sampler=training")
    assert ended.code == 0, ended.stderr
    picture = workplace / json.loads(ended.stdout.splitlines()[-1])["picture"]
    drawn = picture.read_bytes()
    assert Image.open(picture).width > 800
    run_script(workplace, "eval", overrides, "--prompt=a red circle", "--sampler=training")
    assert picture.read_bytes() == drawn
    names = set()
    for arguments in (("--checkpoint=stage0",), ("--checkpoint=base",), ("--sampler=deployed",)):
        line = run_script(workplace, "eval", overrides, "--prompt=a red circle", *arguments).stdout.splitlines()[-1]
        names.add(json.loads(line)["picture"])
    assert len(names | {str(picture.relative_to(workplace))}) == 4
    with contextlib.chdir(workplace):
        images = prompt_images(checked_settings(make_config(overrides)), "last", "a red circle", SAMPLERS["training"])
        alone = prompt_images(checked_settings(make_config(overrides)), "base", "a red circle", SAMPLERS["training"])
    assert (list(images), list(alone)) == (["base", "stage1"], ["base"])
    base, tuned = images.values()
    assert torch.equal(base, alone["base"])
    assert not torch.equal(base, tuned)
    assert len({image.numpy().tobytes() for image in base}) == len(base)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDM", "DPMSolverMultistepScheduler", "EulerAncestralDiscrete", "HeunDiscrete"]
)
def test_any_scheduler_draws_what_the_stock_pipeline_draws(config, models, name):
    """Stable Diffusion's own pipeline with that scheduler, from the same latents and later noise: the same image."""
    from diffusers import StableDiffusionPipeline

    settings = SamplerSettings(num_steps=6, eta=0.0, guidance_scale=5.0, scheduler=scheduler_class(name, KNOWN).__name__)
    values = read_settings(config)
    model = load_policy(values.model, make_accelerator(values.compute), None, seed=0, compile=False)
    ours = sample_images(values, model, PROMPTS, settings, 0)
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_class(name, KNOWN).from_config(pipeline.scheduler.config)
    rng = generator(0, "eval", 0)
    latents = torch.randn(len(PROMPTS), *model.latent_shape, generator=rng)
    stock = pipeline(
        PROMPTS, latents=latents, generator=rng, num_inference_steps=6, guidance_scale=5.0, eta=0.0, output_type="np"
    ).images
    difference = np.abs(ours.numpy() / 255 - stock)
    assert difference.max() < 0.6 / 255
    assert stock.std() > 0.01


def test_inception_score_of_a_classifier(overrides, tmp_path):
    """`inception` among eval.diversity: of each prompt the Inception Score of the classes that a real classifier of
    transformers sees in its images, as computed here from its logits one image at a time."""
    from transformers import AutoImageProcessor, ViTForImageClassification

    folder = tiny.classifier(tmp_path / "vit")
    settings = {"eval.diversity": ("inception",), "eval.inception.model": str(folder)}
    (result,) = judged(tmp_path, overrides, ["base"], **settings)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    classifier = ViTForImageClassification.from_pretrained(folder).eval()
    expected = {}
    for n, prompt in enumerate(PROMPTS):
        images = [experiment(tmp_path) / result["folder"] / f"{row:05d}.png" for row in (n, n + 3)]
        pixels = [processor(images=Image.open(path), return_tensors="pt").pixel_values for path in images]
        seen = np.stack([classifier(one).logits.softmax(1).detach().numpy()[0] for one in pixels])
        assert np.abs(seen[0] - seen[1]).max() > 1e-3
        divergences = (seen * np.log(seen / seen.mean(0))).sum(1)
        expected[prompt] = np.exp(divergences.mean())
    assert result["diversity"]["inception"]["all"] == pytest.approx(expected, abs=1e-5)
    assert result["diversity/inception"] == pytest.approx(np.mean(list(expected.values())), abs=1e-5)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    save_file({name: value * 2 for name, value in weights.items()}, path, metadata={"format": "pt"})
    (other,) = judged(tmp_path, overrides, ["base"], **settings)
    assert other["conditions"] != result["conditions"]


def test_samplers_are_checked_by_name():
    for name in ("Magic", "EDMEuler", "DPMSolverSDE"):
        with pytest.raises(ValueError, match=rf"unknown eval.deployed.scheduler '{name}'; known: .*DDIMScheduler, .*UniPC"):
            scheduler_class(name, KNOWN)


def test_only_schedulers_that_have_an_eta_are_said_to(config):
    """DDIM is; Euler's ancestral one is stochastic without."""
    assert (
        describe_sampler(row_of(deployed_sampler(read_settings(config))))
        == "deployed sampler: DDIM, 6 steps, eta 0, guidance 5"
    )
    config.eval.deployed.scheduler = "EulerAncestralDiscrete"
    said = describe_sampler(row_of(deployed_sampler(read_settings(config))))
    assert said == "deployed sampler: EulerAncestralDiscrete, 6 steps, guidance 5"


def row_of(settings: SamplerSettings) -> dict:
    return {"sampler": "deployed"} | vars(settings)


def test_more_steps_than_the_scheduler_has_are_refused_before_sampling(overrides, tmp_path):
    """Not after the training, when the run is judged by it."""
    ended = run_script(tmp_path, "sample", overrides | {"eval.deployed.num_steps": 1001})
    assert ended.code == 2
    assert "1001" in ended.stderr
    assert not experiment(tmp_path).exists()


def test_an_altered_checkpoint_is_refused_by_path_too(workplace, overrides):
    lora = Stage(experiment(workplace), 1).checkpoints()[0] / LORA_FILE
    save_file({name: value + 1 for name, value in load_file(lora).items()}, lora)
    with pytest.raises(ValueError, match=r"checkpoint_1.*checksum"):
        judged(workplace, overrides, ["model/lora/tiny/stage1/checkpoints/checkpoint_1"])


def test_last_is_the_newest_finished_stage(workplace):
    """By number, not by name: stage10 comes after stage2. What is unfinished, or only looks like a stage, is none."""
    root = experiment(workplace)
    for name in ("stage2", "stage10", "stage9_backup", "stage11"):
        shutil.copytree(root / "stage1", root / name)
    (root / "stage11" / "train.json").unlink()
    assert [stage.index for stage in finished_stages(root, "train")] == [0, 1, 2, 10]
    assert resolve_checkpoint(root, "last").is_relative_to(root / "stage10")


def test_a_checkpoint_inside_a_stage_goes_by_the_name_it_has_in_results(workplace, overrides):
    """It is that one, and a stage's last is the stage; one of a finished stage must be what the stage wrote, one of an
    interrupted stage is taken, and of one that is not there those that are are named."""
    root = experiment(workplace)
    first, last = (folder / LORA_FILE for folder in Stage(root, 0).checkpoints())
    for name, lora, found in (
        ("stage0/checkpoint_1", first, "stage0/checkpoint_1"),
        ("stage0/checkpoint_2", last, "stage0"),
    ):
        assert resolve_checkpoint(root, name) == lora
        assert checkpoint_name(root, lora) == found
    (result,) = judged(workplace, overrides, ["stage0/checkpoint_1"])
    assert (result["checkpoint"], result["stage"]) == ("stage0/checkpoint_1", 0)
    said = (
        r"no checkpoint 'stage0/checkpoint_7': there are stage0/checkpoint_1, stage0/checkpoint_2\. Experiments in .*: tiny"
    )
    with pytest.raises(FileNotFoundError, match=said):
        resolve_checkpoint(root, "stage0/checkpoint_7")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'stage7/checkpoint_1': trained are stage0, stage1"):
        resolve_checkpoint(root, "stage7/checkpoint_1")
    save_file({name: value + 1 for name, value in load_file(first).items()}, first)
    with pytest.raises(ValueError, match=r"checkpoint_1.*checksum"):
        resolve_checkpoint(root, "stage0/checkpoint_1")
    Stage(root, 0).manifest_path("train").unlink()
    assert resolve_checkpoint(root, "stage0/checkpoint_1") == first
