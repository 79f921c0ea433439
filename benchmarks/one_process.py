"""The three phases of a stage in one process, as `bash run_process.sh` makes them on the CPU (b2diffurl/resident.py).

python -m benchmarks.one_process --config=config/stage_process.py:shapes
"""

from ml_collections import ConfigDict

from b2diffurl.configuration.command_line import run_script
from b2diffurl.configuration.plan import make_plan
from b2diffurl.experiment import lock
from b2diffurl.models import policy
from b2diffurl.resident import VERBS


def run_stage(config: ConfigDict) -> None:
    with policy.keeping_models(), lock.holding(make_plan(config).stage.root):
        for phase in VERBS.values():
            phase(make_plan(config))


if __name__ == "__main__":
    run_script("stage", run_stage)
