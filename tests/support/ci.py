"""With EK_CI=1, a skipped test fails: what CI can install is there, so a skip would hide that it is not.

A pytest plugin that tests/conftest.py registers. ALLOWED_SKIPS is the one list of reasons that CI accepts.
"""
import os
import re

import pytest

IS_CI = os.environ.get("EK_CI") == "1"
# what a machine may lack that no package brings: the reason that a test gives, whole
ALLOWED_SKIPS = re.compile("|".join((
    r"this machine has no free explicit huge pages \(vm\.nr_hugepages\)",
    r"this machine names no NUMA nodes",
    r"the system gives no huge pages now",
    r"no mount: .*",
    r"no seccomp filter can be set here",
    r"this file system refuses O_DIRECT at open",
    r".*io_uring is refused: .*",  # the kernel or its sandbox; a build without liburing is no reason
    r"root may write everywhere",
    r"only root can .*",
    r"no network namespace can be made here: .*",
    r"the sanitizer's shadow takes more addresses than a limit could spare",
    r"no compiled op", r"no CUDA kernel of it yet",  # of tests/cuda_build, which takes every op
    r"it can run here", r"slow; one dtype shows the path", r"needs sm_90",
    r"rows of a file come out on the CPU",
    r"(this machine has a device|there is a GPU|needs the interpreter.*|a GPU counts bad ids; check_errors raises them)",
)), re.DOTALL)


def refuse_skip(report):
    """Makes a skipped report a failure, unless its reason is allowed."""
    if not IS_CI or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
    if not ALLOWED_SKIPS.fullmatch(reason):
        report.outcome = "failed"
        report.longrepr = f"EK_CI=1, and skipped for a reason outside ALLOWED_SKIPS (tests/support/ci.py): {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return refuse_skip((yield))
