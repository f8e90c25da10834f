"""The picture of ``python -m benchmarks.scaling``: load, replicas, TTFT and ITL over the same time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.bench.picture import COLOURS, PAGE_INCHES, TINT, scale_logarithmically

if TYPE_CHECKING:
    from benchmarks.scaling.report import ScalingReport, WaveKind

COLOUR_OF_ROLE = {"prefill": COLOURS[0], "decode": COLOURS[1], "frontend": COLOURS[2]}
"""People with colour blindness can tell these apart too."""


def draw(report: ScalingReport, path: Path) -> None:
    """Write the page.  The suffix of `path` says in which format."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=PAGE_INCHES, layout="constrained")
        load, replicas, ttft, itl = figure.subplots(4, 1, sharex=True, height_ratios=[1, 1.4, 1, 1])
        _draw_load(load, report)
        _draw_replicas(replicas, report)
        _draw_latency(ttft, report, "ttft_s", "TTFT", report.ttft_target_ms)
        _draw_latency(itl, report, "itl_s", "ITL", report.itl_target_ms)
        itl.set_xlabel("seconds")
        for axes in (load, replicas, ttft, itl):
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            for begin in report.wave_starts():
                axes.axvline(begin, color=TINT, linewidth=0.6, linestyle=":")
        figure.suptitle(f"Pools that scale apart: {report.model}", x=0.015, ha="left", fontsize=14, fontweight="bold")
        figure.savefig(path, dpi=150)


def _draw_load(axes: Any, report: ScalingReport) -> None:
    edges = report.wave_starts()
    lines = (("prefill", "input_tokens", "prompt tokens/s"), ("decode", "output_tokens", "output tokens/s"))
    for role, tokens, label in lines:
        rates = [wave.rate * getattr(wave, tokens) for wave in report.waves]
        axes.stairs(rates, edges, color=COLOUR_OF_ROLE[role], label=label, linewidth=1.6)
    for begin, wave in zip(edges, report.waves, strict=False):
        axes.annotate(
            f"{wave.kind}\n{wave.rate:g}/s of {wave.input_tokens} + {wave.output_tokens}",
            (begin, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=7,
            color=TINT,
        )
    scale_logarithmically(axes)
    axes.set_ylabel("load")
    axes.legend(frameon=False, loc="center right")


def _draw_replicas(axes: Any, report: ScalingReport) -> None:
    times = [sample.at_s for sample in report.samples]
    for role, colour in COLOUR_OF_ROLE.items():
        axes.step(times, [each.pool(role).ready for each in report.samples], where="post", color=colour, label=role)
        axes.step(times, [each.pool(role).target for each in report.samples], where="post", color=colour, linestyle=":")
    axes.set_ylim(0, 1.25 * max(pool.target for each in report.samples for pool in each.pools.values()))
    axes.set_ylabel("replicas (dotted: target)")
    axes.legend(frameon=False, loc="upper right", ncols=3)


def _draw_latency(axes: Any, report: ScalingReport, field: str, title: str, target_ms: float) -> None:
    shown = [
        (request.at_s, getattr(request, field) * 1e3, request.kind)
        for request in report.requests
        if getattr(request, field) is not None
    ]
    markers: dict[WaveKind, str] = {"light": ".", "long prompts": "s", "long outputs": "^"}
    for kind, marker in markers.items():
        mine = [(at_s, value) for at_s, value, each in shown if each == kind]
        axes.scatter(
            [at_s for at_s, _ in mine], [value for _, value in mine], s=9, marker=marker, label=kind, alpha=0.6
        )
    axes.axhline(target_ms, color=TINT, linewidth=0.8, linestyle="--")
    axes.annotate(
        f"slo {target_ms:g} ms", (0, target_ms), xytext=(2, 2), textcoords="offset points", fontsize=7, color=TINT
    )
    scale_logarithmically(axes)
    axes.set_ylabel(f"{title} of each request, ms")
    axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=7)
