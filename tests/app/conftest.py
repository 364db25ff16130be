"""What the tests of the app share beside the fixtures of all tests."""

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
