"""Tests in up to four processes where pytest-xdist is installed, each with one thread, which torch
reads at import."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """As if `-n auto --maxprocesses 4 --dist loadfile` were given, since a file's tests share
    fixtures; -n 0: one."""
    options, in_worker = config.option, "PYTEST_XDIST_WORKER" in os.environ
    free = config.pluginmanager.hasplugin("xdist") and not in_worker and not options.usepdb
    if free and options.numprocesses is None:
        options.numprocesses, options.dist = min(os.cpu_count() or 1, 4), "loadfile"
        # in the order below, and not the files with the most tests first
        options.loadscopereorder = False


LONGEST = (
    "test_reproduce.py",
    "test_pretrain.py",
    "test_processes.py",
    "test_fuzz.py",
    "test_own_sites.py",
    "test_use.py",
)


def pytest_collection_modifyitems(items):
    """The files that take longest come first: at the end no process then waits for another that is
    minutes in one."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )
