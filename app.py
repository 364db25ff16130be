"""The entry point of the app: ``streamlit run app.py -- [--runs FOLDER] [--read-only]``."""

import streamlit as st

from explorer import service
from explorer.pages import access, address, shell

PAGES = {
    "overview": ("Overview", ":material/grid_view:"),
    "tokens": ("Tokens", ":material/notes:"),
    "load_balance": ("Load balance", ":material/balance:"),
    "attention": ("Attention", ":material/visibility:"),
    "flow": ("Flow", ":material/alt_route:"),
    "clusters": ("Clusters", ":material/scatter_plot:"),
    "capture": ("Capture", ":material/radio_button_checked:"),
}

st.set_page_config(page_title="RouteScope", page_icon=":material/route:", layout="wide")
access.begin()
page = st.navigation(
    [
        st.Page(
            f"explorer/pages/{name}.py",
            title=title,
            icon=icon,
            url_path=name.replace("_", "-"),
            default=name == "overview",
        )
        for name, (title, icon) in PAGES.items()
        if name != "capture" or service.may_write()
    ]
)
address.begin(page.url_path or "overview")
shell.frame(page.title)
page.run()
