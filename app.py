"""The entry point of the app: ``streamlit run app.py -- [--runs FOLDER] [--read-only]``."""

import streamlit as st

PAGES = {
    "Start": {
        "overview": ("Overview", ":material/grid_view:"),
        "learn": ("Learn", ":material/school:"),
    },
    "Explore": {
        "tokens": ("Tokens", ":material/notes:"),
        "experts": ("Experts", ":material/hub:"),
        "attention": ("Attention", ":material/visibility:"),
        "flow": ("Flow", ":material/alt_route:"),
        "clusters": ("Clusters", ":material/scatter_plot:"),
    },
    "Compare": {
        "compare": ("Compare", ":material/compare_arrows:"),
        "compare_runs": ("Compare runs", ":material/difference:"),
        "trends": ("Trends", ":material/trending_up:"),
    },
    "Serve": {
        "load_balance": ("Load balance", ":material/balance:"),
    },
    "Record and share": {
        "capture": ("Capture", ":material/radio_button_checked:"),
        "share": ("Share", ":material/share:"),
    },
}

# the server imports ``app`` once; a visit of a page runs the script below it
if __name__ != "__main__":
    from explorer.ui import guard

    app = st.App(
        __file__, routes=guard.ROUTES, middleware=guard.MIDDLEWARE, lifespan=guard.lifespan
    )
else:
    from explorer import writing
    from explorer.ui import access, address, problems, saved, shell

    st.set_page_config(page_title="RouteScope", page_icon=str(shell.LOGO), layout="wide")
    access.begin()
    groups = {
        group: [
            shell.page(name, *about)
            for name, about in pages.items()
            if name != "capture" or writing.may_write()
        ]
        for group, pages in PAGES.items()
    }
    page = st.navigation(groups, expanded=True)
    saved.follow([page for pages in groups.values() for page in pages])
    address.begin(page.url_path or "overview")
    with problems.shown():
        shell.frame(page.title)
        page.run()
