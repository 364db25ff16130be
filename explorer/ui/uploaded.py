"""A file of prompts that somebody uploads, read once and not in the app's process."""

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from capture.prompts.reading import Prompt
from explorer.worker.prompts import read_upload

TYPES = ["txt", "csv", "jsonl", "parquet"]


def prompts_of(upload: UploadedFile | None) -> list[Prompt]:
    """Return the prompts of an upload, none without one.

    Raises
    ------
    PromptError
        With what is wrong with the file.
    """
    return [] if upload is None else _read(upload.file_id, upload.name, upload)


# as it is: prompts are not changed, and copies of many take long
@st.cache_resource(max_entries=4, show_spinner="Reading the prompts…")
def _read(file_id: str, name: str, _upload: UploadedFile) -> list[Prompt]:
    return read_upload(name, _upload.getvalue())
