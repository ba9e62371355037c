"""The report in words and tables, for people."""

from __future__ import annotations

from collections.abc import Sequence

from model.table import markdown_table
from training.evaluation import Report
from training.ladder import promise

CAPTIONS = {
    "accuracy_over_cost.png": "Accuracy over cost.",
    "exit_shares.png": "Where images leave at each operating point.",
    "reliability.png": "Of answers at a confidence, how many are right; calibration error as "
    "trained → as served.",
    "class_shares.png": "The classes that leave earliest and latest.",
    "leave_first.png": "Images that leave at the first exit.",
    "leave_last.png": "Images that need the deepest exits.",
    "lost.png": "What early exit costs: the full network would have been right.",
    "gained.png": "What early exit gains: the full network would have been wrong.",
}


def render(report: Report, files: Sequence[str], trained: str | None) -> str:
    """The whole of report.md, with these files shown in it.

    Args:
        trained: the page on how the network was trained, if there is one.
    """
    parts = [
        f"# {report.bundle} {report.version}: what early exit buys",
        headline(report),
        "## Exits",
        "If every image left at one exit; *alone*, answered without the exits before it. *Error* "
        "is the expected calibration error as trained, *served* the calibrated one, *leaving* that "
        "among the images that leave there at the operating point for a loss of at most "
        f"{100 * report.shown_loss:g}%. *Only full* and *only here* count the images that only the "
        "full network, or only this exit, gets right.",
        exit_table(report),
        "## Operating points",
        f"{guarantee(report)} Intervals are exact, two-sided, 90 %. Everything is measured in "
        f"{report.dtype}; speed on {report.device}, one image at a time, eager.",
        point_table(report),
    ]
    parts += [f"![{CAPTIONS[f]}]({f})\n\n{CAPTIONS[f]}" for f in files]
    if trained:
        parts.append(f"[How this network was trained]({trained})")
    return "\n\n".join(parts) + "\n"


def headline(report: Report) -> str:
    """The one sentence to remember."""
    p, full = report.point_shown, report.exits[-1]
    return (
        f"On {report.images} test images the full network is right on {full.accuracy:.2%}. "
        f"Leaving as soon as an exit is sure enough, {_bound(report)}, it is right on "
        f"{p.accuracy:.2%} with {p.mean_macs:.0%} of the multiply-accumulates: "
        f"{p.speedup_macs:.2f} times fewer, {p.speedup_measured:.2f} times faster here; "
        f"{p.exit_shares[0]:.0%} of the images leave at the first exit."
    )


def guarantee(report: Report) -> str:
    """The sentence that says how far the bounds hold."""
    how = f"(method: {report.method}, {report.calibration_images} images)"
    if not report.covered:
        where = " and ".join(report.certified_dtypes)
        return f"Bounds hold for {where}; in {report.dtype} none was certified {how}."
    return f"Bounds hold {promise(report.method, report.delta)} {how}."


def _bound(report: Report) -> str:
    p = report.point_shown
    if not report.covered:
        return f"by thresholds for a loss of at most {p.max_accuracy_loss:.2%} in other numerics"
    if not p.certified:
        return f"at a loss of at most {p.max_accuracy_loss:.2%} on average over calibration sets"
    return f"at a guaranteed loss of at most {p.max_accuracy_loss:.2%}"


def exit_table(report: Report) -> str:
    """One row for each exit."""
    head = "exit|accuracy|alone|MACs, M|parameters, M|ms|error|served|leaving|only full|only here"
    rows = [
        [
            e.exit,
            f"{e.accuracy:.2%}",
            f"{e.alone:.2%}",
            f"{e.macs / 1e6:.1f}",
            f"{e.parameters / 1e6:.2f}",
            f"{e.milliseconds:.2f}",
            f"{e.error_before:.2%}",
            f"{e.error_after:.2%}",
            "" if e.error_leaving is None else f"{e.error_leaving:.2%}",
            e.only_full_network_right,
            e.only_this_exit_right,
        ]
        for e in report.exits
    ]
    columns = head.split("|")
    return markdown_table(columns, rows, right=range(len(columns)))


def point_table(report: Report) -> str:
    """One row for each operating point."""
    head = "loss at most|accuracy|loss|interval|mean MACs|fewer MACs|faster|leaving at each exit"
    rows = [
        [
            f"{p.max_accuracy_loss:.2%}" + ("" if p.certified else " on average"),
            f"{p.accuracy:.2%}",
            f"{p.loss:.2%}",
            f"{p.loss_interval[0]:.2%} to {p.loss_interval[1]:.2%}",
            f"{p.mean_macs:.1%}",
            f"{p.speedup_macs:.2f}x",
            f"{p.speedup_measured:.2f}x",
            " ".join(f"{share:.0%}" for share in p.exit_shares),
        ]
        for p in report.operating_points
    ]
    columns = head.split("|")
    return markdown_table(columns, rows, right=range(len(columns)))
