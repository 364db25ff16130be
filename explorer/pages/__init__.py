"""The pages of the app, a folder each: ``page.py`` is its layout and runs when the page is opened.

Beside it lie ``data.py`` (its SELECTs), ``figures.py`` and parts of its own. A page may use the
data and figures of another one, never its ``page.py``. Only ``app.py`` opens pages.
"""
