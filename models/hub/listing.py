"""`pull` of a repository of the Hugging Face Hub: its listing, the choice of a quantization, the pin."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgespec.core import EdgespecError
from edgespec.machine.sensors import memory_total
from edgespec.models.hub.download import PullProgress, offline_requested, pull
from edgespec.models.hub.repository import (
    RepositoryFile,
    RepositoryModel,
    RepositoryName,
    group,
    matching,
    pin,
    pinned,
)
from edgespec.models.hub.selection import fits
from edgespec.models.hub.store import verified_parts
from edgespec.text import printable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_SECONDS = 10.0
_DEFAULT = "Q4_K_M"
# Files next to a model that are not models: image projectors, importance matrices, adapters, drafts, heads.
_OTHER = re.compile(
    r"mmproj|imatrix|(?:^|[/._-])(?:lora|adapter|draft|drafter|eagle3?|dflash|dspark)(?:[/._-]|$)|(?:^|/)mtp[/-]",
    re.I,
)


def pull_repository(
    name: RepositoryName,
    models: Path,
    *,
    offline: bool = False,
    progress: PullProgress | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Return the first verified file of the repository's model in the models folder `models`.

    The Hub is asked for the present commit, whose files replace those of an earlier one. Without network the
    pinned commit stays. `note` receives lines for the user. Raises EdgespecError if the repository or a file
    is unavailable, no quantization fits this machine's memory, or a file's SHA-256 is not the Hub's.
    """
    old = pinned(name, models)
    if offline or offline_requested():
        if not old:
            raise EdgespecError(
                f"{name} is not on this machine and Edgespec is offline: pull it while online"
            )
        return verified_parts(old[0], name)
    try:
        info, token = _info(name)
    except ConnectionError as error:
        if not old:
            raise EdgespecError(f"cannot reach the Hub for {name}, {error}: check the connection") from None
        note(f"{name}: cannot reach the Hub, {error}: the pinned revision {old[0].revision[:12]} stays")
        return verified_parts(old[0], name)
    model = choose(_listed(name, info), name, memory_total())
    folder = name.folder(models)
    for before in pinned(RepositoryName(name.repo, model.files[0].path), models):
        if before.revision != model.revision:
            note(f"{name}: moved from {before.revision[:12]} to {model.revision[:12]}, which is pinned now")
    paths = [pull(entry, folder, progress=progress) for entry in model.entries(token=token)]
    try:
        pin(model, models)
    except OSError as error:
        raise EdgespecError(f"cannot write in {printable(folder)}: {error.strerror or error}") from None
    note(f"{model.name}: revision {model.revision[:12]}, SHA-256 {model.files[0].sha256[:12]}, both pinned")
    return paths[0]


def choose(models: Sequence[RepositoryModel], name: RepositoryName, memory: int) -> RepositoryModel:
    """Return the model that the tag of `name` means; for an empty one, the default for `memory` bytes.

    The default is Q4_K_M where it fits with its context, else the largest smaller one that fits, or the
    smallest of a repository that has none of up to four bits. Raises EdgespecError if there is none.
    """
    found = matching(models, name.tag)
    if not found:
        quantizations = ", ".join(sorted({model.quantization for model in models} - {""}))
        raise EdgespecError(
            f"no .gguf model in {name}"
            + (f" (there are {quantizations})" if quantizations else "")
            + ": check the name on the Hub"
        )
    if name.tag:
        return min(found, key=lambda model: len(model.files[0].path))
    small = [model for model in found if re.match(r"(UD-)?I?[QT]Q?[1-4]_|MXFP4", model.quantization)]
    small.sort(key=lambda model: -model.bytes)
    best = [model for model in small if model.quantization == _DEFAULT]
    if best:
        small = best[:1] + [model for model in small if model.bytes < best[0].bytes]
    candidates = small or [min(found, key=lambda model: model.bytes)]
    for model in candidates:
        if fits(model.bytes, memory):
            return model
    least = candidates[-1]
    raise EdgespecError(
        f"{name} needs more memory than this machine has ({memory / 1e9:.1f} GB; its smallest file has "
        f"{least.bytes / 1e9:.1f} GB): to pull it all the same, run `edgespec pull {least.name}`"
    )


def _listed(name: RepositoryName, info: ModelInfo) -> list[RepositoryModel]:
    """Return the models of a listing. Only large files (LFS) have a SHA-256, which every model needs."""
    revision = info.sha or ""
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise EdgespecError(f"unexpected answer of the Hub for {name}: check HF_ENDPOINT")
    files = [
        RepositoryFile(file.rfilename, file.size, file.lfs.sha256)
        for file in info.siblings or ()
        if isinstance(file.rfilename, str) and isinstance(file.size, int) and file.lfs is not None
        if isinstance(file.lfs.sha256, str) and not _OTHER.search(file.rfilename)
    ]
    return group(name.repo, revision, files)


def _info(name: RepositoryName) -> tuple[ModelInfo, bool]:
    """Return the listing, and whether the user's token is needed for the files.

    The token (HF_TOKEN, or the file of `hf auth login`) is sent only where the Hub refuses without one.
    Raises ConnectionError without network, and EdgespecError for what the Hub refuses.
    """
    import httpx2
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
    token = get_token()
    for sent in (False, token) if token else (False,):
        try:
            info = api.model_info(name.repo, files_metadata=True, timeout=_SECONDS, token=sent)
        except OfflineModeIsEnabled:
            raise ConnectionError("forbidden by HF_HUB_OFFLINE") from None
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403, 404):
                continue
            raise EdgespecError(
                f"the Hub refused {name} with HTTP status {error.response.status_code}: try again later"
            ) from None
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise ConnectionError(printable(str(error)) or type(error).__name__) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise EdgespecError(f"unexpected answer of the Hub for {name}: check HF_ENDPOINT") from None
        closed = bool(info.gated or sent)
        if closed and not token:
            raise EdgespecError(f"{name.repo} is gated: accept its terms on the Hub, then set HF_TOKEN")
        return info, closed
    raise EdgespecError(
        f"no repository {name.repo} on the Hub, or it is private or gated: check the name, "
        + ("or the access of your token" if token else "or set HF_TOKEN")
    )
