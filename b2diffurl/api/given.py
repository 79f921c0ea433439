"""What is given in Python and not by a name: prompts in a list, rewards that are functions. The experiment records them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from b2diffurl.api.source import changed_names, importable, recorded_source, require_function
from b2diffurl.runtime import files

PROMPTS, HELD_OUT = "given_prompts.json", "given_held_out.json"  # files of the experiment
KINDS = {PROMPTS: "training prompts", HELD_OUT: "held-out prompts"}
REWARD = "reward_{name}"  # module of the recorded source of a function


@dataclass
class Given:
    """The things given for the experiment in folder `root`, and the names under which the configuration has them."""

    root: Path
    texts: dict[str, str] = field(default_factory=dict)  # {file of the experiment: what it is to hold}
    functions: dict[str, tuple[Callable, Path]] = field(default_factory=dict)  # {reward: (function, file of its source)}
    code: set[str] = field(default_factory=set)  # the names of all rewards that are the user's code

    def prompts(self, name: str, prompts: str | Path | Sequence[str]) -> str:
        """The path of a prompt file: the one that was given, or file `name` of the experiment, for a list."""
        if isinstance(prompts, str) and " " in prompts and not os.path.exists(prompts):
            raise ValueError(f"prompts are a text, {prompts!r:.100}, which is no file. Give a list, also of a single prompt")
        if isinstance(prompts, str | Path):
            return str(prompts)
        try:
            if isinstance(prompts, Set | Mapping | bytes):
                raise TypeError("no list")  # a set has another order in every process
            self.texts[name] = json.dumps(list(prompts), ensure_ascii=False, indent=0) + "\n"
        except TypeError:
            raise ValueError(f"prompts are {prompts!r:.100}; give a list of strings, or the path of a prompt file") from None
        return str(self.root / name)

    def reward(self, reward: Any) -> Any:
        """A reward as the configuration names it. A function becomes module:function; lists are gone through."""
        if isinstance(reward, list | tuple):
            return tuple(self.reward(one) for one in reward)
        if isinstance(reward, str):
            self.code |= {reward} if ":" in reward else set()
            return reward
        if not callable(reward):
            return reward
        require_function(reward)
        if importable(reward):
            return self.reward(f"{reward.__module__}:{reward.__name__}")
        module = REWARD.format(name=reward.__name__)
        name = f"{module}:{reward.__name__}"
        source = recorded_source(reward)
        if self.texts.get(f"{module}.py", source) != source:
            raise ValueError(f"two rewards are called {reward.__name__}. Give them different names.")
        self.texts[f"{module}.py"] = source
        self.functions[name] = (reward, self.root / f"{module}.py")
        return self.reward(name)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Inside the block the files are there. What was new goes again if the experiment has not begun by the block's end.

        A ValueError names what is another than the experiment was begun with.
        """
        begun = (self.root / "config.json").is_file()  # if not, files that are there were left by a process that was killed
        if begun:
            for name, text in self.texts.items():
                self.require_same(self.root / name, text)
        new = [name for name in self.texts if not begun or not (self.root / name).exists()]
        for name in new:
            files.write_bytes(self.root / name, self.texts[name].encode())
        try:
            yield
        finally:
            if not (self.root / "config.json").is_file():
                for name in new:
                    (self.root / name).unlink(missing_ok=True)

    def require_same(self, path: Path, text: str) -> None:
        """Raise a ValueError if the experiment's file holds something else than what is given now."""
        if not path.exists():
            return
        recorded = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            other = ", ".join(changed_names(recorded, text))
            what = f"another {other}, as it stands" if other else ""
        else:
            what = "" if recorded == text else f"other {KINDS[path.name]}, which stand"
        if what:
            raise ValueError(
                f"the experiment {self.root.name} was begun with {what} in {path}. Give that to go on, or give the new "
                "experiment another name."
            )


def named(given: Given, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with a name for every function among them, in sections, too."""
    return {
        key: named(given, value) if isinstance(value, Mapping) else given.reward(value) for key, value in settings.items()
    }
