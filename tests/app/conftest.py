"""What the tests of the app share beside the fixtures of all tests."""

import sys
from functools import cache

import pytest


@pytest.fixture(scope="session", autouse=True)
def components_found_once():
    """Look for components of other packages once.

    Each `AppTest` reads about all installed packages to find them, which takes as long as a page.
    """
    from streamlit.components.v2 import manifest_scanner

    with pytest.MonkeyPatch.context() as patch:
        found = cache(manifest_scanner.scan_component_manifests)
        patch.setattr(manifest_scanner, "scan_component_manifests", found)
        yield


@pytest.fixture(scope="session", autouse=True)
def scripts_waited_for():
    """Wait for the thread of a script: to ask it every millisecond takes a tenth of its time."""
    from streamlit.testing.v1 import local_script_runner

    asked = local_script_runner.require_widgets_deltas

    def waited(runner, timeout=3):
        runner._script_thread.join(timeout)
        if not runner.script_stopped():
            asked(runner, 0)  # ends it and says so

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_script_runner, "require_widgets_deltas", waited)
        yield


@pytest.fixture(scope="session")
def compared(served_runs):
    """Put runs that are compared, and a comparison, beside what is served; return the folder."""
    from test_app_compare_browser import write_compared

    write_compared(served_runs)
    return served_runs


@pytest.fixture(scope="session")
def _folders(tmp_path_factory):
    """Keep the folders of `show`."""
    return {}, tmp_path_factory


@pytest.fixture
def show(_folders, monkeypatch, worker, closed_runs):
    """Return what lets the app show the runs of a function, which has written them once.

    The function gets a folder and returns what the test wants to know of it. Other tests read
    the same files and share what the app remembers of them: nobody writes into the folder, and
    whoever changes how the app counts writes runs of his own (`runs`).
    """
    made, factory = _folders

    def show_runs(write):
        if write not in made:
            folder = factory.mktemp("shown")
            made[write] = folder, write(folder)
        folder, found = made[write]
        monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(folder)])
        return found

    return show_runs
