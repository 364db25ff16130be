"""A run or a saved view as one HTML file that needs no server and no network."""

from explorer.report.build import build_report, make_report, write_report

__all__ = ["build_report", "make_report", "write_report"]
