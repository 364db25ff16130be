"""A job of the worker on a page: prompts for it, how far it is, and how it ended."""

import time
from typing import Any

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from capture.progress import Progress
from capture.prompt_rows import COMPRESSIONS, FORMATS
from capture.prompts import Prompt, PromptList, read_prompts_bytes
from explorer import writing
from explorer.text import counted, duration, plain
from explorer.ui import problems
from explorer.ui.problems import instead
from explorer.worker import Job, shared_worker
from explorer.worker.uploads import read_upload

POLL_SECONDS = 0.5
_LOOK_SECONDS = 0.02  # between two looks at a job that is waited for
# offered to choose from; what fits is named where a file is not UTF-8
_ENCODINGS = (
    *("utf-8", "windows-1252", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "shift_jis"),
    *("euc_kr", "windows-1251"),
)
_STAGES = {
    "starting": "Starting the worker process",
    "loading": "Loading",
    "self-test": "Checking that every router can be recorded",
    "recording": "Recording",
    "writing": "Closing the run file",
    "mapping": "Working",
    "done": "Done",
}


def follow(job_id: int, *, key: str) -> Job | None:
    """Show a job until it ends; return it when it has ended, after saying how.

    While the job is active, the page asks twice a second and draws only this part again; when it
    ends, the whole page runs again.
    """
    job = shared_worker().job(job_id)
    if job is None:
        instead("This job is not known any more: the app was restarted since.")
        return None
    if job.active:
        _watch(job_id, key)
        return None
    _show_end(job)
    return job


def wait_for(job_id: int, *, seconds: float) -> None:
    """Wait until a job has ended, or for some seconds.

    For jobs that answer in a moment: whoever waits here shows the answer in the same run of the
    script, and the browser draws once.
    """
    worker, until = shared_worker(), time.monotonic() + seconds
    while time.monotonic() < until:
        job = worker.job(job_id)
        if job is None or not job.active:
            return
        time.sleep(_LOOK_SECONDS)


@st.fragment(run_every=POLL_SECONDS)
def _watch(job_id: int, key: str) -> None:
    # a part that is drawn alone is not within the page's own
    with problems.shown():
        _draw(job_id, key)


def _draw(job_id: int, key: str) -> None:
    job = shared_worker().job(job_id)
    if job is None or not job.active:
        st.rerun()
        return
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.markdown(f"**{plain(job.request.title)}** · {_headline(job)}")
        if writing.may_write() and right.button(
            "Stop", key=f"stop {key}", disabled=job.cancelling, width="stretch"
        ):
            writing.cancel(job_id)
            st.rerun(scope="fragment")
        st.progress(fraction(job.progress), text=_figures(job.progress))
        if job.progress.message:
            st.caption(plain(job.progress.message))


def fraction(progress: Progress) -> float:
    """Return how much of a job is done, 0..1; loading and closing take a small part."""
    if progress.part is not None:
        return min(1.0, max(0.0, progress.part))
    if progress.stage == "recording" and progress.tokens_total:
        return 0.1 + 0.85 * min(1.0, progress.tokens_done / progress.tokens_total)
    if progress.stage == "comparing" and progress.total:
        return progress.done / progress.total
    return {"loading": 0.03, "self-test": 0.08, "writing": 0.97, "done": 1.0}.get(
        progress.stage, 0.0
    )


def _headline(job: Job) -> str:
    if job.cancelling:
        return "stopping after the current forward pass…"
    if job.state == "queued":
        return "waiting for the job before it…"
    return _STAGES.get(job.progress.stage, "Working") + "…"


def _figures(progress: Progress) -> str:
    left = progress.seconds_left
    if progress.stage != "recording" or not progress.tokens_total:
        return " " if left is None else f"about {duration(left)} left"
    text = f"{progress.tokens_done:,} of {counted(progress.tokens_total, 'token')}"
    if progress.tokens_per_second:
        text += f" · {progress.tokens_per_second:,.0f} tokens/s"
    if left is not None:
        text += f" · about {left:.0f} s left"
    return text


def _show_end(job: Job) -> None:
    name = plain(job.request.title)
    if job.state == "done":
        tokens = job.progress.tokens_done
        recorded = f": {counted(tokens, 'token')} recorded" if tokens else ""
        st.success(f"**{name}** is ready{recorded}.", icon=":material/check_circle:")
    elif job.state == "cancelled":
        kept = " What was recorded until then is kept." if job.path else ""
        st.warning(f"**{name}** was stopped.{kept} {plain(job.error)}", icon=":material/stop:")
    else:
        st.error(f"**{name}** failed. {plain(job.error)}", icon=":material/error:")


def typed_prompts(label: str, key: str, *, height: int, example: str | None = None) -> list[Prompt]:
    """Draw a field for prompts and return those in it; PromptError where they cannot be read."""
    text = st.text_area(label, height=height, placeholder=example, key=key)
    return read_prompts_bytes("typed.txt", text.encode()) if text.strip() else []


def uploaded_prompts(key: str) -> list[Prompt]:
    """Draw a field for a file and return its prompts; PromptError where it cannot be read."""
    upload = st.file_uploader(
        "A file of prompts",
        type=[ending.removeprefix(".") for ending in (*FORMATS, *COMPRESSIONS)],
        help="txt: one prompt a line, or blocks between blank lines. csv, tsv, jsonl, json, "
        "parquet: a column `text`, and `domain` if you like; or conversations (`messages`, "
        "ShareGPT), `prompt` and `completion`, Alpaca. Each may be compressed (gz, xz, zst).",
        key=key,
    )
    if upload is None:
        return []
    columns = st.columns(3)
    text_column = columns[0].text_input(
        "Column of the prompts", placeholder="found by itself", key=f"{key} text column"
    )
    domain_column = columns[1].text_input(
        "Column of the domains", placeholder="domain", key=f"{key} domain column"
    )
    encoding = columns[2].selectbox("Encoding of the file", _ENCODINGS, key=f"{key} encoding")
    prompts = _read(
        upload.file_id,
        upload.name,
        text_column.strip() or None,
        domain_column.strip() or None,
        encoding,
        upload,
    )
    for note in prompts.notes:
        st.caption(plain(note))
    return prompts


def as_record(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as requests to the worker hold it."""
    known = {
        "text": prompt.text,
        "ids": None if prompt.ids is None else list(prompt.ids),
        "domain": prompt.domain,
        "source": prompt.source,
        "messages": None if prompt.messages is None else list(prompt.messages),
    }
    return {name: value for name, value in known.items() if value is not None}


# as it is: prompts are not changed, and copies of many take long
@st.cache_resource(max_entries=4, show_spinner="Reading the prompts…")
def _read(
    file_id: str,
    name: str,
    text_column: str | None,
    domain_column: str | None,
    encoding: str,
    _upload: UploadedFile,
) -> PromptList:
    return read_upload(
        name,
        _upload.getvalue(),
        text_column=text_column,
        domain_column=domain_column,
        encoding=encoding,
    )
