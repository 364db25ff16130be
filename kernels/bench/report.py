"""The generated parts of this package's README."""

import re
from pathlib import Path

from kernels.bench import compile_table, results

README = Path(__file__).parent.parent / "README.md"


def section(text: str, part: str) -> str:
    """Return what stands between the marks of a part."""
    match = re.search(rf"<!-- {part} -->\n(.*?)\n?<!-- end -->", text, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"{README} has no part {part!r} between <!-- {part} --> and <!-- end -->.")
    return match[1]


def with_section(text: str, part: str, content: str) -> str:
    """Return the text with the part replaced."""
    section(text, part)
    pattern = rf"(<!-- {part} -->\n).*?(<!-- end -->)"
    return re.sub(
        pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL, count=1
    )


def update() -> None:
    """Write both tables into the README from their files."""
    text = README.read_text(encoding="utf-8")
    text = with_section(text, "results", results.markdown(results.read()))
    if compile_table.TABLE.exists():
        text = with_section(text, "compile", compile_table.markdown(compile_table.read()))
    README.write_text(text, encoding="utf-8")
