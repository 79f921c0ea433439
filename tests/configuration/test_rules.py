"""Values that cannot work are refused with what is allowed; switches combine but for what an objective needs."""

import os

import pytest
from conftest import make_config, plan

from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.rules import check_secrets


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run_name", "latest", "stage0, stage1"),
        ("exp_name", "../elsewhere", "exp_name"),
        ("exp_name", "..", "exp_name"),
        ("split_step", 5, r"1\.\.4"),
        ("split_step", -1, r"1\.\.4"),
        ("split_step_right", 5, r"1\.\.4"),
        ("split_step_left", 0, r"1\.\.4"),
        ("split_step_left", 4, r"4\.\.3"),
        ("split_time", 0, "split_time is 0"),
        ("split_time", 1, "at least 2 siblings"),
        ("split_times", (3, 1), r"a number of split_times is 1; it must lie in \[2, 1e4\]"),
        ("split_times", ("3",), r"split_times is \('3',\); it must be whole numbers"),
        ("split_times", (2, 3), "split_after has 0 numbers and split_times 2; it must have one fewer"),
        ("split_after", (1,), "split_after has 1 numbers and split_times 0"),
        ("curriculum", "forward", "'progressive', 'fixed', 'reversed', 'random'"),
        ("sampling", "prefix", "'branch', 'independent'"),
        ("sample.num_steps", 0, "sample.num_steps is 0"),
        ("sample.batch_size", 0, "sample.batch_size is 0"),
        ("sample.num_batches_per_epoch", -1, "sample.num_batches_per_epoch is -1"),
        ("sample.eta", 0.0, "eta is 0"),
        ("sample.eta", 1.5, "eta is 1.5"),
        ("sample.eta", float("nan"), "eta is nan"),
        ("sample.guidance_scale", 0.5, "guidance_scale is 0.5"),
        ("reward.batch_size", 0, "reward.batch_size is 0"),
        ("selection.pos_threshold", -0.6, "pos_threshold is below"),
        ("selection.history_cnt", -1, "history_cnt is -1"),
        ("train.num_epochs", 0, "train.num_epochs is 0"),
        ("train.batch_size", 0, "train.batch_size is 0"),
        ("train.gradient_accumulation_steps", 0, "train.gradient_accumulation_steps is 0"),
        ("train.micro_batch_size", 0, "train.micro_batch_size is 0"),
        ("train.lora_rank", 0, "train.lora_rank is 0"),
        ("train.save_interval", 0, "train.save_interval is 0"),
        ("train.objective", "ppo2", "'ddpo', 'reinforce', 'dpok', 'd3po'"),
        ("train.objective", "reinforce", "num_epochs is 2; reinforce .* one pass"),
        ("train.kl_weight", -0.1, "kl_weight is -0.1"),
        ("train.kl_weight", float("nan"), "kl_weight is nan"),
        ("train.kl_weight", float("inf"), "kl_weight is inf"),
        ("train.dpo_beta", -1.0, "dpo_beta is -1.0"),
        ("train.eps", -0.1, "eps is -0.1"),
        ("train.step_weight", "both", "'none', 'leverage', 'sigma'"),
        ("selection.advantage", "batch", "'prompt', 'group'"),
        ("selection.images", "best", "'pairs', 'all'"),
        ("mixed_precision", "fp8", "'bf16'"),
        ("track_with", ("mlflow",), "'wandb', 'tensorboard'"),
        ("wandb_mode", "yes", "'offline', 'online'"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, overrides, key, value, message):
    """The error says what was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, overrides | {key: value})


OBJECTIVE_NEEDS = {
    "ddpo": {},
    "dpok": {},
    "reinforce": {"train.num_epochs": 1},
    "d3po": {"sampling": "branch", "selection.images": "pairs"},
}


@pytest.mark.parametrize("advantage", ["prompt", "group"])
@pytest.mark.parametrize("selection", ["pairs", "all"])
@pytest.mark.parametrize("sampling", ["branch", "independent"])
@pytest.mark.parametrize("objective", OBJECTIVE_NEEDS)
def test_switches_combine_freely_but_for_what_an_objective_needs(
    tmp_path, overrides, objective, sampling, selection, advantage
):
    """Any objective runs with any sampling, selection and advantage, except for d3po, which compares branches in pairs, and
    reinforce, which makes one pass."""
    settings = {"train.objective": objective, "sampling": sampling}
    settings |= {"selection.images": selection, "selection.advantage": advantage}
    needs = OBJECTIVE_NEEDS[objective]
    if settings | needs == settings:
        plan(tmp_path, overrides | settings)
    else:
        with pytest.raises(ValueError, match=f"{objective}.*(one pass|must be (branch|pairs))"):
            plan(tmp_path, overrides | settings)
    plan(tmp_path, overrides | settings | needs)


TREE = {"split_times": (2, 3), "split_after": (1,)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split_after": (2,)}, r"split_after is \(2,\).*after 2 trained steps.*the shortest window, which has 2"),
        ({"split_times": (2, 2, 2), "split_after": (1, 1)}, "after 2 trained steps"),
        ({"split_step": 1}, "the shortest window, which has 1"),
        ({"sampling": "independent"}, "split_after makes a tree.*sampling must be branch"),
        ({"train.objective": "d3po"}, "d3po compares two ways.*split_times must have one number, or none"),
        ({"train.timestep_fraction": 0.5}, "timestep_fraction is 0.5; it must be 1 in a tree"),
    ],
)
def test_a_tree_needs_room_and_shared_steps(tmp_path, overrides, more, message):
    """It parts for the last time before the shortest window ends; what compares ways step by step, or draws steps, has none.
    With one parting all of that is as with split_time."""
    for selection in ("pairs", "all"):
        plan(tmp_path, overrides | TREE | {"selection.images": selection})
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, overrides | TREE | more)
    plan(tmp_path, overrides | more | {"split_times": (3,), "split_after": ()})


def test_a_tree_has_siblings_whatever_split_time_is(tmp_path, overrides):
    sampling = plan(tmp_path, overrides | TREE | {"split_time": 1}).settings.sampling
    assert sampling.num_branches == 6
    assert plan(tmp_path, overrides).settings.sampling.num_branches == 3


@pytest.mark.parametrize("sampling", ["branch", "independent"])
def test_a_single_sibling_has_nothing_to_be_compared_with(tmp_path, overrides, sampling):
    """K = 1 works with selection all and scores relative to the prompt, and with nothing else."""
    single = overrides | {"split_time": 1, "sampling": sampling, "selection.images": "all"}
    plan(tmp_path, single)
    with pytest.raises(ValueError, match=r"split_time is 1.*selection.advantage=group"):
        plan(tmp_path, single | {"selection.advantage": "group"})
    with pytest.raises(ValueError, match=r"split_time is 1.*selection.images=all"):
        plan(tmp_path, single | {"selection.images": "pairs"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.timestep_fraction", 0.0, "train.timestep_fraction is 0.0; it must lie in (0, 1]"),
        ("train.timestep_fraction", 1.5, "train.timestep_fraction is 1.5"),
        ("sample.prefix_eta", -0.5, "sample.prefix_eta is -0.5; it must be -1"),
        ("sample.prefix_eta", 2.0, "sample.prefix_eta is 2.0"),
    ],
)
def test_values_that_cannot_be(overrides, key, value, message):
    with pytest.raises(ValueError) as error:
        make_plan(make_config(overrides | {key: value}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # T = 4, S from 2 to 3
        ({"split_stop": 2}, "split_stop is 2; a window of S = 2 starts after step 2, so it must lie in 3..4"),
        ({"split_stop": 5}, "split_stop is 5"),
        ({"split_stop": -1}, "split_stop is -1"),
        (
            {"split_stop": 3, "split_step": 1},
            "split_stop is 3; a window of S = 1 starts after step 3",
        ),
        ({"split_stop": 3, "curriculum": "early"}, "curriculum early decides itself where windows end, so it must be 0"),
        ({"split_stop": 4, "curriculum": "sliding"}, "curriculum sliding decides"),
        ({"curriculum": "sliding", "split_step_left": 5}, "5..5; it must lie in 1..4"),
        ({"curriculum": "early", "split_step_right": 5}, "2..5; it must lie in 1..4"),
        ({"sample.suffix_eta": -0.5}, "sample.suffix_eta is -0.5; it must be -1"),
        ({"sample.suffix_steps": -1}, "sample.suffix_steps is -1"),
        ({"sample.suffix_steps": 1, "split_stop": 3}, "sample.suffix_eta -1.0; only a deterministic tail may be shorter"),
        ({"sample.suffix_steps": 1, "sample.suffix_eta": 0.5, "split_stop": 3}, "only a deterministic tail"),
        ({"sample.suffix_steps": 1, "sample.suffix_eta": 0.0}, "at most 0 of 4 steps follow the trained window"),
        ({"sample.suffix_steps": 1, "sample.suffix_eta": 0.0, "split_stop": 4}, "at most 0 of 4"),
        ({"sample.suffix_steps": 1, "sample.suffix_eta": 0.0, "split_stop": 3}, "at most 1 of 4"),
        ({"sample.suffix_steps": 2, "sample.suffix_eta": 0.0, "curriculum": "sliding"}, "at most 2 of 4"),
        ({"sample.suffix_steps": 2, "sample.suffix_eta": 0.0, "curriculum": "early"}, "at most 2 of 4"),
    ],
    ids=str,
)
def test_windows_and_tails_that_cannot_be(overrides, settings, message):
    with pytest.raises(ValueError) as error:
        make_plan(make_config(overrides | settings))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"split_stop": 3},
        {"split_stop": 4, "curriculum": "random"},
        {"split_stop": 2, "curriculum": "fixed", "split_step_left": 3},
        {"curriculum": "sliding", "split_step_left": 4, "split_step_right": 1},
        {"curriculum": "early", "split_step_right": 4},
        {"sample.suffix_eta": 0.5},
        *({"sample.suffix_steps": 1, "sample.suffix_eta": 0.0, "curriculum": moving} for moving in ("early", "sliding")),
        {"sample.suffix_steps": 1, "sample.suffix_eta": 0.0, "curriculum": "fixed", "split_step_left": 4, "split_stop": 2},
    ],
    ids=str,
)
def test_windows_and_tails_that_can_be(tmp_path, overrides, settings):
    plan(tmp_path, overrides | settings)


WORD = "zq81hJk2" * 2


@pytest.fixture
def no_secrets(monkeypatch):
    """An environment in which nothing is secret."""
    for name in list(os.environ):
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_secrets")
@pytest.mark.parametrize(
    "url",
    [
        *(f"http://host/score?{name}={WORD}" for name in ("api_key", "apikey", "apiKey", "API-KEY", "key", "sig", "auth")),
        *(
            f"https://host:1/?a=b&{name}=x"
            for name in ("access_token", "accessToken", "secret", "client_secret", "password")
        ),
        *(f"http://host/#{name}={WORD}" for name in ("token", "id_token", "/path?key", "X-Amz-Signature", "pwd", "pass")),
        *(f"http://host/?{name}={WORD}" for name in ("%61pi_key", "subscription-key", "x;jwt", "credential", "passwd")),
    ],
)
def test_a_secret_in_a_url_is_refused(url):
    """In the query and the fragment, in any setting, also within a list; the error does not show it."""
    for key, value in (("reward.http.url", url), ("pretrained.model", url), ("mine", ("a", url)), ("mine", {"a": url})):
        with pytest.raises(ValueError, match=r"reads like a secret, and config\.json and log would keep") as refused:
            check_secrets({key: value})
        assert WORD not in str(refused.value)
        assert "REWARD_HTTP_AUTHORIZATION" in str(refused.value)


@pytest.mark.usefixtures("no_secrets")
@pytest.mark.parametrize(
    "value",
    [
        "http://host:8000/score?model=clip&max_tokens=64&keyboard=us&tokenizer=t5&author=me&monkey=1&keys=2&compass=n",
        "http://host/?token=&key=",
        "http://host/token=abc/key=abc",
        "https://huggingface.co/a/b#usage",
        "a cat; key=value, is there a token=?",
    ],
)
def test_an_ordinary_url_is_none(value):
    check_secrets({"reward.http.url": value})


@pytest.mark.usefixtures("no_secrets")
@pytest.mark.parametrize(
    "name",
    [
        "OPENAI_KEY", "OPENAI_API_KEY", "GH_PAT", "GITHUB_TOKEN", "DB_PASS", "MYSQL_PWD", "PGPASSWORD", "SOME_CREDENTIALS",
        "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "openai_key", "AZURE_CLIENT_SECRET", "API_KEY_2", "KEY",
        "BASIC_AUTH", "SSH_PASSPHRASE", "REWARD_HTTP_AUTHORIZATION", "SERVICE_JWT", "NPM_CREDS", "MYTOKEN",
    ],
)  # fmt: skip
def test_the_value_of_a_secret_variable_is_refused(name, monkeypatch):
    """Also as a part of a setting; the variable is named, its value is not shown. A short value is no secret."""
    monkeypatch.setenv(name, f"Bearer {WORD}")
    with pytest.raises(ValueError, match=f"what the variable {name} holds") as refused:
        check_secrets({"exp_name": f"my-{WORD}-run"})
    assert WORD not in str(refused.value)
    monkeypatch.setenv(name, "us")
    check_secrets({"exp_name": "us"})


@pytest.mark.usefixtures("no_secrets")
def test_an_ordinary_variable_is_none(monkeypatch, tmp_path):
    """Though its name has such a word in it, or its value is the path of a file or folder that is there."""
    (tmp_path / "agent").touch()
    for name in ("PWD", "OLDPWD", "KEYBOARD", "SSH_AUTH_SOCK", "XDG_DATA_HOME", "TOKENIZERS_PARALLELISM", "BYPASS", "COMPAT",
                 "SSH_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN_PATH", "MONKEY", "PATH"):  # fmt: skip
        monkeypatch.setenv(name, f"{tmp_path}/agent")
        check_secrets({"save_path": f"{tmp_path}/agent/runs"})
    for name in ("PWD", "OLDPWD", "KEYBOARD", "SSH_AUTH_SOCK", "XDG_DATA_HOME", "BYPASS", "MONKEY"):
        monkeypatch.setenv(name, "/nowhere/at/all")
    check_secrets({"save_path": "/nowhere/at/all"})
