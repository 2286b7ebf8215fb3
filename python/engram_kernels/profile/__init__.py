"""Measuring: how a time is taken and summed up, and how two runs are compared."""
from engram_kernels.profile.compare import Cell, Series, Verdict, compare_runs, load_run, markdown
from engram_kernels.profile.statistics import Conditions, Summary, measure, median_interval, summarize

__all__ = ["Cell", "Conditions", "Series", "Summary", "Verdict", "compare_runs", "load_run", "markdown", "measure",
           "median_interval", "summarize"]
