"""Report a study: one sentence computed from its numbers, what cannot be concluded, tables and pictures.

Everything comes from MLflow: `python -m tuning.report STUDY_ID` writes the report of any past study.
"""

from __future__ import annotations

from tuning.report.document import result_json, summary, write_report
from tuning.report.record import StudyRecord, collect_baselines, read_study
from tuning.tracking.runs import find_study

__all__ = [
    "StudyRecord",
    "collect_baselines",
    "find_study",
    "read_study",
    "result_json",
    "summary",
    "write_report",
    "write_report_files",
]
