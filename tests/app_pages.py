"""Pages run by AppTest, without a browser, and what they show."""

from explorer.worker import WorkerClient
from explorer.worker.client import ROOT

APP = str(ROOT / "app.py")


class FakeWorker(WorkerClient):
    """A worker that keeps what it is asked and never starts a process."""

    def __init__(self):
        super().__init__(["false"])

    def _start_next(self):
        """Leave every job in the queue."""


def opened(page="overview", **query):
    """Open a page by a link, which runs nothing else, and check that it shows no exception."""
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    app = AppTest.from_file(APP, default_timeout=60)
    if page != "overview":
        # `switch_page` knows pages by their files after a first run only, which would show another
        app._page_hash = calc_hash(page.replace("_", "-"))
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception[0].stack_trace
    return app


def query(app, name):
    value = app.query_params[name]
    return value if isinstance(value, str) else value[0]


def charts(app):
    return [chart.proto for chart in app.get("plotly_chart")]


def notes(app):
    return " ".join(info.value.replace("\\", "") for info in app.info)
