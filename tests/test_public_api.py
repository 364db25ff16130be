"""What other people may import, pinned."""

import pytest


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("kernels", ["attention", "coactivation", "gate", "project_topk"]),
        ("capture", ["CaptureConfig", "record"]),
        ("explorer", ["open_run"]),
    ],
)
def test_public_names(package, names):
    module = __import__(package)
    assert sorted(module.__all__) == names
    assert all(callable(getattr(module, name)) for name in names)
