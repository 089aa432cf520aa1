"""What a study says: one sentence computed from the numbers, tables, plots, and what cannot be concluded.

Everything comes from MLflow: `python -m tuning.report STUDY_ID` writes the report of any past study.
"""

from tuning.report.document import result_json, summary, write_report, write_report_files
from tuning.report.reading import StudyRecord, collect_baselines, find_study, read_study

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
