"""`lawcat report`: a report of results that were stored."""

from __future__ import annotations

from pathlib import Path

from lawcat.evaluation.report import report_from_files


def run_report(files: list[Path], output: Path, image_format: str) -> None:
    """See the command's help."""
    print(report_from_files(files, output, image_format=image_format))
