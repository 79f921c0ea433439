"""What a relation caption states about each thing: "red circle, left", "blue square, right".

Guessing these facts from an embedding is the auxiliary target of both text encoders. Direction is a
product of word order, identity and place, and was not learned without it (docs/shapes.md, negative results).
"""

import torch

from b2diffurl.shapes.scene import COLOURS, RELATIONS, SHAPES, Prompt

NUM_FACTS = len(COLOURS) * len(SHAPES) * len(RELATIONS)


def prompt_code(prompt: Prompt) -> tuple[int, int, int]:
    """Integers for both things and the relation, -1 for what is not said."""
    things = [list(COLOURS).index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape) for thing in prompt.things]
    return things[0], things[1] if prompt.second else -1, RELATIONS.index(prompt.relation) if prompt.relation else -1


def codes(prompts: list[Prompt]) -> list[torch.Tensor]:
    """First things, second things and relations as int64 tensors, each [N]; relation r ^ 1 is the opposite of r."""
    return [torch.tensor(column) for column in zip(*map(prompt_code, prompts), strict=True)]


def fact_ids(prompts: list[Prompt]) -> torch.Tensor:
    """The fact about the first thing and that about the second, for relation prompts, int64 [N, 2]."""
    first, second, relation = codes(prompts)
    return torch.stack([first * len(RELATIONS) + relation, second * len(RELATIONS) + (relation ^ 1)], dim=1)
