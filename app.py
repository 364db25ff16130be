"""The entry point of the app: ``streamlit run app.py -- [--runs FOLDER] [--read-only]``."""

import streamlit as st

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

# the server imports ``app`` once; a visit of a page runs the script below it
if __name__ != "__main__":
    from explorer.ui import guard

    app = st.App(__file__, middleware=guard.MIDDLEWARE, lifespan=guard.lifespan)
else:
    from explorer import writing
    from explorer.ui import access, address, problems, saved, shell

    st.set_page_config(page_title="RouteScope", page_icon=str(shell.LOGO), layout="wide")
    access.begin()
    may = {name: about for name, about in PAGES.items() if name != "capture" or writing.may_write()}
    pages = [shell.page(name, title, icon) for name, (title, icon) in may.items()]
    page = st.navigation(pages, expanded=True)
    saved.follow(pages)
    address.begin(page.url_path or "overview")
    with problems.shown():
        shell.frame(page.title)
        page.run()
