"""Distinguish a hub that cannot be reached from a file that is not there."""

from __future__ import annotations

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled


def unreachable(error: BaseException) -> bool:
    """Whether an error of diffusers, transformers or the hub's library is due to a hub that cannot be reached, without
    a copy of the file in the cache. Their own messages say that there is no such file."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    return cause is not None
