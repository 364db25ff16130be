"""How the tests are shared out, what several files of them use, and Triton without a GPU.

Three processes run the tests (pytest-xdist), as two of them wait half of the time, for a browser
or for what they started; the tests of a file stay in one of them, where its fixtures are made once.
Files that are named run in the process that was started. Plug-ins may be absent where only the
tests of the GPU run.

Triton decides when a kernel is *decorated* whether it is compiled or interpreted, so interpreted
kernels need a process of their own. A file named ``test_kernels_<op>_triton.py`` gets one: here it
is a single test that runs the whole file in a new Python with ``TRITON_INTERPRET=1`` and reports
what that run printed. The file itself holds ordinary tests that call
``op(..., backend="triton")`` on CPU tensors and know nothing of this. One of them runs alone with

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_kernels_gate_triton.py -k ties

In that process ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` are poisoned (see
``poisoned_memory``), so a kernel that leaves a piece of its output unwritten fails; other test
files may ask for the fixture by name.

Write such tests with small shapes (a program takes 10 to 20 ms), and remember that bfloat16
arithmetic is silently wrong in the interpreter: kernels convert to float32 right after the load.
"""

import contextlib
import gc
import importlib.util
import inspect
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

# models of tests are too small for threads; on a busy machine torch's threads wait for each other
# many times longer than they work, and the sum of a product may depend on how many there are
os.environ.setdefault("OMP_NUM_THREADS", "1")
# where Python is told to keep no bytecode, a third of collecting is compiling, and each process
# that a test starts compiles the package again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch

gc.disable()  # until tests begin: what is imported and collected stays
sys.dont_write_bytecode = False  # as the environment, above
ROOT = Path(__file__).parent.parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TIMEOUT = 570  # seconds for one file; less than any test may take (.pytest.ini)
# their tests send signals, kill processes, wait or look at the clock: never two of them at once
TOGETHER = {
    f"tests/{name}.py"
    for name in (
        "bench/test_capture_bench",
        "capture/test_capture_buffer",
        "capture/test_capture_cli",
        "capture/test_capture_own_loop_ways",
        "capture/test_capture_shards",
        "capture/test_capture_stopping",
        "capture/test_capture_store_processes",
        "explorer/test_explorer_killed",
        "explorer/test_explorer_worker",
    )
}

# the code of UMAP is compiled once a process, which takes ten seconds
MAPPED = {f"tests/explorer/test_explorer_{name}.py" for name in ("clusters", "degenerate")}
# files with tests in a browser, or of a served app: one Chromium and one app are started, and they
# have compiled what the next page needs
NAMES = ("access", "browser", "clusters_browser", "compare_browser", "share", "text")
BROWSED = {f"tests/app/test_app_{name}.py" for name in NAMES}
# what takes minutes in one process starts first; a long file at the end leaves the others idle
GROUPS = {
    **dict.fromkeys(sorted(BROWSED), "browsed"),
    **dict.fromkeys(sorted(TOGETHER), "together"),
    **dict.fromkeys(sorted(MAPPED), "mapped"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Start three workers, or none where files are named: starting them takes seconds."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    return 0 if all(".py" in arg for arg in config.args) else 3


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give files to workers as they ask for more, those that belong together to one of them."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return GROUPS.get(file, file)

    return ByFile(config, log)


def pytest_collection_modifyitems(config, items):
    """Skip the browser's tests where there is none, leave the matrix to those who ask for it, and
    start with what takes longest."""
    from browser import chromium_path

    if chromium_path() is None and os.environ.get("CI") != "true":  # in CI they must run
        missing = "no Chromium on this machine (apt-get install chromium-headless-shell)"
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=missing))
    if "matrix" not in (config.option.markexpr or ""):
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]
    if hasattr(config, "workerinput"):
        slow, order = Counter(), list(GROUPS)
        for item in items:
            if mark := item.get_closest_marker("slow"):
                slow[item.path] += mark.kwargs.get("seconds", 0.5)

        def place(item):
            file = item.nodeid.partition("::")[0]
            return order.index(file) if file in GROUPS else len(order), -slow[item.path]

        items.sort(key=place)


def pytest_collection_finish():
    """Leave what was imported and collected out of every later search for garbage."""
    gc.enable()
    gc.freeze()


def pytest_pycollect_makemodule(module_path, parent):
    """Collect a file of Triton tests as one test, unless this is the process made for it."""
    name = module_path.name
    if INTERPRETING or not (name.startswith("test_kernels_") and name.endswith("_triton.py")):
        return None
    return InterpretedFile.from_parent(parent, path=module_path)


class InterpretedFile(pytest.File):
    """A file whose tests run in a process of their own."""

    def collect(self):
        run = InterpretedRun.from_parent(self, name="interpreted")
        run.add_marker(pytest.mark.slow(seconds=15))
        yield run


class InterpretedRun(pytest.Item):
    """One run of a file's tests with Triton's interpreter."""

    def runtest(self):
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed (tests/requirements.txt)")
        # without the options of .pytest.ini: no workers of its own
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
        command = [sys.executable, "-m", "pytest", *options, str(self.path)]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if result.returncode:
            raise InterpretedRunFailed(result.stdout + result.stderr)

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, InterpretedRunFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class InterpretedRunFailed(Exception):
    """Tests failed in the interpreting process; the message is what it printed."""


@pytest.fixture(autouse=True)
def one_thread():
    """Run torch on one thread, also after libraries or other tests chose more for the process.

    On a busy machine a second one waits so actively that a test takes ten times the CPU.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def everybody_may_write():
    """Forget the policy of an app that a test before opened, which may have been read-only."""
    yield
    if (writing := sys.modules.get("explorer.writing")) is not None:
        writing.configure(writing.Policy())


@pytest.fixture(autouse=INTERPRETING)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with nan, or 85 in integers, instead of leaving it as it happens to be."""

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            fresh = make(*args, **kwargs)
            poison = float("nan") if fresh.is_floating_point() else fresh.dtype != torch.bool and 85
            return fresh.fill_(poison) if fresh.device.type != "meta" else fresh

        return make_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session", autouse=INTERPRETING)
def language_replaced_once_a_launch():
    """Let the interpreter replace Triton's language when a kernel is launched, and only then.

    It does so again at every call of a function inside a kernel, which finds everything replaced
    but sorts and reads whole modules for it: a third of the time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace, replaced, used = interpreter._patch_lang, set(), {}

    def replace_once(function):
        if function not in used:
            modules = filter(inspect.ismodule, function.__globals__.values())
            used[function] = {module for module in modules if module in (tl, tl.core)}
        if used[function] and used[function] <= replaced:
            return None  # what is put back is what the launch replaced
        scope = replace(function)
        if not replaced:
            put_back = scope.restore
            scope.restore = lambda: (replaced.clear(), put_back())
        replaced.update(used[function])
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture
def worker(monkeypatch):
    """Put a worker that only keeps what it is asked in the place of the server's one."""
    from app_pages import FakeWorker

    from explorer.worker import client

    monkeypatch.setattr(client, "WorkerClient", FakeWorker)
    client.shared_worker.cache_clear()
    yield client.shared_worker()
    client.shared_worker.cache_clear()


@pytest.fixture(scope="module")
def closed_runs():
    """Close the runs that pages opened when a file's tests are over."""
    import streamlit as st

    yield
    st.cache_resource.clear()


@pytest.fixture
def runs(tmp_path, monkeypatch, worker, closed_runs):
    """Make an empty folder and let the app show its runs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(folder)])
    return folder


@pytest.fixture(scope="session")
def served_runs(tmp_path_factory):
    """Make a folder with a run of known routing, and one of 40 layers with 64 experts."""
    from synthetic import write_run

    from capture.bench import store

    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "known.duckdb", level="attention")
    shape = store.Shape(layers=40, experts=64, slots=2, tokens=600)
    store.write_run(folder / "large.duckdb", shape, store.make_forwards(shape, count=1, seed=0), 2)
    return folder


@pytest.fixture(scope="session")
def served_cache(tmp_path_factory):
    """Make a folder for the maps of the served app."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def address(served_runs, served_cache, tmp_path_factory):
    """Serve the app; its address."""
    from browser import serve

    served = serve(served_runs, log=tmp_path_factory.mktemp("log") / "server.log")
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(served_cache))
            url = stack.enter_context(served)
        yield url


@pytest.fixture(scope="session")
def read_only(tmp_path_factory):
    """Serve a folder with a run to readers only; its address and the folder."""
    from browser import serve
    from synthetic import write_run

    folder = tmp_path_factory.mktemp("team")
    write_run(folder / "known.duckdb", level="attention")
    with serve(folder, options=["--read-only"]) as url:
        yield url, folder


@pytest.fixture(scope="session")
def chromium():
    """Start a browser."""
    from browser import browser

    with browser() as driven:
        yield driven


@pytest.fixture(scope="session")
def contexts(chromium):
    """Keep the profiles of all tests, one for each set of options: scripts are loaded once."""
    made = {}
    yield made
    for context in made.values():
        context.close()


@pytest.fixture(params=["light", "dark"])
def theme(request):
    return request.param


@pytest.fixture
def new_page(chromium, contexts):
    """Return what opens a page; its `troubles` are dialogs and errors of scripts."""
    from browser import SIZE

    opened = []

    def make(theme="light", **options):
        key = tuple(sorted(options.items()))
        if key not in contexts:
            # what moves is painted again and again, which takes a core; nothing is tested of it
            still = {"viewport": SIZE, "reduced_motion": "reduce"}
            contexts[key] = chromium.new_context(**still, **options)
            contexts[key].set_default_timeout(60_000)
        page = contexts[key].new_page()
        page.emulate_media(color_scheme=theme)
        opened.append(page)
        page.troubles = []
        page.on("dialog", lambda dialog: (page.troubles.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        return page

    yield make
    for page in opened:
        page.close()


@pytest.fixture
def page(new_page):
    return new_page()
