"""The page that benchmarks.on_gpu writes, from its results."""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_plan import COMPILE, ITEMS, NETWORKS
from benchmarks.page import percent, table
from benchmarks.stage_report import VERBS, WHOLE, Run, first_log_ratio, number, phases, scaled, times

WHOLE_STAGE = 1280  # images of sd14, to which stages are scaled
TITLES = {
    "sd14": "Stable Diffusion v1.4, 512 px, preset `sd14`",
    "sdxl": "SDXL, 1024 px, preset `sdxl`",
    "sd35": "Stable Diffusion 3.5 medium, 512 px, preset `sd35`",
}
WAYS = {
    "no": "not compiled",
    "blocks": "block by block, `compile=True`",
    "transformers": "blocks with what surrounds them",
    "whole": "as a whole",
    "graphs": "as a whole, with CUDA graphs",
}
STAGES = {
    "ours": "stage-sd14",
    "ours, compiled": "stage-sd14-compiled",
    "ours, compiled, all images": "stage-sd14-compiled-whole",
    "peers": "stage-sd14-peers",
    "peers, fused attention": "stage-sd14-peers-fused",
}
TARGETS = {"evaluation": 0.50, "transition": 0.45}  # of the matmul peak
STAGE_TARGET_SEC, PEERS_TARGET = 300, 4
T5_NOTE = """Stable Diffusion 3.5 is without T5, which takes another 9.5 GB: with `sd35` always, with `sd35_24gb` only while
prompts are encoded."""
PAGE = """# On a GPU

{about}

Weights are random, which changes no speed. Precision is bfloat16. An *evaluation* is what the network computes for an image
at a step of sampling: with guidance two passes. A *transition* is forward and backward for an image at a trained step. The
peak is that of a large matrix product, {peak}. Networks are timed by the median of five passes after one to warm up, with
text encoders and VAE beside them in memory, which training does without. They are compiled several at once, which takes
each of them longer, but where it says *alone*.
{sections}"""

Found = Mapping[str, Any]  # name of an item -> what it found


def markdown(content: Mapping[str, Any]) -> str:
    """The whole page. What is missing, or has failed, stands at its end."""
    found = {name: entry["found"] for name, entry in content["items"].items() if "found" in entry}
    peak = found.get("matmul", {}).get("matmul_tflops")
    sections = [targets_section(found, peak), *(network_section(preset, found, peak) for preset in NETWORKS)]
    sections += [few_rows(found), stage_section(found), nft_section(found), memory_section(found), tests_section(found)]
    return PAGE.format(
        about=about(content),
        peak=f"{number(peak)} TFLOP/s" if peak else "not measured yet",
        sections="".join(f"\n{one}\n" for one in [*sections, missing(content)] if one),
    )


def about(content: Mapping[str, Any]) -> str:
    """Command, dates, card and versions."""
    dates = sorted({entry["date"] for entry in content["items"].values()})
    text = (
        f"By `python -m benchmarks.on_gpu`, {' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'not run yet'}"
    )
    text += f": {content.get('hardware', 'no card')}; {content.get('versions', '')}." if dates else "."
    text += " This page is generated; `python -m benchmarks.on_gpu --page` writes it again from the JSON beside it."
    return "**Tiny models, to see that it works: no figure means anything.**\n\n" + text if content.get("quick") else text


def rows_of(preset: str, way: str, found: Found) -> dict[str, list[dict[str, Any]]]:
    """{kind of pass: its rows, the fewest rows at once first}."""
    rows = found.get(f"network-{preset}-{way}", {}).get("rows", [])
    return {kind: sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["at_once"]) for kind in TARGETS}


def network_section(preset: str, found: Found, peak: float | None) -> str:
    """The network of a preset, at the preset's sizes, compiled in each way."""
    plain = rows_of(preset, "no", found)
    flops = {kind: rows[-1]["flops"] for kind, rows in plain.items() if rows}
    cells, sizes = [], {}
    for way in NETWORKS[preset]:
        rows = {kind: some[-1] for kind, some in rows_of(preset, way, found).items() if some}
        if not rows:
            continue
        sizes |= {kind: row["at_once"] for kind, row in rows.items()}
        line = [WAYS[way]]
        for kind in TARGETS:
            line += rate_cells(rows.get(kind), flops.get(kind), peak)
        line.append(", ".join(memory(rows[kind].get("peak_bytes")) or "-" if kind in rows else "-" for kind in TARGETS))
        cells.append([*line, *compile_cells(preset, way, rows, found)])
    if not cells:
        return ""
    header = ["compiled"]
    for kind in TARGETS:
        header += [f"{kind}s/s, {sizes.get(kind, '?')} at once", "TFLOP/s (of the peak)"]
    header += ["peak memory, GiB, of either", "compiling both, s", "reading it back, s"]
    count = ", ".join(
        f"{number(value / 1e12)} TFLOP {'an' if kind[0] == 'e' else 'a'} {kind}" for kind, value in flops.items()
    )
    return f"## {TITLES[preset]}\n\n{table(header, cells)}\n\nCounted by FlopCounterMode: {count or 'nothing'}."


def rate_cells(row: dict[str, Any] | None, flops: int | None, peak: float | None) -> list[str]:
    """[rows a second, their TFLOP/s with the share of the peak]; "" for what is not known."""
    if row is None:
        return ["did not fit", ""]
    rate = row["at_once"] / row["seconds"]
    if not flops:
        return [number(rate), ""]
    tflops = rate * flops / 1e12
    return [number(rate), number(tflops) + (f" ({percent(tflops / peak)})" if peak else "")]


def memory(count: float | None) -> str:
    return number(count / 2**30) if count else ""


def compile_cells(preset: str, way: str, rows: Mapping[str, dict[str, Any]], found: Found) -> list[str]:
    """[seconds of the first passes when the compiler's cache was empty, the same when it was not]."""
    if way == "no":
        return ["", ""]
    own = number(sum(row["first_seconds"] for row in rows.values()))
    if not found[f"network-{preset}-{way}"].get("warm"):
        return [f"{own} alone", ""]
    beside = found.get(COMPILE, {}).get("first_seconds", {}).get(f"{preset} {way}", {})
    shown = [beside.get(f"{kind} {row['at_once']}") for kind, row in rows.items()]
    return [number(sum(shown)) if all(shown) else "", own]


def few_rows(found: Found) -> str:
    """Fewer rows than the preset's: how much of the time is Python's."""
    cells = [
        [f"{row['at_once']} {kind}s", WAYS[way], number(1000 * row["seconds"]), number(row["at_once"] / row["seconds"])]
        for kind in TARGETS
        for way in ("no", "graphs")
        for row in rows_of("sd14", way, found)[kind]
    ]
    if not cells:
        return ""
    text = "## Few rows at once\n\nWhere fewer rows take as long, Python launches kernels more slowly than the GPU works. "
    text += "CUDA graphs replay them without it."
    graphs = found.get("network-sd14-graphs", {}).get("rows", [{}])
    if skipped := max(row.get("not_replayed", 0) for row in graphs):
        text += f" Of {skipped} compiled parts torch made none, so that these figures are partly without."
    return f"{text}\n\n" + table(["at once", "`sd14`, compiled", "ms", "a second"], cells)


def stage_runs(found: Found) -> dict[str, Run]:
    return {name: found[item]["run"] for name, item in STAGES.items() if item in found}


def stage_seconds(found: Found) -> dict[str, dict[str, float]]:
    """{name in STAGES: seconds by phase}, scaled to a whole stage of as many transitions as ours had for each image."""
    runs = stage_runs(found)
    if not runs:
        return {}
    like = whole_stage(next(iter(runs.values())))
    return {name: scaled(run, like) for name, run in runs.items()}


def targets_section(found: Found, peak: float | None) -> str:
    """What was wanted of Stable Diffusion v1.4, and what it came to; "" if nothing of it is known."""
    plain, cells = rows_of("sd14", "no", found), []
    for kind, target in TARGETS.items():
        if peak and plain[kind]:
            rows = {way: some[-1] for way in NETWORKS["sd14"] if (some := rows_of("sd14", way, found)[kind])}
            rates = {way: row["at_once"] / row["seconds"] for way, row in rows.items()}
            share = {way: rate * plain[kind][-1]["flops"] / 1e12 / peak for way, rate in rates.items()}
            text = "; ".join(f"{WAYS[way]} {percent(value)}" for way, value in share.items())
            cells.append([f"{kind}s", f"{percent(target)} of the peak", text])
    whole = {name: seconds[WHOLE] for name, seconds in stage_seconds(found).items()}
    ours = [name for name in ("ours", "ours, compiled") if name in whole]
    for name in ours:
        cells.append([f"stage, {name}", f"at most {STAGE_TARGET_SEC} s", f"{number(whole[name])} s"])
        if "peers" in whole:
            cells.append([f"stage, peers / {name}", f"{PEERS_TARGET}×", times(whole["peers"], whole[name])])
    if len(ours) == 2:
        gain = times(whole["ours"], whole["ours, compiled"])
        cells.append(["stage, ours / ours, compiled", "above 1: `compile` becomes the default on GPUs", gain])
    return f"## Targets, of `sd14`\n\n{table(['', 'target', 'measured'], cells)}" if cells else ""


def stage_section(found: Found) -> str:
    """A stage of sd14 end to end, scaled to all of its images."""
    runs, seconds = stage_runs(found), stage_seconds(found)
    if not runs:
        return ""
    base, peers = next((seconds[name] for name in ("ours, compiled", "ours") if name in seconds), None), seconds.get("peers")
    ratio = base is not None and peers is not None
    header = ["seconds", *seconds, *(["peers / ours, compiled" if "ours, compiled" in seconds else "peers / ours"] * ratio)]
    cells = [
        [phase, *(number(one[phase]) for one in seconds.values()), *([times(peers[phase], base[phase])] if ratio else [])]
        for phase in next(iter(seconds.values()))
    ]
    cells[-1] = [f"**{cell}**" if cell else "" for cell in cells[-1]]
    made = "; ".join(
        f"{name} {run['num_images']} images and {run['num_transitions']} transitions" for name, run in runs.items()
    )
    text = f"## A stage of `sd14`, end to end\n\n{table(header, cells)}\n\nMade were: {made}. Seconds are scaled to "
    text += (
        f"{WHOLE_STAGE:,} images and as many transitions as ours had for each image; start-up is not. Start-up is of three "
    )
    return text + "processes, and has reading back what was compiled."


def whole_stage(run: Run) -> Run:
    """The size of the whole stage of which a run is a part."""
    factor = WHOLE_STAGE / run["num_images"]
    return {"num_images": WHOLE_STAGE, "num_transitions": round(run["num_transitions"] * factor)}


def nft_section(found: Found) -> str:
    """Stages with the objective nft: seconds as they were, not scaled."""
    names = [name for name in ("stage-sd14_nft", "stage-sd35", "stage-sdxl") if name in found]
    if not names:
        return ""
    runs = [found[name]["run"] for name in names]
    each = [phases(run) | {WHOLE: sum(run["wall"].values())} for run in runs]
    cells = [[phase, *(number(one[phase]) for one in each)] for phase in each[0]]
    for title, key in {"images": "num_images", "transitions": "num_transitions"}.items():
        cells.append([title, *(f"{run[key]:,}" for run in runs)])
    cells.append(
        [
            "images/s, decoding and writing included",
            *(number(run["num_images"] / run["seconds"]["sample"]["sample"]) for run in runs),
        ]
    )
    cells.append(
        ["transitions/s", *(number(run["num_transitions"] / one["training"]) for run, one in zip(runs, each, strict=True))]
    )
    header = ["seconds", *(f"`{name.removeprefix('stage-')}`" for name in names)]
    text = f"## A part of a stage with the objective nft\n\n{table(header, cells)}\n\n"
    return text + "Not scaled: these are the images that were made."


def memory_section(found: Found) -> str:
    """Peaks of GPU memory of every stage, by phase."""
    names = [item.name for item in ITEMS if item.name in found and item.what == "stage"]
    cells = []
    for name in names:
        run = found[name]["run"]
        peaks = [memory(run["device_bytes"].get(verb)) for verb in VERBS]
        sizes = ", ".join(f"`{key}={value}`" for key, value in found[name]["batch_sizes"].items())
        cells.append([f"`{name.removeprefix('memory-').removeprefix('stage-')}`", *peaks, sizes, first_log_ratio([run])])
    if not cells:
        return ""
    header = ["stage", *(f"{verb}, GiB" for verb in VERBS), "sizes that fitted", "largest log-ratio, first update"]
    return f"## Peak memory\n\n{table(header, cells)}\n\n{T5_NOTE}"


def tests_section(found: Found) -> str:
    if "tests" not in found:
        return ""
    tests = found["tests"]
    lines = [f"`{line}`" for line in tests["bad"]] + [f"- {line}" for line in tests["said"]]
    return "\n".join([f"## Tests\n\n`python -m pytest -m gpu`: {tests['summary']}.", "", *lines]).rstrip()


def missing(content: Mapping[str, Any]) -> str:
    """What has failed, and what was not measured."""
    failed = {name: entry["failed"] for name, entry in content["items"].items() if "failed" in entry}
    first = content["items"].get(COMPILE, {}).get("found", {}).get("first_seconds", {})
    failed |= {f"compiling {name}": found["failed"] for name, found in first.items() if "failed" in found}
    left = [item.name for item in ITEMS if item.name not in content["items"] and not item.extra]
    if not failed and not left:
        return ""
    lines = [f"- {name} failed: `{message}`" for name, message in failed.items()]
    lines += [f"- not measured yet: {', '.join(left)}"] if left else []
    return "## Not there\n\n" + "\n".join(lines)
