"""The branch picture: the first group's way from noise to images."""

import numpy as np
import pytest
import torch

from b2diffurl.algorithm.tree import Tree
from b2diffurl.experiment.branch_picture import GroupPicture, decode_tree, load_tree, recording_prefix, save_tree, spread
from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime.files import read_image, read_json


def test_what_is_watched_of_a_prefix_is_the_first_group_s():
    """Its state before each step of the prefix; predictions pass through."""
    seen: list[torch.Tensor] = []
    predict = recording_prefix(lambda x, i: x * 2, 2, seen)
    x = torch.arange(6.0).view(3, 2, 1, 1)
    for i in range(4):
        assert torch.equal(predict(x + i, i), (x + i) * 2)
    assert [state.flatten().tolist() for state in seen] == [[0.0, 1.0], [1.0, 2.0]]


def test_a_tree_shows_the_first_group_s_way(root, config, models):
    """Its last column is the first group's images, its first the decoded noise that all branches share."""
    for index, split in ((0, 2), (1, 1)):
        stage = Stage(root, index)
        tree = load_tree(stage)
        assert tree.prompt == read_json(stage.prompts)[0]
        assert (tree.num_steps, list(tree.shared)) == (4, list(range(split + 1)))
        assert [list(branch) for branch in tree.branches] == [list(range(split + 1, 5))] * 3
        for branch, states in enumerate(tree.branches):
            np.testing.assert_allclose(states[4].astype(int), read_image(stage.image(branch)).numpy().astype(int), atol=1)
        assert len({states[split + 1].tobytes() for states in tree.branches}) == 3
        assert tree.shared[0].std() > 0


def test_a_tree_decodes_each_state_at_its_place(tmp_path):
    """States that are numbers: the tile of step j has the number of step j, that of branch k is k more."""
    stage = Stage(tmp_path, 0)
    prefix = [torch.full((1, 3, 2, 2), float(step)) for step in range(6)]
    latents = torch.stack([torch.arange(6, 21.0) + 20 * (k > 0) * k for k in range(2)])
    latents[:, 0] = 6
    latents = latents[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    save_tree(stage, decode_tree("a prompt", prefix, latents, latents[:, -1], 20, Tree((2,)), as_images))
    assert "together" not in read_json(stage.folder / "tree.json")
    tree = load_tree(stage)
    assert tree == GroupPicture("a prompt", 20, tree.shared, tree.branches, dict.fromkeys((7, 11, 16, 20), 1))
    assert {step: int(tile.max()) for step, tile in tree.shared.items()} == {0: 0, 2: 2, 4: 4, 6: 6}
    for k, states in enumerate(tree.branches):
        assert {step: (int(tile.min()), int(tile.max())) for step, tile in states.items()} == {
            step: (step + 20 * k, step + 20 * k) for step in (7, 11, 16, 20)
        }


def test_what_branches_of_a_tree_share_is_decoded_once(tmp_path):
    """2 x 3 leaves that part again 2 steps after step 1, T = 5: a tile of steps 2 and 3 is that of 3 branches, by number of
    step and edge, one of steps 4 and 5 that of a leaf."""
    stage, tree = Stage(tmp_path, 0), Tree((2, 3), (2,))
    decoded = []

    def decode(states: torch.Tensor) -> torch.Tensor:
        decoded.extend(states[:, 0, 0, 0].int().tolist())
        return as_images(states)

    numbers = torch.tensor([[1, 20 + k // 3, 30 + k // 3, 40 + k, 50 + k] for k in range(6)]).float()
    latents = numbers[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    save_tree(stage, decode_tree("a prompt", [torch.zeros(1, 3, 2, 2)], latents, latents[:, -1], 5, tree, decode))
    picture = load_tree(stage)
    assert decoded == [0, 1, 20, 21, 30, 31, *range(40, 46), *range(50, 56)]
    assert picture.together == {2: 3, 3: 3, 4: 1, 5: 1}
    for k, states in enumerate(picture.branches):
        assert {step: int(tile.max()) for step, tile in states.items()} == dict(
            zip((2, 3, 4, 5), numbers[k, 1:], strict=True)
        )


def test_the_tree_of_a_window_in_the_middle_ends_with_the_image(tmp_path):
    """Two shared steps, two trained ones, then what the tail leads to, wherever that is."""
    stage, prefix = Stage(tmp_path, 0), [torch.full((1, 3, 2, 2), float(step)) for step in range(2)]
    latents = torch.tensor([[2.0, 3, 4], [2, 13, 14]])[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    finished = torch.tensor([9.0, 19])[:, None, None, None].expand(-1, 3, 2, 2)
    save_tree(stage, decode_tree("a prompt", prefix, latents, finished, 8, Tree((2,)), as_images))
    tree = load_tree(stage)
    assert {step: int(tile.max()) for step, tile in tree.shared.items()} == {0: 0, 1: 1, 2: 2}
    found = [{step: int(tile.max()) for step, tile in states.items()} for states in tree.branches]
    assert (tree.num_steps, found) == (8, [{3: 3, 4: 4, 8: 9}, {3: 13, 4: 14, 8: 19}])


def as_images(states: torch.Tensor) -> torch.Tensor:
    return states.permute(0, 2, 3, 1).to(torch.uint8)


@pytest.mark.parametrize(
    ("first", "last", "count", "expected"),
    [
        (0, 0, 4, [0]),
        (3, 3, 4, [3]),
        (0, 1, 4, [0, 1]),
        (0, 9, 4, [0, 3, 6, 9]),
        (1, 10, 4, [1, 4, 7, 10]),
        (5, 7, 2, [5, 7]),
    ],
)
def test_states_are_spread_over_the_way(first, last, count, expected):
    assert spread(first, last, count) == expected
