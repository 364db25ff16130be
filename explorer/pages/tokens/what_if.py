"""What if: change the routing of the text, and see what the model would have done."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from capture.errors import cut
from explorer import writing
from explorer.errors import ExplorerError
from explorer.pages.tokens.data import prompt_experts
from explorer.pages.tokens.figures import changed_routing, loss_lines, next_token_bars
from explorer.router_cards import CARDS, parse_router
from explorer.text import counted, plain, visible
from explorer.ui import address, printing, problems, saved
from explorer.ui.chart import chart, tile
from explorer.ui.job import follow, wait_for
from explorer.ui.problems import in_callback, instead, section
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import Scope, expert_label, number, span, token_name
from explorer.worker import Job, WhatIfRequest, shared_worker
from explorer.worker.interventions import (
    KINDS,
    Edit,
    answer_path,
    kind_of,
    read_answer,
    read_edits,
    write_edits,
)
from explorer.worker.requests import DEMO_MODEL

_OWN = "the model's own"
_ACTIONS = {"forbid": "Forbid", "force": "Force", "swap": "Swap", "k": "Number of experts"}
_MOMENT = 2.0  # seconds that an answer is waited for before its progress is shown
_LONGEST = 200  # characters of a router with its arguments


def what_is_asked() -> dict[str, str]:
    """Return what of the address this part of the page changes."""
    return {name: address.read(name) for name in ("token", "edits", "rule")}


@st.fragment
def what_if_section(
    view: View, listed: pd.DataFrame, token: pd.Series, asked: dict[str, str]
) -> None:
    """Draw the controls, and the answer where there is one.

    A change is answered in this part alone: the rest of the page shows what was recorded.

    Parameters
    ----------
    listed : DataFrame
        All tokens of the prompt, from ``data.tokens``.
    token : Series
        The chosen one of them.
    asked : dict of str to str
        From ``what_is_asked``, when the page was drawn.
    """
    now = what_is_asked()
    # the text above shows the chosen token, and the top of the page which saved view this is
    if now["token"] != asked["token"] or (saved.is_open() and now != asked):
        st.rerun()
    # a part that is drawn alone is not within the page's own
    with problems.shown():
        _what_if(view, listed, token)


@section("What if")
def _what_if(view: View, listed: pd.DataFrame, token: pd.Series) -> None:
    st.subheader("What if its routing were another?", anchor=False)
    position = int(token["position"])
    st.markdown(
        "Change where tokens go and run the model again; what is chosen again follows the model's "
        f"own scores. The next token is looked at after token {position}, "
        f"“{plain(token_name(token['text']))}”."
    )
    try:
        edits = read_edits(address.read("edits"), view.run.sites, n_tokens=len(listed))
    except ExplorerError as error:
        address.note(f"The link's changes of the routing could not be followed. {error}")
        address.write("edits", "")
        edits = []
    may = writing.may_write()
    router = _router(may)
    named = str(view.run.info["model"])
    asked = WhatIfRequest(
        "",
        str(view.run.path),
        int(listed.attrs["prompt_id"]),
        position,
        write_edits(edits),
        router,
        named,
    )
    allowed = may and (
        named == DEMO_MODEL
        or st.checkbox(
            f"Load the model {plain(cut(named, 120))}",
            help="The run names it. It is loaded on the machine that runs this app, and downloaded "
            "first if it is not there.",
            key=f"what if loads {named}",
        )
    )
    if may:
        if allowed:
            _make_ready(view, asked)
        _add(view, listed, token, edits, asked, allowed=allowed)
    _listed(view, listed, edits, asked, may=may, allowed=allowed)
    if not edits and not router:
        instead("Nothing is changed yet.")
        return
    answer = read_answer(_path(view, asked))
    if answer is None and allowed and _is_the_same_elsewhere(asked):
        _ask(view, asked)
    if answer is None and (job := _job(view, asked)) is not None:
        wait_for(job.job_id, seconds=_MOMENT)
        answer = read_answer(_path(view, asked))
    if answer is None:
        _missing(view, asked, may=may, allowed=allowed)
    elif answer["tokens"] != listed["token"].tolist()[: len(answer["tokens"])]:
        instead("The answer that was kept is of another text. Delete it from the cache folder.")
    else:
        _show(view, listed, answer)


def _router(may: bool) -> str:
    """Draw the choice of another router; return it as the address has it, "" = the model's own."""
    offered = [
        name
        for name, card in sorted(CARDS.items(), key=lambda item: (item[1].family, item[0]))
        if card.part == "expert"
        and card.fits != "trained"
        and not card.shelved
        and name != "native"
    ]
    asked = address.read("rule")[:_LONGEST]
    if asked:
        try:
            if parse_router(asked).name not in offered:
                raise ExplorerError("it is not in the list of routers that choose experts")
        except ExplorerError as error:
            address.note(f"The link's router {asked[:60]} is left out: {error}")
            address.write("rule", "")
            asked = ""
    if not may:
        st.caption(f"Router of all layers: {plain(asked or _OWN)}.")
        return asked
    names = [_OWN, *offered, *([asked] if asked and asked not in offered else [])]
    key = "address:rule"
    st.session_state[key] = asked or _OWN

    def changed() -> None:
        new = st.session_state[key]
        address.write("rule", "" if new == _OWN else new)

    st.selectbox(
        "Router of all layers",
        names,
        key=key,
        format_func=lambda name: name if name not in CARDS else f"{CARDS[name].title} · {name}",
        on_change=changed,
        help="Routers that learn are fitted first, which takes a while. With arguments: write them "
        "into the address, such as rule=top_p(p=0.5).",
    )
    return asked


def _add(
    view: View,
    listed: pd.DataFrame,
    token: pd.Series,
    edits: list[Edit],
    asked: WhatIfRequest,
    *,
    allowed: bool,
) -> None:
    """Draw what a change is made of, and the button that adds it."""
    position, info = int(token["position"]), view.run.site_info(view.layer, view.site)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        action = st.selectbox(
            "Change",
            list(_ACTIONS),
            format_func=_ACTIONS.__getitem__,
            key="what if action",
            width=180,
        )
        value, other, layer = _what(view, asked.prompt_id, token, action, info.n_experts)
        words = {
            f"t{position}": f"this token ({position})",
            f"from{position}": "this token and later ones",
            f"like{position}": f"tokens like “{token_name(token['text'])}”",
            "all": "all tokens",
            **{kind: f"every {kind}" for kind in KINDS if kind in _kinds(listed)},
        }
        where = st.selectbox(
            "For", list(words), format_func=words.__getitem__, key="what if where", width=230
        )
        new = Edit(action, layer, value, other, where)
        st.button(
            "Add and run" if allowed else "Add",
            type="primary",
            on_click=_change,
            args=(view, asked, [*edits, new], allowed),
            disabled=other == value or new in edits,
        )


def _what(
    view: View, prompt_id: int, token: pd.Series, action: str, n_experts: int
) -> tuple[int, int | None, str]:
    """Draw the choice of experts, or of their number; return it with the layer."""
    if action == "k":
        layer = st.selectbox(
            "In",
            [view.site_name, "*"],
            key="what if layers",
            width=140,
            format_func=lambda name: "all layers" if name == "*" else f"layer {name}",
        )
        top_k = view.run.site_info(view.layer, view.site).top_k
        k = st.number_input(
            "Experts a token", 1, n_experts, max(1, top_k - 1), key="what if k", width=140
        )
        return int(k), None, str(layer)
    found = ask(view, prompt_experts, prompt_id=prompt_id, **view.place)
    mine = found[found["token_id"] == token["token_id"]]["expert_id"].astype(int).tolist()
    order = [*mine, *(e for e in range(n_experts) if e not in mine)]
    if action == "force":
        order = [*order[len(mine) :], *mine]
    shown = {
        e: expert_label(view.site_name, e) + (" · its own" if e in mine else "") for e in order
    }
    value = st.selectbox(
        "Expert", order, format_func=shown.__getitem__, key=f"what if {action}", width=170
    )
    if action != "swap":
        return int(value), None, view.site_name
    others = [e for e in [*order[len(mine) :], *mine] if e != value]
    other = st.selectbox(
        "Gives way to", others, format_func=shown.__getitem__, key="what if other", width=170
    )
    return int(value), int(other), view.site_name


def _kinds(listed: pd.DataFrame) -> set[str]:
    return {kind_of(text) for text in listed["text"] if isinstance(text, str)}


def _listed(
    view: View,
    listed: pd.DataFrame,
    edits: list[Edit],
    asked: WhatIfRequest,
    *,
    may: bool,
    allowed: bool,
) -> None:
    """Draw the changes in force, each with a button that takes it out."""
    for at, edit in enumerate(edits):
        left, right = st.columns([8, 1], vertical_alignment="center")
        left.markdown(f"{at + 1}. {plain(_said(edit, listed))}")
        if may:
            rest = edits[:at] + edits[at + 1 :]
            right.button(
                "",
                icon=":material/close:",
                help="Take this change out",
                key=f"what if out {at}",
                on_click=_change,
                args=(view, asked, rest, allowed),
            )


def _said(edit: Edit, listed: pd.DataFrame) -> str:
    """Return an edit as a sentence, not escaped."""
    digits = "".join(filter(str.isdecimal, edit.where))
    name = ""
    if digits:
        text = listed[listed["position"] == int(digits)]["text"]
        name = token_name(text.iloc[0] if len(text) else None)
    words = {
        "t": f"token {digits} (“{name}”)",
        "from": f"token {digits} and later ones",
        "like": f"tokens like “{name}”",
        "all": "all tokens",
    }
    kind = edit.where.removesuffix(digits)
    where = words.get(kind, f"every {kind}")
    if edit.action == "k":
        place = "all layers" if edit.layer == "*" else f"layer {edit.layer}"
        return f"{counted(edit.value, 'expert')} in {place} for {where}"
    expert = expert_label(edit.layer, edit.value)
    if edit.action == "swap" and edit.other is not None:
        return f"{expert_label(edit.layer, edit.other)} in the place of {expert} for {where}"
    return f"{_ACTIONS[edit.action]} {expert} for {where}"


def _path(view: View, asked: WhatIfRequest) -> Path:
    return answer_path(view.run, asked.prompt_id, asked.position, asked.edits, asked.router)


@in_callback
def _change(view: View, asked: WhatIfRequest, edits: list[Edit], run: bool) -> None:
    """Put other changes into the address, and run them where that is allowed."""
    text = write_edits(edits)
    address.write("edits", text)
    if run and (text or asked.router):
        _run(view, replace(asked, edits=text))


@in_callback
def _run(view: View, asked: WhatIfRequest) -> None:
    if read_answer(_path(view, asked)) is None:
        _ask(view, asked)


def _ask(view: View, asked: WhatIfRequest) -> None:
    writing.submit(replace(asked, out=str(_path(view, asked))))


def _newest() -> WhatIfRequest | None:
    """Return what the worker was asked last, if it was of this kind: its model is loaded still."""
    jobs = shared_worker().jobs()
    newest = jobs[0].request if jobs else None
    return newest if isinstance(newest, WhatIfRequest) else None


def _is_the_same_elsewhere(asked: WhatIfRequest) -> bool:
    """Whether the changes were answered just now, and only another token is looked at."""
    newest = _newest()
    return newest is not None and replace(newest, out="", position=asked.position) == asked


def _make_ready(view: View, asked: WhatIfRequest) -> None:
    """Load the model and read the text while the first change is thought of."""
    newest = _newest()
    ready = newest is not None and (newest.run, newest.prompt_id) == (asked.run, asked.prompt_id)
    if not ready and not any(job.active for job in shared_worker().jobs()):
        _ask(view, replace(asked, edits="", router=""))


def _job(view: View, asked: WhatIfRequest) -> Job | None:
    """Return the newest job that answers, if there was one."""
    path = str(_path(view, asked))
    return next((job for job in shared_worker().jobs() if job.request.out == path), None)


def _missing(view: View, asked: WhatIfRequest, *, may: bool, allowed: bool) -> None:
    """Follow the job that answers, or say what is needed for one."""
    job = _job(view, asked)
    if job is not None:
        follow(job.job_id, key="what if")
        if job.active:
            return
    if not may:
        instead(
            "Not available: nobody who may run the model here has looked at this change yet. "
            "Answers that were made once are shown to everybody, and in reports made after that."
        )
        return
    st.button("Run it", on_click=_run, args=(view, asked), disabled=not allowed)


def _show(view: View, listed: pd.DataFrame, answer: dict[str, Any]) -> None:
    """Draw an answer."""
    before, after = (np.array(answer["losses"][name]) for name in ("before", "after"))
    position, n_tokens = int(answer["position"]), len(answer["tokens"])
    # kept answers may be of a text that is shown in part
    rows = listed.head(n_tokens)
    scope = Scope(n_tokens, complete=bool(view.run.info["complete"]))
    changed = _changed(answer, rows)
    sets = changed.groupby("position")["value"].max() > 0
    # how long it took says nothing on paper
    on_screen = printing.theme() is None
    tiles = st.columns(4 if on_screen else 3)
    tile(
        tiles[0],
        "Loss, before",
        number(before.mean(), ".3f"),
        "nats a token",
        about="Of all tokens of the text that follow another.",
    )
    tile(
        tiles[1],
        "Loss, after",
        number(after.mean(), ".3f"),
        f"{after.mean() - before.mean():+.3f} nats a token",
        about="The same tokens.",
    )
    tile(
        tiles[2],
        "Tokens rerouted",
        f"{int(sets.sum()):,}",
        f"of {n_tokens:,}, in any layer",
        about="Whose set of experts is another one in at least one layer.",
    )
    if on_screen:
        tile(
            tiles[3],
            "Time to answer",
            f"{answer['seconds']:.2f} s",
            f"{answer['cpu_seconds']:.2f} s of computing",
            about="In the worker. The first answer loads the model.",
        )
    left, right = st.columns([3, 2], gap="large")
    with left:
        losses = rows.iloc[1:].assign(before=before, after=after)
        losses = losses[["position", "text", "before", "after"]]
        chart(
            loss_lines(losses, place=position, scope=scope, dark=is_dark()),
            key="what if losses",
            alt=f"Lines: the loss of {counted(len(losses), 'token')} before and after, changes "
            f"{span(after - before, '+.2f')} nats.",
            table=losses,
        )
        place = int((rows["position"] == position).to_numpy().argmax())
        chart(
            changed_routing(changed, scope=scope, start=max(0, place - 60), dark=is_dark()),
            key="what if routing",
            alt="Heatmap of tokens by layers: the share of each token's experts that changed, "
            f"{span(changed['value'], '.0%')}. Click: the token.",
            table=changed.drop(columns="token_id"),
            on_click=lambda data: address.write("token", str(int(data[2]))),
        )
    with right:
        likely = pd.DataFrame(answer["next"]).sort_values("before", ascending=False)
        chart(
            next_token_bars(likely, scope=scope, dark=is_dark()),
            key="what if next",
            alt=f"Bars: probabilities of {counted(len(likely), 'next token')} before and after.",
            table=likely,
        )
        st.markdown("**What the model writes on from the chosen token**")
        for name in ("before", "after"):
            st.caption(name.capitalize())
            with st.container(border=True):
                st.markdown(plain(visible(str(answer["written"][name]), running=True), lines=True))


def _changed(answer: dict[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """Return the share of each token's experts that are others now, site after site."""
    parts = []
    for site in answer["routing"]:
        shares = []
        for old, new in zip(site["before"], site["after"], strict=True):
            was, now = ({e for e in one if e >= 0} for one in (old, new))
            shares.append(1 - len(was & now) / max(len(was), len(now), 1))
        parts.append(
            rows[["token_id", "position", "text"]].assign(
                layer=site["layer"], site=site["site"], value=shares
            )
        )
    return pd.concat(parts, ignore_index=True)
