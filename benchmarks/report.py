"""Table and figure of docs/performance.md: python -m benchmarks.report RESULT.json FIGURE.png."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def markdown(document: dict[str, Any]) -> str:
    """The figures as a table, with where they come from."""
    lines = [
        f"{document['processor']}, {document['cores']} cores, GPU: {document['gpu']}; torch"
        f" {document['torch']}, transformers {document['transformers']}; commit"
        f" {document['commit'][:7]}, {document['date']}; `{document['command']}`",
        "",
        "| | figure | | target |",
        "| --- | --- | ---: | --- |",
    ]
    for row in document["rows"]:
        if row["section"] != "1 memory":
            value = f"{row['value']:.3g}" if row["value"] < 1000 else f"{row['value']:.0f}"
            lines.append(
                f"| {row['section']} | {row['what']} | {value} {row['unit']} | {row['target']} |"
            )
    return "\n".join(lines)


def memory_figure(document: dict[str, Any]) -> Figure:
    """Memory of value and gradient of the loss against sequence length."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for variant in ("naive", "ours"):
        points = [
            (int(match[1]), row["value"])
            for row in document["rows"]
            if row["section"] == "1 memory"
            and (match := re.search(rf"4x(\d+): {variant}$", row["what"]))
        ]
        axes.plot(*zip(*points), marker="o", label=variant)
        for num_tokens, mib in points:
            axes.annotate(
                f"{mib:.0f}", (num_tokens, mib), (0, 5), textcoords="offset points", ha="center"
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens per sequence")
    axes.set_ylabel("MiB beside the states")
    axes.set_title("Loss and gradient, 4 sequences, 16 relation heads, 256 -> 128", fontsize=9)
    axes.legend()
    return figure


if __name__ == "__main__":
    result = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    print(markdown(result))
    memory_figure(result).savefig(sys.argv[2], dpi=120)
