"""Reports, written again: python -m minilm_exp.report relation_set, or outputs/runs/NAME.

That of a sweep is written to outputs/sweeps/NAME/report.html, that of a run into its folder; both
are artifacts of their MLflow runs too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers

from minilm_exp.delivery import open_run
from minilm_exp.errors import ExperimentError
from minilm_exp.parsing import read_settings
from minilm_exp.result import read_result
from minilm_exp.run_report import write_run_report
from minilm_exp.sweep_report import write_sweep_report
from minilm_exp.tables import find_asked, log_files, moved_store, parser_of


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = parser_of("minilm_exp.report", __doc__).parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        folder = Path(given.name).expanduser()
        # A sweep may have the name of a folder here.
        if folder.is_dir() and (len(folder.parts) > 1 or (folder / "result.json").is_file()):
            file = _of_run(folder.absolute(), given)
        else:
            asked = find_asked(given)
            file = write_sweep_report(asked)
            log_files(asked.record, asked.uri, [file])
    except ExperimentError as error:
        sys.exit(f"error: {error}")
    print(f"written: {file}")


def _of_run(folder: Path, given: argparse.Namespace) -> Path:
    result = read_result(folder)
    if result is None:
        raise ExperimentError(f"{folder} is no run folder: it has no result.json to read")
    settings = read_settings(folder / "config.yaml")
    settings.outputs_dir = str(folder.parents[1])  # it may have been moved
    settings.tracking.uri = moved_store(
        given.tracking_uri or settings.tracking.uri, settings.outputs
    )
    tracker = open_run(settings.tracking.uri, result)
    file = write_run_report(settings, result, tracker)
    if tracker is not None:
        tracker.log_artifact(file)
    return file


if __name__ == "__main__":
    main()
