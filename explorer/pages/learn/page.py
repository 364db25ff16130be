"""Learn: a short tour on the open run, how to read every page, and the glossary."""

import re
from collections.abc import Callable

import pandas as pd
import streamlit as st
from streamlit.errors import StreamlitPageNotFoundError

from explorer import playground
from explorer.pages.experts.data import divergences, shares_of
from explorer.pages.experts.figures import DotsAxis, interval_dots
from explorer.pages.load_balance.figures import load_bars
from explorer.pages.tokens.data import (
    token_experts,
    token_gates,
    token_quantity,
    token_scores,
    tokens,
)
from explorer.pages.tokens.figures import score_bars, token_routes
from explorer.queries.load import expert_load
from explorer.queries.overview import prompts
from explorer.text import plain, visible
from explorer.ui import address, guard
from explorer.ui.chart import chart
from explorer.ui.glossary import TERMS
from explorer.ui.problems import instead, section
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, balance_of, is_dark
from explorer.ui.wording import (
    certainty_sentence,
    domain_labels,
    expert_label,
    number,
    probabilities,
    routing_sentence,
)

_STEPS = {
    "router": "1 · What is a router?",
    "load": "2 · Who gets the work?",
    "specialisation": "3 · What is an expert for?",
    "path": "4 · From layer to layer",
    "pages": "5 · Which page answers what?",
    "yours": "6 · Your own text",
}
_PAGES = {
    "overview": "What is in this run, and is any expert overloaded or idle?",
    "tokens": "Which experts did this very word go to, and how sure was the router?",
    "experts": "What is this expert for? Which experts fire on this word?",
    "load_balance": "Is the work shared evenly, and what would a limit drop?",
    "attention": "Which earlier tokens does a head look at, and does routing follow?",
    "flow": "Which experts follow each other, and which serve the same token?",
    "clusters": "Which tokens, prompts or experts are alike?",
    "compare": "What would another router do on the same tokens?",
    "compare_runs": "What differs between two runs, token by token and layer by layer?",
    "trends": "How did routing come about while the model was trained?",
    "share": "How do I show somebody else what I see?",
    "capture": "How do I record prompts of my own?",
}
_SHOWN = 8  # domains in the small figure
_EXAMPLE = range(6, 40)  # positions in a prompt that an example is taken from
_LOOKED_AT = 10  # prompts
_AHEAD = 0.05  # margin of a choice that a little change would not turn over
_WORD = re.compile(r"\s[^\W\d_]{3,}")
_GOES_ON = re.compile(r"[^\W\d_]")
_PLAYGROUND_HEIGHT = 1_100  # pixels


def render() -> None:
    """Draw the page."""
    view = current_view()
    _asked()
    step = address.choose(
        st.segmented_control, "step", "The tour", _STEPS, label_visibility="collapsed"
    )
    steps: dict[str, Callable[[View], None]] = {
        "router": _router,
        "load": _load,
        "specialisation": _specialisation,
        "path": _path,
        "pages": _which_page,
        "yours": _yours,
    }
    steps[step](view)
    _next(step)
    _glossary()


def _asked() -> None:
    """Explain the word that a figure's "?" asked for."""
    name = address.read("term")
    if not name:
        return
    if name not in TERMS:
        address.note(f"The link names the word “{name[:60]}”, which is not in the glossary.")
        address.write("term", "")
        return
    term = TERMS[name]
    with st.container(border=True, key="asked term"):
        st.markdown(f"**{term.title}**: {term.text}")
        for other in term.also:
            st.markdown(f"**{TERMS[other].title}**: {TERMS[other].text}")


def _next(step: str) -> None:
    names = list(_STEPS)
    place = names.index(step)
    if place + 1 < len(names):
        following = names[place + 1]
        st.button(
            f"Next: {_STEPS[following].split('· ')[1]}",
            on_click=lambda: address.write("step", following),
        )


def _example(view: View) -> "pd.Series | None":
    """Return the word, in some prompts, whose choice in the view's layer was clearest."""
    if not view.run.records_ids:
        return None
    listed = ask(view, prompts, limit=50, **view.prompt_filters)
    fitting = listed[listed["tokens"] > _EXAMPLE.start]
    listed = fitting if len(fitting) else listed
    found = [
        _clearest(view, int(prompt_id))
        for prompt_id in listed["prompt_id"].iloc[:: -(-len(listed) // _LOOKED_AT) or 1]
    ]
    known = [row for row in found if row is not None]
    return max(known, key=lambda row: (row["is_word"], row["clear"]), default=None)


def _clearest(view: View, prompt_id: int) -> "pd.Series | None":
    """Return the token of a prompt whose choice was clearest, a whole word where there is one."""
    found = ask(view, tokens, prompt_id=prompt_id)
    if found.empty:
        return None
    text = found["text"].fillna("")
    middle = found["position"].isin(_EXAMPLE)
    whole = ~text.shift(-1, fill_value="").map(lambda word: bool(_GOES_ON.match(word)))
    words = middle & whole & text.map(lambda word: bool(_WORD.fullmatch(word)))
    choices = next((found[which] for which in (words, middle) if which.any()), found)
    margin, entropy = (
        view.here(ask(view, token_quantity, prompt_id=prompt_id, quantity=name))
        .set_index("token_id")["value"]
        .reindex(choices["token_id"])
        for name in ("margin", "entropy")
    )
    clear = (1 - entropy).where(margin >= _AHEAD).fillna(0.0)
    row = found[found["token_id"] == clear.idxmax()].iloc[0].copy()
    row["clear"], row["is_word"] = float(clear.max()), bool(words.any())
    row["before"] = "".join(text[found["position"] < row["position"]])
    return row


@section("What is a router?")
def _router(view: View) -> None:
    info = view.run.site_info(view.layer, view.site)
    st.markdown(
        "A language model reads text in pieces, **tokens**, and applies its **layers** to each of "
        "them, one after the other. In a *mixture-of-experts* model a layer holds several small "
        f"networks, **experts**: here {info.n_experts} in layer {view.site_name}. A token visits "
        f"only {info.top_k} of them. The **router** chooses which: it scores every expert for the "
        "token and takes the best."
    )
    token = _example(view)
    if token is None:
        instead("This run keeps no single tokens, so the choice cannot be shown for one.")
        return
    token_id = int(token["token_id"])
    text = token["text"]
    st.markdown(
        f"Take this token: {plain(visible(token['before']))} "
        f":primary-background[{plain(visible(text, spaces=True))}]"
    )
    experts = ask(view, token_experts, token_id=token_id)
    here = view.here(experts)
    gates = ask(view, token_gates, token_id=token_id)
    gate = view.here(gates).iloc[0]
    st.markdown(
        routing_sentence(here, site_name=view.site_name, n_experts=info.n_experts)
        + " "
        + certainty_sentence(
            normalized_entropy=float(gate["normalized_entropy"]),
            margin=float(gate["margin"]),
            topk_mass=float(gate["topk_mass"]),
            n_experts=info.n_experts,
            top_k=info.top_k,
        )
    )
    scores = ask(view, token_scores, token_id=token_id, **view.place)
    if not scores["recorded"].any():
        return
    values, unit, baseline = probabilities(
        scores["score"].to_numpy(dtype="float64"), str(gate["score_function"])
    )
    table = scores.assign(value=values)
    chart(
        score_bars(
            table,
            layer=view.site_name,
            token_text=text,
            unit=unit,
            baseline=baseline,
            column="value",
            dark=is_dark(),
        ),
        key="scores",
        alt=f"Bars: the scores of all {len(scores)} experts for one token, highest first; the "
        "chosen ones in another colour.",
        table=table.drop(columns="recorded"),
    )
    st.page_link("explorer/pages/tokens/page.py", label="See every token of a prompt on **Tokens**")


@section("Who gets the work?")
def _load(view: View) -> None:
    sampled = view.sampled()
    load = ask(sampled, expert_load, weights=False, **sampled.filters)
    here = view.here(load)
    balance = balance_of(sampled, sampled.of_layers(load))
    row = view.here(balance).iloc[0]
    if not here["assignments"].sum():
        instead("These tokens have no assignment in this layer. Change the filters at the side.")
        return
    busiest = here.loc[here["assignments"].idxmax()]
    st.markdown(
        f"If all {len(here)} experts of layer {view.site_name} got the same, each would have its "
        f"**fair share**, 1 of {len(here)}. The busiest here, "
        f"{expert_label(view.site_name, int(busiest['expert_id']))}, has "
        f"**{number(busiest['ratio'], '.2f')}× its fair share**. Is that much? A router that "
        "threw dice would not be perfectly even either: with as many tokens, its busiest expert "
        f"would have {number(1 + row['max_violation_floor'], '.2f')}×. That is what **by chance** "
        "means on every page: compare with it before believing a pattern."
    )
    chart(
        load_bars(here, scope=sampled.scope(), layer=view.site_name, dark=is_dark()),
        key="load bars",
        alt=f"Bars: share of assignments of {len(here)} experts, busiest first; a fair share is "
        f"{1 / len(here):.1%}.",
        table=here.drop(columns=["n_experts", "top_k"]),
    )
    st.page_link("explorer/pages/load_balance/page.py", label="Measure it on **Load balance**")


@section("What is an expert for?")
def _specialisation(view: View) -> None:
    st.markdown(
        "Nobody tells an expert what to do; in training, each becomes better at what it happens to "
        "get. Some end up **specialised**: they take one kind of text far more often than others."
    )
    sampled = view.sampled()
    filters = sampled.filters | {"domain": None}
    found = ask(sampled, divergences, **filters)
    here = view.here(found)
    if here["divergence"].isna().all():
        instead("Domains are compared here, and the prompts of this run have fewer than two.")
        return
    special = here.loc[here["divergence"].idxmax()]
    expert = int(special["expert_id"])
    name = expert_label(view.site_name, expert)
    whole = view.filters | {"domain": None}
    table = ask(view, shares_of, expert_id=expert, by="domain", **view.place, **whole)
    rows, every = table.iloc[:-1].head(_SHOWN), table.iloc[-1]
    names = domain_labels(list(rows["domain"]))
    st.markdown(
        f"In layer {view.site_name} the most specialised one is **{name}**: "
        f"{number(rows['share'].iloc[0], '.0%')} of the tokens of "
        f"{plain(names[0])} choose it, and {number(every['share'], '.0%')} of "
        "all. The line through each dot is its **interval**: where the true share may well lie."
    )
    chart(
        interval_dots(
            rows.assign(
                label=names,
                value=rows["share"],
                hover=[f"{n}: {s:.1%}" for n, s in zip(names, rows["share"], strict=True)],
            ),
            DotsAxis(
                "share of the domain's tokens",
                float(every["share"]),
                f"all tokens {number(every['share'], '.1%')}",
            ),
            title=f"Who chooses {name} (share of the domain's tokens)",
            scope=view.scope(int(every["tokens"]))._replace(domain=None),
            dark=is_dark(),
        ),
        key="shares by domain",
        alt=f"Dots: share of each domain's tokens that choose {name}.",
        table=table,
    )
    st.page_link(
        "explorer/pages/experts/page.py",
        label=f"See what {name} takes on **Experts**",
        query_params={"layer": address.read("layer") or view.site_name, "id": str(expert)},
    )


@section("From layer to layer")
def _path(view: View) -> None:
    st.markdown(
        "Every layer has a router of its own, so a token takes a **path**: some experts in the "
        "first layer, others in the next. Expert 3 of one layer has nothing in common with expert "
        "3 of another, which is why they are called by both numbers, such as L2.E3."
    )
    token = _example(view)
    if token is None:
        instead("This run keeps no single tokens, so a path cannot be shown.")
        return
    experts = view.of_layers(ask(view, token_experts, token_id=int(token["token_id"])))
    chart(
        token_routes(experts, token_text=token["text"], dark=is_dark()),
        key="token routes",
        alt="Bars, one per layer: the experts of the token and their share of its weight.",
        table=experts,
    )
    st.page_link("explorer/pages/flow/page.py", label="See the paths of all tokens on **Flow**")


@section("Which page answers what?")
def _which_page(_view: View) -> None:
    st.markdown(
        "The filters at the side act on all pages: phase, domain, a text that prompts contain, a "
        "saved slice, and the layers. The address in your browser holds all of it, so a link shows "
        "somebody else what you see. Every figure has its numbers as a table below it, and a **?** "
        "that explains it here."
    )
    for name, question in _PAGES.items():
        left, right = st.columns([1, 4], vertical_alignment="center")
        with left:
            _link(name)
        right.markdown(question)


def _link(name: str, title: str = "") -> None:
    path, title = f"explorer/pages/{name}/page.py", title or name.replace("_", " ").capitalize()
    try:
        st.page_link(path, label=f"**{title}**")
    except StreamlitPageNotFoundError:
        # nobody records on a read-only server
        st.markdown(f"**{title}** (not on this server)")


@section("Your own text")
def _yours(_view: View) -> None:
    st.markdown(
        "Now with words of yours: the demo model itself runs in this frame. Type, change a word, "
        "force or forbid an expert, and see at every key where each token goes. It needs no "
        "server: the file works on its own, and offline."
    )
    theme = "dark" if is_dark() else "light"
    there = guard.base_path() + playground.ADDRESS
    own, file, record = st.columns(3)
    own.link_button("Open it in a tab", there, icon=":material/open_in_new:", width="stretch")
    file.download_button(
        "Download it (13 MB)",
        playground.document,
        "router.html",
        "text/html",
        on_click="ignore",
        icon=":material/download:",
        width="stretch",
    )
    with record:
        _link("capture", "Record your prompts as a run")
    st.iframe(
        f"{there}#embedded&theme={theme}",
        height=_PLAYGROUND_HEIGHT,
        alt="The demo model: a field for text, and the experts of every token below it.",
    )


@section("Glossary")
def _glossary() -> None:
    st.subheader("Glossary", anchor="glossary")
    terms = sorted((TERMS[name] for name in TERMS), key=lambda term: term.title.lower())
    half = -(-len(terms) // 2)
    for column, shown in zip(st.columns(2, gap="large"), (terms[:half], terms[half:]), strict=True):
        with column:
            for term in shown:
                st.markdown(f"**{term.title}**: {term.text}")


render()
