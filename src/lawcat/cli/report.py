"""`lawcat report`: a report of results that were stored."""

from __future__ import annotations

from pathlib import Path

from lawcat.evaluation.report import report_from_files


def run_report(files: list[Path], output: Path, names: str | None, image_format: str) -> None:
    """See the command's help."""
    chosen = None if names is None else [name.strip() for name in names.split(",")]
    print(report_from_files(files, output, names=chosen, image_format=image_format))
