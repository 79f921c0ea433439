"""List experiments, or compare them: `python -m b2diffurl.results [EXPERIMENT …]`.

Without names it lists the experiments of a folder; with two or more it compares them, pair by pair, on the same noise.
"""

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from b2diffurl.configuration.command_line import die, remedy, set_up_command
from b2diffurl.experiment.evaluation_table import SETS
from b2diffurl.experiment.folder import EXPERIMENTS, find_experiment
from b2diffurl.experiment.overview import overview, rows
from b2diffurl.reporting import listing
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger, show
from b2diffurl.runtime.paths import RUN, user_path

STDOUT = "-"
ENDINGS = {"html": (".html", ".htm"), "csv": (".csv",), "markdown": (".md", ".markdown")}


def main() -> None:
    """List or compare. A mistake of the user's ends in two lines and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m b2diffurl.results",
        description="List the experiments of a folder; with names, compare them on the same noise.",
    )
    parser.add_argument("experiment", nargs="*", help="two or more to compare: their names or folders")
    parser.add_argument("--folder", default="", help=f"where the experiments are (default: {EXPERIMENTS})")
    parser.add_argument("--prompts", default="test", help="compare on: test, train, or a prompt file (default: test)")
    parser.add_argument("--sampler", default="training", choices=("training", "deployed"), help="default: training")
    parser.add_argument("--html", metavar="FILE", help="write the comparison as a page, with curves and pictures")
    parser.add_argument("--csv", metavar="FILE", nargs="?", const=STDOUT, help="as CSV, unrounded; without FILE to stdout")
    parser.add_argument("--markdown", metavar="FILE", nargs="?", const=STDOUT, help="as Markdown; without FILE to stdout")
    set_up_command("results")
    logger.addHandler(logging.NullHandler())  # what is damaged stands in the table, once
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError, RecursionError) as error:
        die(f"results: {error}", hint=f"{remedy(error)}; python -m b2diffurl.results --help says what it takes.")


def run(args: argparse.Namespace) -> None:
    """Check what was asked for, then list or compare, and write it."""
    folder = Path(user_path(args.folder)) if args.folder else EXPERIMENTS
    roots = [find_experiment(name, folder) for name in args.experiment]
    for form in ENDINGS:
        check_file(form, getattr(args, form), folder)
    if args.html and len(roots) < 2:
        raise ValueError("--html is of a comparison: name two or more experiments")
    if len(roots) < 2:
        list_them([overview(root) for root in roots] or rows(folder), folder, args)
    else:
        compare(distinct(roots), args)


def list_them(found: Sequence[listing.Row], folder: Path, args: argparse.Namespace) -> None:
    if not found:
        show(f"no experiments in {folder} yet; {RUN} makes one")
    elif not (write(args.csv, listing.as_csv(found)) | write(args.markdown, listing.as_markdown(found))):
        show(*listing.table(found, shutil.get_terminal_size((listing.MAX_WIDTH, 24)).columns))


def compare(roots: Sequence[Path], args: argparse.Namespace) -> None:
    """Compare every two of the experiments, and write the page if one is asked for."""
    from b2diffurl.evaluation.pairing import pair_all  # imports torch, which takes seconds; the list goes without
    from b2diffurl.reporting import compared

    prompts = args.prompts if args.prompts in SETS else user_path(args.prompts)
    if prompts not in SETS and not os.path.isfile(prompts):
        raise FileNotFoundError(f"--prompts: no prompt file at {Path(prompts).absolute()}; give test, train, or a file")
    damaged: list[str] = []
    pairings = pair_all(roots, prompts, args.sampler, damaged)
    if args.html:
        from b2diffurl.reporting.compared_page import write_page

        show(f"results: {write_page(Path(user_path(args.html)), roots, pairings, prompts, args.sampler)}")
    told = write(args.csv, listing.as_csv(compared.as_rows(pairings)))
    told |= write(args.markdown, compared.as_markdown(pairings))
    if not told:
        width = min(shutil.get_terminal_size((listing.MAX_WIDTH, 24)).columns, listing.MAX_WIDTH)
        show(*compared.as_text(pairings, width), *(f"! {one}" for one in dict.fromkeys(damaged)))


def distinct(roots: Sequence[Path]) -> list[Path]:
    """The experiments, each once; a ValueError if only one is left."""
    found = list({root.resolve(): root for root in roots}.values())
    if len(found) < 2:
        raise ValueError(f"{found[0]} was named twice; name another experiment to compare it with")
    return found


def check_file(form: str, given: str | None, folder: Path) -> None:
    """Refuse, before any work, a FILE that is none: an experiment's name behind --csv, a file of another kind."""
    if given in (None, STDOUT):
        return
    if not given.endswith(ENDINGS[form]):
        is_name = (folder / given).is_dir() or Path(user_path(given)).is_dir()
        hint = f"put --{form} behind the names, or give it a file" if is_name else "give another name"
        raise ValueError(f"--{form} is {given!r}, which does not end in {ENDINGS[form][0]}; {hint}")
    files.require_writable(Path(user_path(given)).parent)
    if Path(user_path(given)).is_dir():
        raise ValueError(f"--{form} is {given!r}, which is a folder; give a file")


def write(given: str | None, text: str) -> bool:
    """Write a text to the FILE that was given, or to stdout; whether it was asked for."""
    if given == STDOUT:
        show(*text.rstrip("\n").split("\n"))
    elif given:
        files.write_bytes(Path(user_path(given)), text.encode(errors="replace"))
        show(f"results: {given}")
    return given is not None


if __name__ == "__main__":
    main()
