"""What is stored of trajectories: whole batches in order, the selected alone afterwards, and never many in memory."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    experiment,
    run_stage,
    stage_of,
    update_of,
)
from gaussian import GaussianWorld
from safetensors.torch import load_file

from b2diffurl.algorithm.branching import branch_sample
from b2diffurl.algorithm.selection import Selected
from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.window import Window
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.trajectories import SelectedTrajectories, batch_damage, save_batch, save_selected
from b2diffurl.phases import sample, scoring
from b2diffurl.runtime import files
from b2diffurl.runtime.threads import Behind, ahead


def test_a_stage_holds_few_batches(overrides, tmp_path, monkeypatch):
    """The scripts themselves: of all that was sampled, and of all images and trajectories that were read back, there is what
    is worked on and the next one, no more."""
    seen: dict[str, list[weakref.ref]] = {"sampled": [], "images": [], "trained": []}
    most: Counter = Counter()

    def watch(owner, name: str, kind: str, pick) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            seen[kind].append(weakref.ref(pick(result, args)))
            most[kind] = max(most[kind], sum(one() is not None for one in seen[kind]))
            return result

        monkeypatch.setattr(owner, name, call)

    watch(sample, "branch_sample", "sampled", lambda result, args: result[0])
    watch(scoring, "score", "images", lambda result, args: args[1])
    watch(SelectedTrajectories, "read", "trained", lambda result, args: result.latents)
    settings = overrides | {"sample.num_batches_per_epoch": 8, "train.gradient_accumulation_steps": 1}
    run_stage(tmp_path, settings)
    assert {kind: len(some) >= 8 for kind, some in seen.items()} == dict.fromkeys(seen, True)
    assert most["sampled"] <= 2
    assert most["images"] <= 2
    assert most["trained"] <= 3  # one more while the next is being read


@pytest.mark.long
def test_memory_does_not_grow_with_a_stages_batches(tmp_path):
    """Sampling, selecting and training 12 batches, then 48, of 8 MB each: the process grows by less than a tenth of what
    the 36 batches more weigh."""
    path = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {path}; from {__name__} import grow; grow(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    # Large blocks go back to the system when they are freed. By default glibc raises this limit to the size of the first one
    # that is freed, and keeps the others in its heap, more of it or less by chance.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    few, many, weight = json.loads(ended.stdout.splitlines()[-1])
    print(f"grew by {(many - few) / 1e6:.0f} MB of {weight / 1e6:.0f} MB")
    assert weight > 250e6
    assert many - few < weight / 10


def grow(folder: str) -> None:
    """Peak memory after a stage of 12 batches and after one of 48, and what the 36 batches weigh; in a process alone."""
    world = GaussianWorld()
    world.latent_shape = shape = (4, 128, 128)
    sampler = world.sampler(4)
    conditions, unconditional = world.encode(["0"]), world.encode(["0"])
    rng = torch.Generator().manual_seed(0)

    def run(one: Stage, num_batches: int) -> None:
        with Behind() as writer:
            for batch in range(num_batches):
                latents, log_probs, _ = branch_sample(
                    lambda x, i: torch.zeros_like(x),
                    sampler,
                    torch.randn((4, *shape), generator=rng),
                    lambda size: torch.randn(size, generator=rng),
                    tree=Tree((2,)),
                    window=Window(1, 4),
                )
                writer.do(lambda batch=batch, latents=latents, log_probs=log_probs: save_batch(
                    one.batch(batch), latents, log_probs, sampler.timesteps[1:], ["0"] * 4, conditions, unconditional, {},
                    tree=Tree((2,)),
                ))  # fmt: skip
            writer.wait()
        selected = [Selected(group, 0, 1.0) for group in range(4 * num_batches)]
        save_selected(one, selected, 4)
        stored = SelectedTrajectories(one, selected, 4)
        deals = torch.randperm(len(selected), generator=rng).split(8)
        assert sum(len(some) for _, some in ahead(lambda rows: stored.read(rows.tolist()), deals)) == len(selected)

    peaks = []
    for index, num_batches in enumerate((12, 48)):
        run(Stage(Path(folder), index), num_batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    print(json.dumps([*peaks, 36 * 4 * 2 * 4 * 4 * 128 * 128 * 4]))


def test_selected_files_hold_the_selected_and_nothing_else(workplace, tmp_path):
    """Read in any order, with repetition, trajectories are those of the samples with their own prompts' embeddings; each
    distinct embedding comes once."""
    source = stage_of(workplace)
    selected = [Selected(0, 2, 1.0), Selected(1, 0, -1.0), Selected(3, 1, 1.0), Selected(5, 0, -1.0), Selected(5, 2, 1.0)]
    written = save_selected(source, selected, 2)
    assert [path.name for path in written] == [f"batch_0000{n}.safetensors" for n in range(3)]
    order = [4, 0, 3, 0, 2]
    found = SelectedTrajectories(source, selected, 2).read(order)
    prompts = json.loads(source.prompts.read_text())
    for row, n in enumerate(order):
        one = selected[n]
        stored = load_file(source.batch(one.group // 2))
        embeddings = stored["condition.prompt_embeds"][stored["prompt_ids"][one.group % 2]]
        assert found.ids[row] == one.group * 3 + one.branch
        assert torch.equal(found.latents[row], stored["latents"][one.group % 2, one.branch])
        assert torch.equal(found.log_probs[row], stored["log_probs"][one.group % 2, one.branch])
        assert torch.equal(found.conditions["prompt_embeds"][found.prompt_ids[row]], embeddings)
    asked = {prompts[found.ids[row]] for row in range(len(order))}
    assert len(found.conditions["prompt_embeds"]) == len(asked)
    assert torch.equal(found.unconditional["prompt_embeds"], load_file(source.batch(0))["unconditional.prompt_embeds"])


def test_a_tree_s_shared_states_are_stored_once(tmp_path):
    """Two groups of 2 x 3 leaves that part again after 2 of 4 steps: the files hold two edges' steps and six leaves' ways,
    the copies those of the selected alone; what is read is the whole trajectory."""
    tree, stage = Tree((2, 3), (2,)), Stage(tmp_path, 0)
    rng = torch.Generator().manual_seed(0)
    edges, own = (torch.randn(2, n, steps, 1, 2, 2, generator=rng) for n, steps in ((2, 2), (6, 3)))
    latents = torch.cat([edges.repeat_interleave(3, dim=1), own], 2)
    log_probs = latents[:, :, 1:].flatten(3).sum(3)
    log_probs[:, :, 1] = log_probs[:, ::3, 1].repeat_interleave(3, dim=1)
    conditions = {"prompt_embeds": torch.tensor([[1.0], [2.0]])}
    unconditional = {"prompt_embeds": torch.zeros(1, 1)}
    given = latents, log_probs, torch.arange(4), ["a", "b"], conditions, unconditional, {}
    save_batch(stage.batch(0), *given, tree=tree)
    assert batch_damage(stage.batch(0)) == ""
    stored = load_file(stage.batch(0))
    shapes = {name: tuple(value.shape[:3]) for name, value in stored.items() if name.endswith(("latents", "log_probs"))}
    assert shapes == {
        "shared.0.latents": (2, 2, 2), "shared.0.log_probs": (2, 2, 2), "latents": (2, 6, 3), "log_probs": (2, 6, 2)
    }  # fmt: skip
    selected = [Selected(0, 1, 0.0), Selected(0, 5, 0.0), Selected(0, 2, 0.0), Selected(1, 3, 0.0)]
    save_selected(stage, selected, 2)
    assert len(load_file(stage.selected_batch(0))["shared.0.latents"]) == 3  # 1 and 2 share theirs
    order = [3, 0, 2, 1, 0]
    found = SelectedTrajectories(stage, selected, 2).read(order)
    for row, n in enumerate(order):
        one = selected[n]
        assert torch.equal(found.latents[row], latents[one.group, one.branch])
        assert torch.equal(found.log_probs[row], log_probs[one.group, one.branch])
        assert found.ids[row] == one.group * 6 + one.branch


def test_unselected_trajectories_go_after_selection(overrides, finished, tmp_path):
    """By default the samples go when the selection is written; what is left takes the share that was selected, and the
    training is that of a stage that kept all. A selection whose copies are gone is refused."""
    settings = overrides | {"keep.samples": False}
    run_stage(tmp_path, settings, verbs=("sample",))
    whole = sum(path.stat().st_size for path in stage_of(tmp_path).samples.iterdir())
    run_stage(tmp_path, settings, verbs=("select",))
    assert not stage_of(tmp_path).samples.exists()
    left = sum(path.stat().st_size for path in stage_of(tmp_path).selected.iterdir())
    assert left < 0.6 * whole  # 6 of 18, and the embeddings
    aside = stage_of(tmp_path).selected.rename(stage_of(tmp_path).folder / "aside")
    with pytest.raises(ValueError, match=r"run_select\.py again"):
        run_stage(tmp_path, settings, verbs=("train",))
    aside.rename(stage_of(tmp_path).selected)
    run_stage(tmp_path, settings)
    assert not stage_of(tmp_path).selected.exists()
    assert torch.equal(update_of(tmp_path), update_of(finished))


def test_a_stage_selected_before_there_were_copies_is_asked_to_be_selected_again(workplace, overrides):
    """An experiment that an earlier version left between selecting and training."""
    stage_of(workplace).manifest_path("train").unlink()
    path = stage_of(workplace).manifest_path("select")
    found = files.read_json(path)
    found["files"] = {name: facts for name, facts in found["files"].items() if not name.startswith("selected/")}
    files.write_record(path, found)
    shutil.rmtree(stage_of(workplace).selected)
    with pytest.raises(ValueError, match=r"Delete .*select.json and run run_select.py again"):
        run_stage(workplace, overrides, verbs=("train",))


def flip(data: bytes, bit: int) -> bytes:
    """The data with one bit another."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_of_a_sampling_batch_is_found(finished, tmp_path):
    """In its header, a bit of 13, and at 100 places of its tensors; it passes as it was."""
    stage = Stage(shutil.copytree(experiment(finished), tmp_path / "copy"), 1)
    path = stage.batch(1)
    assert batch_damage(path) == ""
    whole = path.read_bytes()
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    bits = [*range(0, header, 13), *random.Random(0).sample(range(header, 8 * len(whole)), 100)]
    for bit in bits:
        path.write_bytes(flip(whole, bit))
        assert str(path) in batch_damage(path), bit
