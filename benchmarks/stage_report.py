"""Tables of benchmarks.stage, and their arithmetic.

A Run is what was measured in one stage, a dict:

    wall                          {verb: seconds of the whole process}, verbs sample, select, train, or all of them TOGETHER
    seconds                       {verb: {name: seconds}}, as the process measured them
    peak_bytes, written_bytes     {verb: bytes}; device_bytes on a GPU
    num_images
    num_evaluations               guided evaluations of the network, each for one image
    num_transitions               trained transitions
    first_log_ratio               max |log-ratio| at the first update; None if it is not known
"""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.page import percent, table

VERBS = ("sample", "select", "train")
TOGETHER = "stage"  # in one process
SHAPES = {"ours": "ours", "peers": "peers", "fused": "peers + SDPA"}
START_UP, WHOLE = "start-up, loading and end", "whole stage"
Run = dict[str, Any]

PAGE = """By `{command}`, {by}, {precision}. {work}

{phases}

{saved}{rates}
"""


def phases(run: Run) -> dict[str, float]:
    """Seconds of one run by phase. Everything outside the phases counts as start-up: imports, loading, the process's end."""
    sample, select, train = (run["seconds"][verb] for verb in VERBS)
    found = {
        "sampling": sample["sample"] - sample.get("decode", 0) - sample.get("write", 0),
        "decoding": sample.get("decode", 0),
        "scoring": select["score"],
        "selecting": select.get("select", 0),
        "training": train["train"] - train.get("read", 0),
        "reading and writing": sample.get("write", 0)
        + select.get("read", 0)
        + select.get("write", 0)
        + train.get("read", 0),
    }
    return {START_UP: sum(run["wall"].values()) - sum(found.values())} | found


def scaled(run: Run, like: Run) -> dict[str, float]:
    """Seconds by phase, scaled to the work of run `like`: training by transitions, start-up not at all, the rest by images.

    This favours the peers: they pickle all trajectories again after every batch, which takes time that grows with the square
    of the number of batches.
    """
    by_images = like["num_images"] / run["num_images"]
    by_transitions = like["num_transitions"] / run["num_transitions"]
    factors = {START_UP: 1.0, "training": by_transitions}
    found = {phase: seconds * factors.get(phase, by_images) for phase, seconds in phases(run).items()}
    return found | {WHOLE: sum(found.values())}


def written(run: Run, like: Run) -> float:
    """Bytes written by the run, scaled to the number of images of `like`."""
    return sum(run["written_bytes"].values()) * like["num_images"] / run["num_images"]


def typical(facts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{shape: {phase: median seconds}}, each run scaled to the work of our run of the same round."""
    found = {}
    for shape, runs in facts["runs"].items():
        each = [scaled(run, ours) for run, ours in zip(runs, facts["runs"]["ours"], strict=True)]
        found[shape] = {phase: median(one[phase] for one in each) for phase in each[0]}
    return found


def rates(run: Run, machine: dict[str, float]) -> dict[str, float]:
    """Images/s, transitions/s, and TFLOP/s of sampling and training of one run; `machine` is from stage.measure_machine.

    TFLOP/s only if FLOPs were counted.
    """
    found = phases(run)
    rates = {
        "images": run["num_images"] / run["seconds"]["sample"]["sample"],
        "transitions": run["num_transitions"] / found["training"],
    }
    if "evaluation_flops" not in machine:
        return rates
    return rates | {
        "sampling": run["num_evaluations"] * machine["evaluation_flops"] / found["sampling"] / 1e12,
        "training": run["num_transitions"] * machine["transition_flops"] / found["training"] / 1e12,
    }


def markdown(facts: dict[str, Any]) -> str:
    """The page of one benchmark: command and machine, then the tables."""
    seconds = typical(facts)
    tables = {"phases": phase_table(seconds), "saved": saved_by_attention(seconds), "rates": rate_table(facts)}
    by = f"{circumstances(facts)}, threads: {facts['threads']}"
    return PAGE.format(command=facts["command"], by=by, precision=facts["precision"], work=work(facts["runs"]), **tables)


def circumstances(facts: dict[str, Any]) -> str:
    """Date, hardware and versions in words."""
    return f"{facts['date']}, {facts['hardware']}; {facts['versions']}"


def work(runs: dict[str, list[Run]]) -> str:
    """One or two sentences on the work in a stage, and on the number of repeats."""
    ours, fewest = runs["ours"][0], min(run["num_images"] for some in runs.values() for run in some)
    text = f"A stage of {ours['num_images']} images, {ours['num_evaluations']} evaluations of the network and "
    text += f"{ours['num_transitions']} trained transitions; medians of {len(runs['ours'])}."
    if fewest < ours["num_images"]:
        text += f" The peers made {fewest} images: their seconds and bytes are scaled to as many, their memory is not."
    return text


def phase_table(seconds: dict[str, dict[str, float]]) -> str:
    """A table of seconds by phase and shape, with ratios: peers to ours, and peers to peers with fused attention."""
    header = ["seconds", *(SHAPES[shape] for shape in seconds)]
    if "peers" in seconds:
        header += ["peers / ours", "by fused attention alone"]
    rows = []
    for phase in seconds["ours"]:
        row = [phase, *(number(found[phase]) for found in seconds.values())]
        if "peers" in seconds:
            row += [times(seconds["peers"][phase], seconds["ours"][phase])]
            row += [times(seconds["peers"][phase], seconds["fused"][phase])]
        rows.append([f"**{cell}**" for cell in row] if phase == WHOLE else row)
    return table(header, rows)


def saved_by_attention(seconds: dict[str, dict[str, float]]) -> str:
    """A sentence on the share of our lead over the peers that fused attention alone would give them; "" without peers."""
    if "peers" not in seconds or seconds["peers"][WHOLE] <= seconds["ours"][WHOLE]:
        return ""
    peers, fused, ours = (seconds[shape][WHOLE] for shape in ("peers", "fused", "ours"))
    return f"Fused attention alone saves {percent((peers - fused) / (peers - ours))} of the difference.\n\n"


def rate_table(facts: dict[str, Any]) -> str:
    """A table of rates, FLOP/s with their share of the matmul peak, memory and written bytes, by shape."""
    runs, machine = facts["runs"], facts["machine"]
    like = runs["ours"][0]
    per_run = {shape: [rates(run, machine) for run in some] for shape, some in runs.items()}

    def row(name: str, cell: Callable[[str], str]) -> list[str]:
        return [name, *(cell(shape) for shape in runs)]

    def middle(shape: str, key: str) -> float:
        return median(one[key] for one in per_run[shape])

    def flops(key: str) -> Callable[[str], str]:
        return lambda shape: f"{number(middle(shape, key))} ({percent(middle(shape, key) / machine['matmul_tflops'])})"

    def memory(verb: str, key: str) -> Callable[[str], str]:
        return lambda shape: number(max(run[key].get(verb, 0) for run in runs[shape]) / 2**20)

    rows = [
        row("images/s, sampled, decoded and written", lambda shape: number(middle(shape, "images"))),
        row("transitions/s, trained", lambda shape: number(middle(shape, "transitions"))),
        *(
            row(f"TFLOP/s of {phase} (of matmul peak)", flops(phase))
            for phase in ("sampling", "training")
            if phase in per_run["ours"][0]
        ),
        row("peak memory, MiB", lambda shape: number(max(max(run["peak_bytes"].values()) for run in runs[shape]) / 2**20)),
    ]
    if like["device_bytes"]:
        rows += [row(f"peak GPU memory of {verb}, MiB", memory(verb, "device_bytes")) for verb in VERBS]
    if all(like["written_bytes"].values()):
        rows.append(row("written, MiB", lambda shape: number(median(written(run, like) for run in runs[shape]) / 2**20)))
        rows.append(row("written, against ours", lambda shape: times(written(runs[shape][0], like), written(like, like))))
    if like.get("first_log_ratio") is not None:
        rows.append(row("largest log-ratio, at the first update", lambda shape: first_log_ratio(runs[shape])))
    return table(["", *(SHAPES[shape] for shape in runs)], rows) + f"\n\n{peak_line(machine)}"


def first_log_ratio(runs: list[Run]) -> str:
    """The largest of a shape's runs; "" for the peers, who do not tell."""
    found = [run["first_log_ratio"] for run in runs if run.get("first_log_ratio") is not None]
    return f"{max(found):.1e}" if found else ""


def peak_line(machine: dict[str, float]) -> str:
    """A sentence on the matmul peak and on how FLOPs were counted."""
    peak = f"Matmul peak, measured in the same call: {number(machine['matmul_tflops'])} TFLOP/s."
    if "evaluation_flops" not in machine:
        return peak
    peak += " FLOPs are counted once, by FlopCounterMode, attention included: "
    peak += f"{number(machine['evaluation_flops'] / 1e9)} GFLOP an evaluation, "
    return peak + f"{number(machine['transition_flops'] / 1e9)} GFLOP a transition, forward and backward."


def startup_markdown(facts: dict[str, Any]) -> str:
    """The page of --startup: seconds from command to first useful work, compared with `import torch`."""
    seconds = {name: median(values) for name, values in facts["seconds"].items()}
    base, count = seconds["import torch"], len(facts["seconds"]["import torch"])
    rows = [[name, number(value), times(value, base)] for name, value in seconds.items()]
    by = f"By `{facts['command']}`, {circumstances(facts)}; medians of {count}."
    return f"{by}\n\n" + table(["from command to first useful work", "seconds", "of `import torch`"], rows) + "\n"


def network_markdown(facts: dict[str, Any]) -> str:
    """The page of --network: milliseconds, TFLOP/s and memory by kind of pass, batch size and way to compile."""
    machine, rows = facts["machine"], facts["rows"]
    flops = {"evaluation": machine["evaluation_flops"], "transition": machine["transition_flops"]}
    cells = []
    for row in rows:
        rate = flops[row["kind"]] * row["at_once"] / row["seconds"] / 1e12
        peak = number(row["peak_bytes"] / 2**30) if "peak_bytes" in row else ""
        cells.append([
            f"{row['kind']}s", f"{row['at_once']}", row["compiled"], number(1000 * row["seconds"]),
            f"{number(rate)} ({percent(rate / machine['matmul_tflops'])})", peak, number(row["first_seconds"]),
        ])  # fmt: skip
    header = ["", "at once", "compiled", "ms", "TFLOP/s (of matmul peak)", "peak GPU memory, GiB", "first call, s"]
    by = f"By `{facts['command']}`, {circumstances(facts)}, {facts['precision']}; medians of 5."
    return f"{by}\n\n{table(header, cells)}\n\n{peak_line(machine)}\n"


def number(value: float) -> str:
    """A number with three significant digits; from 100 on as a whole number, with commas at thousands."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def times(value: float, base: float) -> str:
    """How many times `base` the value is, such as 2.23×; "" if base is 0."""
    return f"{value / base:.2f}×" if base else ""


def in_turn(shapes: Sequence[str], repeats: int) -> list[str]:
    """The shapes in turn, `repeats` times: ours, peers, ours, peers, … Other load on the machine then slows all alike."""
    return [shape for _ in range(repeats) for shape in shapes]
