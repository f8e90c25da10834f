"""Draws a benchmark on one page: latencies and throughput against load, with what is needed to repeat it.

matplotlib draws it.  It is imported only here, because it is an extra (``pip install 'baton[bench]'``).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import msgspec

from app.bench.report import Measurement, Report, describe_run
from app.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
PAGE_INCHES = (11.69, 8.27)  # A4, landscape
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's colours, which people with colour blindness can tell apart too."""
MARKERS = "osD^vP"
FOOTER_COLUMNS = 220
TINT = "#666666"
AXES = {
    "concurrency": "concurrent streams (closed loop)",
    "rate": "requests/s sent (open loop)",
    "speed": "speed of the trace, times as recorded",
}


class Line(msgspec.Struct, frozen=True):
    """One quantity that a panel shows of each target."""

    value: Callable[[Measurement], float | None]
    style: str


class Panel(msgspec.Struct, frozen=True):
    """One diagram."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    is_logarithmic: bool = True


def _latency(title: str, name: str) -> Panel:
    return Panel(
        title,
        "ms",
        (
            Line(lambda m: getattr(m.result, f"{name}_ms"), "-"),
            Line(lambda m: getattr(m.result, f"{name}_p99_ms"), "--"),
        ),
    )


PANELS = (
    _latency("Time to first token (TTFT)", "ttft"),
    _latency("Time per output token (TPOT)", "tpot"),
    _latency("Gap between chunks (ITL)", "itl"),
    _latency("Whole request (E2E)", "e2e"),
    Panel("Output tokens", "tokens/s", (Line(lambda m: m.result.output_tokens_per_s, "-"),), is_logarithmic=False),
    Panel(
        "Requests completed",
        "requests/s",
        (Line(lambda m: m.result.requests_per_s, "-"), Line(lambda m: m.result.goodput_per_s, ":")),
        is_logarithmic=False,
    ),
)


def check(path: Path) -> None:
    """Raise ConfigError if no picture can be written to `path`."""
    if path.suffix not in FORMATS:
        raise ConfigError("--picture", f"{path.name} ends with none of {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--picture", "needs matplotlib: pip install 'baton[bench]'")


def draw(report: Report, path: Path) -> None:
    """Write the page; the suffix of `path` chooses the format."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=PAGE_INCHES)
        figure.set_layout_engine("constrained", rect=(0.01, 0.14, 0.98, 0.74), hspace=0.06, wspace=0.04)
        for panel, axes in zip(PANELS, figure.subplots(2, 3).flat, strict=True):
            _draw_panel(axes, panel, report.measurements)
        _frame(figure, report)
        figure.savefig(path, dpi=150)


def _targets(measurements: list[Measurement]) -> list[str]:
    """Return the targets ordered by name, so that a target keeps its colour whichever was measured first."""
    return sorted({measurement.target for measurement in measurements})


def _draw_panel(axes: Axes, panel: Panel, measurements: list[Measurement]) -> None:
    for number, target in enumerate(_targets(measurements)):
        mine = [measurement for measurement in measurements if measurement.target == target]
        for line in panel.lines:
            _draw_line(axes, line, mine, COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel(panel.unit)
    levels = sorted({measurement.level.value for measurement in measurements})
    axes.set_xlabel(AXES[measurements[0].level.axis])
    axes.set_xscale("log")
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.minorticks_off()
    axes.set_xlim(levels[0] / 1.3, levels[-1] * 1.3)
    if panel.is_logarithmic:
        scale_logarithmically(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_line(axes: Axes, line: Line, measurements: list[Measurement], colour: str, marker: str) -> None:
    """Draw the median of the repetitions, and a band from the least to the greatest if there are several."""
    values: dict[float, list[float]] = {}
    for measurement in sorted(measurements, key=lambda measurement: measurement.level.value):
        value = line.value(measurement)
        if value is not None:
            values.setdefault(measurement.level.value, []).append(value)
    x = list(values)
    axes.plot(x, [median(each) for each in values.values()], line.style, color=colour, marker=marker, markersize=4)
    if any(len(each) > 1 for each in values.values()):
        least, greatest = ([pick(each) for each in values.values()] for pick in (min, max))
        axes.fill_between(x, least, greatest, color=colour, alpha=0.15, linewidth=0)


def scale_logarithmically(axes: Axes) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _frame(figure: Figure, report: Report) -> None:
    """Put title and legend above, and below what it takes to repeat the benchmark."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    targets = _targets(report.measurements)
    figure.text(0.015, 0.965, " and ".join(targets), fontsize=15, fontweight="bold", va="center")
    figure.text(0.015, 0.93, report.workload, fontsize=10, va="center", color=TINT)
    handles: list[Artist] = [
        Line2D([], [], color=COLOURS[n % len(COLOURS)], marker=MARKERS[n % len(MARKERS)], label=target)
        for n, target in enumerate(targets)
    ]
    styles: dict[str, Literal["-", "--", ":"]] = {"median": "-", "p99": "--"}
    if report.limits_ms:
        styles[f"in time ({_limits(report)})"] = ":"
    handles += [Line2D([], [], color=TINT, linestyle=style, label=label) for label, style in styles.items()]
    if any(measurement.repetition for measurement in report.measurements):
        handles.append(Patch(color=TINT, alpha=0.15, linewidth=0, label="all repetitions"))
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, bbox_to_anchor=(0.99, 0.985))
    lines = [short for line in describe_run(report) for short in textwrap.wrap(line, FOOTER_COLUMNS)]
    figure.text(0.015, 0.015, "\n".join(lines), fontsize=7, va="bottom", color=TINT)


def _limits(report: Report) -> str:
    return ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in report.limits_ms.items())
