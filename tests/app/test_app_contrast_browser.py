"""Every text of a page is read on its ground, in both themes; and pages on a narrow screen."""

import pytest
from browser import visit

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# each text with a contrast below WCAG's 4.5 (1.4.3): [contrast, element, text]
FAINT = """() => {
    const found = [];
    const rgba = (text) => {
        const parts = (text.match(/[\\d.]+/g) ?? []).map(Number);
        const unit = text.startsWith('color(srgb') ? 255 : 1;
        return parts.length < 3 ? [0, 0, 0, 0]
            : [...parts.slice(0, 3).map((part) => part * unit), parts[3] ?? 1];
    };
    const over = (upper, lower) =>
        [0, 1, 2].map((i) => upper[i] * upper[3] + lower[i] * (1 - upper[3])).concat(1);
    const linear = (c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) =>
        0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
    const above = (node) => node.parentElement ?? node.getRootNode().host;
    const chain = (node) => { const all = []; for (; node; node = above(node)) all.push(node);
                              return all; };
    const ground = (node) => chain(node).map((one) => rgba(getComputedStyle(one).backgroundColor))
        .reverse().reduce((lower, upper) => over(upper, lower), [255, 255, 255, 1]);
    const look = (root) => {
        for (const node of root.querySelectorAll('*')) {
            if (node.shadowRoot) look(node.shadowRoot);
            const words = [...node.childNodes].filter((child) => child.nodeType === 3)
                .map((child) => child.textContent.trim()).join(' ').trim();
            // WCAG exempts what is disabled; icons are no text; a slider's number is beside its
            // thumb, and text on a bar or a node is on another ground than the figure's
            const exempt = ':disabled, script, style, [data-testid=stIconMaterial], .bars, .sankey,'
                + '[data-testid=stSlider]';
            if (!words || node.closest(exempt) || !node.getClientRects().length) continue;
            const style = getComputedStyle(node);
            const faded = chain(node)
                .reduce((part, one) => part * getComputedStyle(one).opacity, 1);
            const plot = node.ownerSVGElement && node.closest('.js-plotly-plot');
            if (style.visibility === 'hidden' || faded < 0.05) continue;
            const color = rgba(plot ? style.fill : style.color);
            color[3] *= faded;
            const lower = plot ? rgba(plot._fullLayout.paper_bgcolor.replace(/#(..)(..)(..)/,
                (_, ...hex) => hex.slice(0, 3).map((part) => parseInt(part, 16)).join(' ')))
                : ground(node);
            const [dim, bright] = [luminance(over(color, lower)), luminance(lower)]
                .sort((a, b) => a - b);
            if (bright / dim < 4.5) {
                found.push([(bright / dim).toFixed(2), node.tagName, words.slice(0, 40)]);
            }
        }
    };
    look(document);
    return found;
}"""
PINS = ",".join(f"1.0.{expert}" for expert in range(4))


@pytest.mark.parametrize(
    "path", [f"tokens?color=pinned_weight&pins={PINS}&", "load-balance?", "compare?"]
)
def test_every_text_is_read_on_its_ground(address, new_page, theme, path):
    page = new_page(theme)
    visit(page, f"{address}/{path}run=known&layer=1.0")
    assert page.evaluate(FAINT) == []
    # the question sees what is faint
    page.evaluate("document.querySelector('h1').style.opacity = 0.4")
    assert [words for _, _, words in page.evaluate(FAINT)] == [page.locator("h1").inner_text()]


def test_on_a_narrow_screen_figures_are_moved_aside_and_the_page_is_not(
    address,
    new_page,
):
    page = new_page()
    page.set_viewport_size({"width": 400, "height": 900})
    visit(page, f"{address}/?run=known")
    wide, shown, whole = page.evaluate("""() => {
        const plot = document.querySelector('[data-testid=stPlotlyChart] .main-svg');
        const box = plot.closest('[data-testid=stElementContainer]');
        box.scrollLeft = 1000;
        const main = document.querySelector('[data-testid=stMain]');
        return [plot.clientWidth, box.scrollLeft + box.clientWidth, main.scrollWidth];
    }""")
    assert wide >= 590 and abs(shown - wide) <= 12 and whole <= 400
