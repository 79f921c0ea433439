"""Write an experiment's report: `python -m b2diffurl.report EXPERIMENT`, by its folder or name (experiment/folder.py)."""

import argparse

from b2diffurl.configuration.command_line import die, remedy, set_up_command
from b2diffurl.experiment.folder import find_experiment
from b2diffurl.reporting.page import write_report
from b2diffurl.runtime.logs import show


def main() -> None:
    """Write the report and print its path. A mistake of the user's ends in two lines and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m b2diffurl.report",
        description="Write report.html and its pictures from an experiment's files. A run does so itself after each stage.",
        epilog="Example: python -m b2diffurl.report shapes. More in docs/evaluation.md.",
    )
    parser.add_argument("experiment", help="its folder, or its name below model/lora")
    set_up_command("report")
    try:
        show(str(write_report(find_experiment(parser.parse_args().experiment))))
    except (ValueError, OSError, RecursionError) as error:
        die(f"report: {error}", hint=f"{remedy(error)}; python -m b2diffurl.report --help says what it takes.")


if __name__ == "__main__":
    main()
