"""Judge a stage's images in a browser: `python -m b2diffurl.label EXPERIMENT`, for a run with Reward=file.

The scores are what people answer (labelling/votes.py). Every answer is saved at once, so the command may be stopped and
given again at any time.
"""

import argparse
import sys

from b2diffurl.configuration.command_line import die, remedy, set_up_command, stopping_in_order
from b2diffurl.experiment.folder import find_experiment
from b2diffurl.experiment.lock import holding
from b2diffurl.labelling.server import Server
from b2diffurl.labelling.session import Session, run_command, waiting_stage
from b2diffurl.runtime.logs import show


def main() -> None:
    """Serve the page until its scores are written, or until Ctrl-C. A mistake of the user's ends in two lines and code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m b2diffurl.label",
        description="Judge the images of a stage in a browser. The run (Reward=file) then goes on with the same command.",
        epilog="Example: python -m b2diffurl.label my_run --port 8000. More in docs/rewards.md.",
    )
    parser.add_argument("experiment", help="its folder, or its name below model/lora")
    parser.add_argument("--stage", type=int, help="which stage (default: the newest that waits for scores)")
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1, where the page is served (default: a free one)")
    set_up_command("label")
    args = parser.parse_args()
    try:
        with stopping_in_order():
            label(args.experiment, args.stage, args.port)
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else 2))
    except (ValueError, OSError, RecursionError) as error:
        die(f"label: {error}", hint=f"{remedy(error)}; python -m b2diffurl.label --help says what it takes.")


def label(experiment: str, index: int | None, port: int) -> None:
    """Serve the page of the stage that waits for scores, and say what to do next when it ends."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port is {port}; it must be a number from 0 (a free one) to {(1 << 16) - 1}")
    root = find_experiment(experiment)
    stage = waiting_stage(root, index)
    with holding(stage.folder):
        session = Session(stage)
        with Server(session, port) as server:
            show(f"label: stage {stage.index} of {root}: open {server.url} (Ctrl-C stops; every answer is saved at once)")
            try:
                server.serve_forever(poll_interval=0.1)
            except KeyboardInterrupt:
                show(f"label: stopped; {session.progress}, and the same command goes on from there")
                raise
    show(f"label: {stage.given_scores} has the scores. Run the command of the run again: {run_command(root)}")


if __name__ == "__main__":
    main()
