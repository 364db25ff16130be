"""The entry point of the app: ``streamlit run app.py -- [--runs FOLDER] [--read-only]``."""

import streamlit as st

from explorer import service
from explorer.pages import access, address, saved, shell

PAGES = {
    "overview": ("Overview", ":material/grid_view:"),
    "tokens": ("Tokens", ":material/notes:"),
    "experts": ("Experts", ":material/hub:"),
    "load_balance": ("Load balance", ":material/balance:"),
    "attention": ("Attention", ":material/visibility:"),
    "flow": ("Flow", ":material/alt_route:"),
    "clusters": ("Clusters", ":material/scatter_plot:"),
    "compare": ("Compare", ":material/compare_arrows:"),
    "compare_runs": ("Compare runs", ":material/difference:"),
    "trends": ("Trends", ":material/trending_up:"),
    "share": ("Share", ":material/share:"),
    "capture": ("Capture", ":material/radio_button_checked:"),
    "learn": ("Learn", ":material/school:"),
}

st.set_page_config(page_title="RouteScope", page_icon=str(shell.LOGO), layout="wide")
access.begin()
pages = [
    shell.page(name, title, icon)
    for name, (title, icon) in PAGES.items()
    if name != "capture" or service.may_write()
]
page = st.navigation(pages, expanded=True)
saved.follow(pages)
address.begin(page.url_path or "overview")
shell.frame(page.title)
page.run()
