"""Capture: from prompts to a run that can be looked at."""

from typing import Any, NamedTuple

import pandas as pd
import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from capture.errors import PromptError
from capture.paths import RUN_NAMES, RUN_SUFFIX, is_run_name, suggested_name
from capture.prompts import Prompt, read_prompts
from capture.recorder.estimate import human_bytes
from capture.traces.formats import NAMES
from capture.traces.importing import MAX_EXPERTS
from capture.traces.sequences import MAX_TOP_K
from explorer import writing
from explorer.errors import ExplorerError
from explorer.pages.capture.form import ask, ask_level
from explorer.text import counted, one_line, plain
from explorer.ui import address, problems
from explorer.ui.job import as_record, follow, typed_prompts, uploaded_prompts
from explorer.ui.problems import instead
from explorer.ui.state import exists, new_name, run_names, runs_folder
from explorer.worker import CaptureRequest, Job, RecoverRequest, shared_worker
from explorer.worker.capture_cost import cost

PREVIEWED = 6
_SOURCES = {"type": "Type", "upload": "Upload a file", "demo": "Demo prompts"}
_DEMO, _OTHER = "demo", "other"
_RECORD, _IMPORT = "Record prompts", "Import routing"
_IMPORTED = "imported run"
_EXAMPLE = (
    "The court held that the contract was void.\n"
    "def mean(values): return sum(values) / len(values)\n"
    "Der Zug nach Hamburg fährt um acht Uhr."
)


class Plan(NamedTuple):
    """What the form says."""

    prompts: list[Prompt]
    model: str
    options: dict[str, Any]
    name: str
    problem: str


def render() -> None:
    """Draw the page."""
    what = st.segmented_control(
        "What to do",
        [_RECORD, _IMPORT],
        default=_RECORD,
        required=True,
        label_visibility="collapsed",
        key="what to do",
    )
    if what == _IMPORT:
        _import()
        return
    st.markdown(
        "Let a model read prompts and record what its routers do. The result is a **run**: one "
        "file in the runs folder, which the other pages show."
    )
    left, right = st.columns([3, 2], gap="large")
    with left:
        prompts = _prompts()
        model = _model()
        plan = _options(prompts, model)
        _start(plan)
    with right:
        _jobs()
        _unfinished()


def _import() -> None:
    """Take files of another program's trace, say what they hold, and make a run of them."""
    st.markdown(
        "Take in routing that **another program** recorded or counted: vLLM, SGLang, TensorRT-LLM, "
        "Megatron, llama.cpp, rollouts, or a table. The file is looked at first; what it does not "
        "hold is said, and will be missing in the run."
    )
    left, right = st.columns([3, 2], gap="large")
    with left:
        given = st.file_uploader(
            "Files of one trace; those of several ranks or layers together",
            accept_multiple_files=True,
            max_upload_size=writing.MAX_UPLOAD,
            key="trace upload",
            help="What a pickle would run is never loaded.",
        )
        first, second, third = st.columns(3)
        options: dict[str, Any] = {
            "format": first.selectbox(
                "Format", [None, *NAMES], format_func=_format, key="trace format"
            ),
            "n_experts": second.number_input(
                "Experts of a layer",
                1,
                MAX_EXPERTS,
                None,
                placeholder="as found",
                key="trace experts",
            ),
            "top_k": third.number_input(
                "Experts of a token", 1, MAX_TOP_K, None, placeholder="as found", key="trace top k"
            ),
        }
    with right:
        if given:
            _look(given, options)
        if said := st.session_state.pop(_IMPORTED, None):
            st.success(plain(said[1]), icon=":material/check_circle:")
            if st.button("Open the run", type="primary", key="open import"):
                st.switch_page("explorer/pages/overview/page.py", query_params={"run": said[0]})


def _format(name: str | None) -> str:
    return name or "found out"


def _look(given: list[UploadedFile], options: dict[str, Any]) -> None:
    names = tuple(f"{one.name} {one.file_id}" for one in given)
    try:
        with st.spinner("Looking at the trace…"):
            found = _recognised(names, options, given)
    except ExplorerError as error:
        problems.show(error)
        return
    k = f"{found['top_k']} of {found['n_experts']}"
    if found["top_k"] is None:
        k = f"an unknown number of {found['n_experts']}"
    rows = "assignments" if found["level"] == "counts" else "tokens"
    st.subheader("What was recognised", anchor=False)
    st.markdown(
        f"**{plain(found['format'])}**: {found['rows']:,} {rows}, "
        f"{counted(found['layers'], 'layer')} with experts, {k} experts a token. "
        f"The run will be of level `{found['level']}`."
    )
    st.markdown(f"**It will not have** {plain('; '.join(found['lacks']))}.")
    keep = False
    if found["warm_up"]:
        keep = st.checkbox(
            f"Keep {found['warm_up']:,} equal rows at the head (an engine's warm-up)",
            key="trace warm-up",
        )
    if found["top_k"] is None:
        instead("Say how many experts a token visits: num_experts_per_tok in the model's config.")
        return
    wish = suggested_name(given[0].name.rpartition(".")[0] or given[0].name)
    key = f"trace name {given[0].file_id}"
    st.text_input("Name of the run", new_name(runs_folder(), wish), key=key)
    st.button(
        "Import",
        type="primary",
        on_click=_keep,
        args=(given, options | {"keep_warm_up": keep}, key),
    )


def _files(given: list[UploadedFile]) -> list[tuple[str, Any]]:
    for one in given:
        one.seek(0)
    return [(one.name, one) for one in given]


@st.cache_data(max_entries=8, show_spinner=False)
def _recognised(
    names: tuple[str, ...], options: dict[str, Any], _given: list[UploadedFile]
) -> dict[str, Any]:
    return writing.read_trace(runs_folder(), None, _files(_given), **options)


@problems.in_callback
def _keep(given: list[UploadedFile], options: dict[str, Any], key: str) -> None:
    name = str(st.session_state[key]).strip()
    found = writing.read_trace(runs_folder(), name, _files(given), **options)
    st.session_state[_IMPORTED] = name, f"{name}: {found['made']}"


def _prompts() -> list[Prompt]:
    st.subheader("1 · Prompts", anchor=False)
    source = st.segmented_control(
        "Where the prompts come from",
        list(_SOURCES),
        default="type",
        required=True,
        format_func=_SOURCES.__getitem__,
        label_visibility="collapsed",
        key="source",
    )
    try:
        prompts = _read(source or "type")
    except PromptError as error:
        problems.show(error)
        return []
    if prompts and source != "type":
        _preview(prompts)
    return prompts


def _read(source: str) -> list[Prompt]:
    if source == "demo":
        return _demo_prompts()
    if source == "upload":
        return uploaded_prompts("upload")
    label = "Prompts, one a line (or blocks between blank lines)"
    return typed_prompts(label, "typed", height=150, example=_EXAMPLE)


@st.cache_data(max_entries=1, show_spinner=False)
def _demo_prompts() -> list[Prompt]:
    return read_prompts("demo")


def _preview(prompts: list[Prompt]) -> None:
    domains = sorted({prompt.domain for prompt in prompts if prompt.domain})
    texts = [one_line(_shown(prompt), 120) for prompt in prompts[:PREVIEWED]]
    st.dataframe(
        pd.DataFrame({"domain": [p.domain or "" for p in prompts[:PREVIEWED]], "text": texts}),
        hide_index=True,
        alt="The first prompts",
        column_config={"domain": st.column_config.TextColumn("Domain", width=90), "text": "Text"},
    )
    more = f"The first {PREVIEWED} of " if len(prompts) > PREVIEWED else ""
    of = f" of {counted(len(domains), 'domain')}" if domains else ", without a domain"
    st.caption(f"{more}{counted(len(prompts), 'prompt')}{of}.")


def _shown(prompt: Prompt) -> str:
    """Return the text of a prompt, or the beginning of its conversation."""
    if prompt.messages is None:
        return prompt.text or ""
    said = (f"{message['role']}: {message['content'][:200]}" for message in prompt.messages[:5])
    return " · ".join(said)


def _model() -> str:
    st.subheader("2 · Model", anchor=False)
    kind = st.radio(
        "Model",
        [_DEMO, _OTHER],
        format_func={_DEMO: "Demo model", _OTHER: "Another model"}.__getitem__,
        captions=[
            "Comes with RouteScope; runs in seconds.",
            "From the Hugging Face hub or a folder.",
        ],
        horizontal=True,
        label_visibility="collapsed",
        key="model kind",
    )
    if kind == _DEMO:
        return "demo"
    model = st.text_input(
        "Hub id or folder", placeholder="allenai/OLMoE-1B-7B-0125", key="model name"
    ).strip()
    st.warning(
        "The model is loaded on the machine that runs this app, and is downloaded first if it is "
        "not there: that can take many gigabytes and minutes. Only safetensors weights are "
        "loaded and no code of the model's authors is run.",
        icon=":material/warning:",
    )
    return model


def _options(prompts: list[Prompt], model: str) -> Plan:
    st.subheader("3 · What to record", anchor=False)
    level = ask_level()
    attention, problem = ask(st.columns(3), attention=True) if level == "attention" else ({}, "")
    *columns, last = st.columns(3)
    every, _ = ask(columns, attention=False)
    wish = "mine" if model == "demo" else suggested_name(model.split("/")[-1])
    name = last.text_input(
        "Name of the run",
        value=new_name(runs_folder(), wish),
        help="Letters, digits, dots, dashes and underscores.",
        key=f"name {len(run_names())} {model}",
    ).strip()
    return Plan(prompts, model, {"level": level, **every, **attention}, name, problem)


def _start(plan: Plan) -> None:
    problem = _problem(plan)
    if plan.prompts and plan.model:
        st.info(_cost_text(plan), icon=":material/database:")
    if problem:
        st.caption(problem)
    if st.button("Start capture", type="primary", disabled=bool(problem), key="start"):
        out = runs_folder() / f"{plan.name}{RUN_SUFFIX}"
        records: list[dict[str, Any]] = [as_record(prompt) for prompt in plan.prompts]
        request = CaptureRequest(str(out), plan.model, records, **plan.options)
        job = writing.submit(request)
        address.write("job", str(job.job_id))
        st.rerun()


def _problem(plan: Plan) -> str:
    if not plan.prompts:
        return "Give at least one prompt to start."
    if not plan.model:
        return "Name a model to start."
    if plan.model == _DEMO and any(prompt.messages for prompt in plan.prompts):
        return "The demo model has no template for conversations. Name a chat model to start."
    if plan.problem:
        return plan.problem
    if not is_run_name(plan.name):
        return f"{RUN_NAMES}."
    if plan.name != new_name(runs_folder(), plan.name):
        return f"There is a run named {plan.name} already; runs are never overwritten."
    return ""


def _cost_text(plan: Plan) -> str:
    found = _cost(plan)
    if found is None:
        return (
            "The size of the run is not known before the model is loaded; it is then shown under "
            "the progress bar, and nothing is recorded if the disk is too small."
        )
    estimate, exact = found
    per_token = ", ".join(f"{name} {v:,.0f} B" for name, v in estimate.bytes_per_token.items())
    sample = ""
    if estimate.sample_tokens:
        size = human_bytes(estimate.sample_bytes)
        sample = f", of which {size} for the sample of {counted(estimate.sample_tokens, 'token')}"
    attention = ""
    if estimate.attended_prompts:
        attention = (
            f"{' and' if sample else ', of which'} {human_bytes(estimate.attention_bytes)} for "
            f"the attention of {counted(estimate.attended_prompts, 'prompt')}"
        )
    read = f"{'' if exact else 'about '}{counted(estimate.tokens, 'token')}"
    return (
        f"**{counted(len(plan.prompts), 'prompt')}, {read}: about "
        f"{human_bytes(estimate.total_bytes)}**{sample}{attention}.  \n"
        f"Per token by level: {per_token}."
    )


@st.cache_data(max_entries=4, show_spinner=False)
def _cost(plan: Plan) -> Any:
    return cost(plan.model, plan.prompts, **plan.options)


def _jobs() -> None:
    st.subheader("Captures", anchor=False)
    # a map or a comparison is not a capture
    kinds = (CaptureRequest, RecoverRequest)
    jobs = {
        str(job.job_id): job for job in shared_worker().jobs() if isinstance(job.request, kinds)
    }
    chosen = address.read("job")
    if chosen and chosen not in jobs:
        instead("The capture of this link is not known any more: the app was restarted since.")
        address.write("job", "")
    first = jobs.get(chosen) or next((job for job in jobs.values() if job.active), None)
    if first is None and not jobs:
        st.caption("None yet since the app was started.")
    if first is not None:
        ended = follow(first.job_id, key="capture")
        if ended is not None and ended.path and exists(ended.path):
            _open_button(ended, primary=True)
    others = [job for job in jobs.values() if first is None or job.job_id != first.job_id]
    if others:
        more = "capture" if first is None else "more capture"
        title = f"{counted(len(others), more)} since the app was started"
        with st.expander(title, expanded=first is None):
            for job in others:
                _one_line(job)


def _one_line(job: Job) -> None:
    left, right = st.columns([3, 1], vertical_alignment="center")
    left.markdown(f"**{plain(job.request.title)}** · {job.state}")
    with right:
        if job.active:
            if st.button("Stop", key=f"stop {job.job_id}", width="stretch"):
                writing.cancel(job.job_id)
                st.rerun()
        elif job.path and exists(job.path):
            _open_button(job, primary=False)


def _open_button(job: Job, *, primary: bool) -> None:
    if st.button(
        "Open the run" if primary else "Open",
        type="primary" if primary else "secondary",
        key=f"open {job.job_id}",
    ):
        st.switch_page("explorer/pages/tokens/page.py", query_params={"run": job.request.title})


def _unfinished() -> None:
    """Offer to close the files that killed captures left behind."""
    running = {job.request.out for job in shared_worker().jobs() if job.active}
    files = writing.own_files(runs_folder(), f"*{RUN_SUFFIX}.partial")
    left = [f for f in files if str(f).removesuffix(".partial") not in running]
    if not left:
        return
    st.subheader("Unfinished captures", anchor=False)
    st.caption("Files of captures that were killed, or that another program is writing now.")
    for path in left:
        name, button = st.columns([3, 1], vertical_alignment="center")
        name.markdown(f"**{plain(path.name)}** · {human_bytes(path.stat().st_size)}")
        if button.button("Recover", key=f"recover {path.name}", width="stretch"):
            job = writing.submit(RecoverRequest(str(path)))
            address.write("job", str(job.job_id))
            st.rerun()


render()
