"""Pictures of every page in both themes: ``python tests/screenshots.py OUT [--runs DIR]``.

Starts the app on a free port of this machine, records the demo run if the folder has none, and
drives a headless Chromium over the pages. Pictures are 8-bit PNG files of 1400 x 900 pixels.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from browser import browser, serve, settle

SIZE = {"width": 1400, "height": 900}
PAGES = {
    "overview": "/?run=RUN",
    "tokens": "/tokens?run=RUN&layer=LAYER",
    "expert": "/tokens?run=RUN&layer=LAYER&expert=3",
    "experts": "/experts?run=RUN&layer=LAYER",
    "learn": "/learn?run=RUN&layer=LAYER&step=specialisation",
    "load-balance": "/load-balance?run=RUN&layer=LAYER",
    "attention": "/attention?run=RUN&layer=LAYER",
    "flow": "/flow?run=RUN&layer=LAYER",
    "clusters": "/clusters?run=RUN&layer=LAYER",
    "compare": "/compare?run=RUN",
    "compare-runs": "/compare-runs?run=RUN&ids=same",
    "trends": "/trends?run=RUN",
    "share": "/share?run=RUN",
    "capture": "/capture?run=RUN",
}


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=Path, help="runs folder; default: a temporary one")
    parser.add_argument("--run", default="demo")
    parser.add_argument("--layer", default="2")
    parser.add_argument("--full", action="store_true", help="the whole page, not its first screen")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(options.runs or Path(folder)) as address,
        browser() as chromium,
    ):
        for theme in ("light", "dark"):
            context = chromium.new_context(viewport=SIZE, color_scheme=theme)
            page = context.new_page()
            # without a run this records the demo prompts
            page.goto(address)
            page.wait_for_url(lambda url: "demo-sample" not in url, timeout=240_000)
            page.get_by_text("Busiest expert").wait_for(timeout=240_000)
            for name, path in PAGES.items():
                path = path.replace("RUN", options.run).replace("LAYER", options.layer)
                page.goto(address + path)
                settle(page)
                if name == "clusters":
                    # until the map is made in the background, the page shows another
                    page.get_by_text("of this UMAP").wait_for(timeout=240_000)
                    settle(page)
                if options.full:
                    _grow(page)
                page.screenshot(path=options.out / f"{name}-{theme}.png")
                page.set_viewport_size(SIZE)
            context.close()
    _fewer_colours(options.out)


def _grow(page):
    """Make the window as high as the page."""
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": SIZE["width"], "height": max(SIZE["height"], height + 20)})
    settle(page)


def _fewer_colours(folder):
    """Write the pictures with 256 colours, a third of the size; needs Pillow, as Streamlit does."""
    from PIL import Image

    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            # colours of a few pixels count too: a mark, an end of a scale
            small = picture.convert("RGB").quantize(
                256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
            )
        small.save(path, optimize=True)


if __name__ == "__main__":
    main()
