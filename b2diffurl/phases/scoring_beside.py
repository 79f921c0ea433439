"""Scoring beside sampling: while images are sampled, those on disk are scored by the rewards that wait for another program.

A stage with a slow server then takes as long as the slower of the two, not as both together. What is scored is kept in the
stage's folder (experiment/scored_batches.py), and select finds it there. Its scores are the same: the batches are.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread

import numpy as np
import torch

from b2diffurl.configuration.settings import Rewards
from b2diffurl.experiment.stage import Stage
from b2diffurl.phases.scoring import Batches, forgetting, kept_batches, score_batch
from b2diffurl.rewards import load_reward, waits
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

CPU = torch.device("cpu")


class Beside:
    """Scores a stage's images as they are written, in a thread for each reward that waits.

    `prompts` are of all the stage's images, [N]. On leaving the block a batch in flight is finished, unless an error is the
    reason: then nothing is waited for.
    """

    def __init__(self, rewards: Rewards, stage: Stage, prompts: Sequence[str]):
        self.batches = Batches(Stage(Path.cwd() / stage.root, stage.index), prompts, rewards.batch_size)
        names = [name for name in (*rewards.weights, *rewards.watched) if waits(name)]
        self.lanes = [Lane(name, rewards, self.batches) for name in names]
        self.written_of = Counter()  # images on disk, by the id of their batch's first

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for lane in self.lanes:
            lane.end()
        for lane in self.lanes if kind is None else ():
            lane.thread.join()

    def written(self, ids: Iterable[int]) -> None:
        """These images are on disk. A batch of which all are is scored. With several processes, one may be none's alone."""
        for n in ids:
            start = n - n % self.batches.size
            self.written_of[start] += 1
            if self.written_of[start] == self.batches.count(start):
                for lane in self.lanes:
                    lane.starts.put(start)


class Lane:
    """The thread of one reward: scores one batch after the other, in the order in which they are given."""

    def __init__(self, name: str, rewards: Rewards, batches: Batches):
        self.name, self.rewards, self.batches = name, rewards, batches
        self.starts: SimpleQueue[int] = SimpleQueue()  # a batch is named by the id of its first image; below 0: the end
        self.ended = Event()
        # A daemon, so that a run which has failed does not wait for a server.
        self.thread = Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        kept = kept_batches(self.name, self.rewards, self.batches.stage)
        reward = None
        try:
            while (start := self.starts.get()) >= 0 and not self.ended.is_set():
                reward = reward or load_reward(self.name, self.rewards, CPU)
                # By NumPy, as all that is done to whole images here. If a second thread used torch's, torch would have more
                # threads than cores, let them sleep between operations, and sample a quarter slower.
                images = torch.from_numpy(np.stack([files.read_image(path).numpy() for path in self.batches.paths(start)]))
                with forgetting(kept):
                    score_batch(self.name, reward, self.batches, start, images, kept)
        except Exception as error:  # the server may be started later: select asks it again, and says what is wrong
            logger.debug("reward %s failed beside sampling", self.name, exc_info=True)
            said = " ".join(str(error).split())[:300] or type(error).__name__
            told = "stage%d sample: reward %s is left to select, because beside sampling it failed: %s"
            logger.info(told, self.batches.stage.index, self.name, said)

    def end(self) -> None:
        """Score no further batch; what is left is select's."""
        self.ended.set()
        self.starts.put(-1)
