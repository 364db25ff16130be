"""Hues are seen on their ground and told apart by readers with colour vision deficiencies."""

import itertools
import re
import tomllib

import numpy as np
import pandas as pd
import pytest
from plotly.colors import unlabel_rgb
from synthetic import NASTY

from explorer.pages.clusters.figures import COLORED, Group, map_points
from explorer.pages.tokens import figures as token_figures
from explorer.report.document import section
from explorer.ui import shell, theme
from explorer.ui.state import ROOT

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "common": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = np.array([0.95047, 1.0, 1.08883])
# CIEDE2000: 2.3 is a just noticeable difference side by side; hues are far apart on a figure
APART = {"common": 20.0, "protanopia": 10.5, "deuteranopia": 10.5, "tritanopia": 10.5}
GROUNDS = [False, True]


def linear(color):
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(float(XYZ[1] @ linear(color)) + 0.05 for color in (one, other))
    return high / low


def lab(light):
    parts = XYZ @ light / WHITE
    parts = np.where(parts > 216 / 24389, np.cbrt(parts), (24389 / 27 * parts + 16) / 116)
    x, y, z = parts
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ciede2000(first, second):
    """Return the colour difference of two CIELAB colours (Sharma, Wu and Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean**7 / (mean**7 + 25**7))
    c1, c2 = np.hypot(a1 * stretch, b1), np.hypot(a2 * stretch, b2)
    h1, h2 = (np.arctan2(b, a * stretch) % (2 * np.pi) for a, b in ((a1, b1), (a2, b2)))
    turn = 0.0 if c1 * c2 == 0 else (h2 - h1 + np.pi) % (2 * np.pi) - np.pi
    hue = h1 + h2 if c1 * c2 == 0 else h1 + turn / 2
    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    t = (
        1
        - 0.17 * np.cos(hue - np.radians(30))
        + 0.24 * np.cos(2 * hue)
        + 0.32 * np.cos(3 * hue + np.radians(6))
        - 0.20 * np.cos(4 * hue - np.radians(63))
    )
    degrees = np.degrees(hue) % 360
    rotation = -np.sin(np.radians(60 * np.exp(-(((degrees - 275) / 25) ** 2)))) * 2
    rotation *= np.sqrt(chroma**7 / (chroma**7 + 25**7))
    dl = (l2 - l1) / (1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(turn / 2) / (1 + 0.015 * chroma * t)
    return float(np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh))


def grounds(dark):
    """Return what hues stand on: the app's and the report's ground and cards."""
    name = "dark" if dark else "light"
    app = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())["theme"][name]
    style = (ROOT / "explorer/report/report.css").read_text()
    (block,) = re.findall(r"color-scheme: " + name + r";(.*?)\}", style, re.DOTALL)
    report = dict(re.findall(r"--(\w+): (#\w{6});", block))
    # figures bring their ground along
    assert app["backgroundColor"] == report["ground"] == theme.ground(dark)
    return app["backgroundColor"], app["secondaryBackgroundColor"], report["card"]


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [  # of the test data of Sharma, Wu and Dalal 2005
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_distance_is_that_of_the_standard(first, second, distance):
    assert ciede2000(first, second) == pytest.approx(distance, abs=1e-4)


@pytest.mark.parametrize("dark", GROUNDS)
def test_hues_are_seen_on_every_ground(dark):
    """WCAG 2, 1.4.11, asks for 3 of what is not text."""
    every = [*theme.hues(dark), theme.accent(dark), *theme.categories(dark)]
    for hue, ground in itertools.product(every, grounds(dark)):
        assert contrast(hue, ground) >= 3, (hue, ground)


@pytest.mark.parametrize("dark", GROUNDS)
def test_marks_of_an_amount_are_seen_on_their_figure(dark):
    colors = [
        "#" + "".join(f"{round(v):02x}" for v in unlabel_rgb(c)) for c in theme.marks(9, dark)
    ]
    assert [color for _, color in theme.marks_scale(dark)] == theme.marks(9, dark)
    assert min(contrast(color, theme.ground(dark)) for color in colors) >= 3
    # more is brighter, step by step
    levels = [float(XYZ[1] @ linear(color)) for color in colors]
    assert levels == sorted(levels)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("dark", GROUNDS)
def test_hues_are_told_apart(dark, vision):
    seen = {hue: lab(np.clip(VISION[vision] @ linear(hue), 0, 1)) for hue in theme.hues(dark)}
    assert len(seen) == theme.N_HUES == 8
    for (name, one), (other, two) in itertools.combinations(seen.items(), 2):
        assert ciede2000(one, two) >= APART[vision], (name, other)
    # twelve cannot be as far apart: they have numbers or marks besides
    twelve = [lab(np.clip(VISION[vision] @ linear(c), 0, 1)) for c in theme.categories(dark)]
    assert min(itertools.starmap(ciede2000, itertools.combinations(twelve, 2))) >= 4


@pytest.mark.parametrize("dark", GROUNDS)
@pytest.mark.parametrize("opacity", [0.35, 0.65, 0.95])
def test_text_is_read_on_every_hue(dark, opacity):
    for hue in theme.hues(dark):
        upper, lower = (
            np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
            for color in (hue, theme.ground(dark))
        )
        mixed = "#" + "".join(f"{round(v):02x}" for v in opacity * upper + (1 - opacity) * lower)
        assert contrast(theme.text_on(hue, opacity, dark), mixed) >= 4.5


def some_load():
    return pd.DataFrame(
        {
            "layer": 1,
            "site": 0,
            "expert_id": range(4),
            "n_experts": 4,
            "top_k": 2,
            "assignments": [4, 3, 2, 1],
            "share": [0.4, 0.3, 0.2, 0.1],
            "ratio": [1.6, 1.2, 0.8, 0.4],
        }
    )


@pytest.mark.parametrize("dark", GROUNDS)
def test_a_pin_is_seen_even_in_the_colour_of_all_bars(dark):
    place = theme.hues(dark).index(theme.accent(dark))
    pins = [(9, 0, n) for n in range(place)] + [(1, 0, 2)]
    experts = some_load().assign(slot=range(4), weight=0.25, weight_share=0.25)
    drawn = token_figures.token_routes(experts, token_text="a", pins=pins, dark=dark).data
    assert [bar.marker.line.width[0] for bar in drawn] == [1, 1, 3, 1]


def test_coloured_tokens_of_a_report_change_with_the_theme():
    light, dark = theme.hues(False)[0], theme.hues(True)[0]
    strip = {
        "kind": "strip",
        "texts": ["a", NASTY],
        "levels": [1, None],
        "hints": ["", ""],
        "hues": [light, None],
        "dark_hues": [dark, None],
        "legend": {"title": "t", "swatches": [[light, NASTY]]},
        "dark_legend": {"title": "t", "swatches": [[dark, NASTY]]},
    }
    text = section([strip])
    assert text.count(f"--light:{light};--dark:{dark}") == 2
    assert text.count("hued") == 2 and NASTY not in text
    plain = strip | {"legend": {}, "dark_legend": {}}
    assert "--dark" not in section([plain | {"hues": ["red", None]}])
    assert f"--dark:{light}" in section([plain | {"dark_hues": ["red", None]}])


@pytest.mark.parametrize("dark", GROUNDS)
def test_small_print_and_words_on_buttons_are_read(dark):
    """WCAG 2, 1.4.3, asks for 4.5 of text; the app mends what Streamlit's theme lacks of it."""
    name = "dark" if dark else "light"
    app = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())["theme"][name]
    for ground in grounds(dark):
        assert contrast(shell._SOFT[dark], ground) >= 4.5
        assert contrast(app["textColor"], ground) >= 4.5
    assert contrast(shell._ON_PRIMARY[dark], app["primaryColor"]) >= 4.5
    assert contrast(app["primaryColor"], app["backgroundColor"]) >= 4.5
    assert theme.foreground(dark) == app["textColor"]


def test_what_has_no_name_lies_under_the_named_points():
    x = np.arange(COLORED + 2.0)
    many = [f"d{i}" for i in range(COLORED + 1)]
    names = [*many, "others"]
    groups = [Group(name, x == i, rest=name == "others") for i, name in enumerate(names)]
    figure = map_points(
        x,
        x,
        x >= 0,
        texts=names,
        ids=x[:, np.newaxis],
        color=groups,
        title="",
        caption="",
        extent=(0, 30, 0, 30),
    )
    drawn = [trace.name for trace in figure.data]
    last = [f"{many[-1]} (1)", "others (1)"]
    assert drawn == [*last, *(f"{name} (1)" for name in many[:-1])]
    # colour and mark together are of one thing alone, and names stand where there is room
    looks = {(trace.marker.color, trace.marker.symbol) for trace in figure.data[2:]}
    assert len(looks) == COLORED
    written = [annotation.text for annotation in figure.layout.annotations]
    assert written and set(written) <= set(many) and len(written) < len(many)
    listed = sorted(figure.data, key=lambda trace: trace.legendrank)
    assert [trace.name for trace in listed] == [f"{name} (1)" for name in names]
