"""Every error a user can meet, by fault and by remedy.

Law of this file: an error has a neutral `code` (what kind of failure), an `exit_code` for the
command line, and says what was wrong, where, what was expected and what to do. No HTTP or gRPC
number lives here or below the gateways. A foreign exception becomes one of these once, `from e`, in
the one file that imports the foreign library. Programmer errors are `assert`, not one of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class EdgeError(Exception):
    """Base of every error that may reach a user.

    Args:
        message: what was wrong, one sentence, naming the offending value.
        where: file and key path, model, socket or device that it happened at.
        expected: what would have been right.
        remedy: what to do about it.
        retry_after_s: for passing faults, the earliest useful time of a retry, in seconds.
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        expected: str = "",
        remedy: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.remedy = remedy
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        if self.expected:
            text += f" (expected {self.expected})"
        if self.remedy:
            text += f"; {self.remedy}"
        return text

    def document(self) -> dict[str, Any]:
        """The error as it travels in an error frame and in `--json`; empty fields are left out."""
        fields = {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "expected": self.expected,
            "remedy": self.remedy,
            "retry_after_s": self.retry_after_s,
        }
        return {key: value for key, value in fields.items() if value not in ("", None)}


class InternalError(EdgeError):
    """Our own fault; please report."""


class UsageError(EdgeError):
    """The command line or the configuration is wrong."""

    code = "invalid_config"
    exit_code = 2


class NotFoundError(EdgeError):
    """No such model, version, file or key."""

    code = "not_found"
    exit_code = 3


class BundleError(EdgeError):
    """The bundle, manifest or artifact is damaged, dangerous or malformed."""

    code = "invalid_bundle"
    exit_code = 4


class ModelError(EdgeError):
    """The model did not load, failed its goldens or died."""

    code = "model_failed"
    exit_code = 5


class BackendError(ModelError):
    """A backend library refused or failed."""

    code = "backend_failed"


class GoldenError(ModelError):
    """The model runs but gives other answers than its goldens: it is never served."""

    code = "golden_mismatch"


class PlacementError(ModelError):
    """The model runs, but not on the device that it was made for: by policy it does not serve."""

    code = "wrong_device"


class UnavailableError(EdgeError):
    """The daemon or the model is not ready (yet, or any more); a retry may help."""

    code = "unavailable"
    exit_code = 6


class NoMemoryError(UnavailableError):
    """The memory budget has no room for the model now, even without the models that are idle."""

    code = "no_memory"


class ConnectionClosedError(UnavailableError):
    """The peer closed the connection; requests in flight on it have no answer."""

    code = "closed"


class OverloadedError(EdgeError):
    """A bounded queue is full; `retry_after_s` says when to come back."""

    code = "overloaded"
    exit_code = 7


class ThrottledError(OverloadedError):
    """The device holds back (heat, memory); `retry_after_s` says when to come back."""

    code = "throttled"


class DeadlineError(EdgeError):
    """The request's deadline passed before it was answered."""

    code = "deadline_exceeded"
    exit_code = 7


class PermissionDeniedError(EdgeError):
    """The access rules do not let this user do that."""

    code = "permission_denied"
    exit_code = 8


class StorageError(EdgeError):
    """The disk is full, read-only or returned other bytes than were written."""

    code = "storage"
    exit_code = 9


class ConflictError(EdgeError):
    """The state does not allow it: same version with other content, nothing to roll back to."""

    code = "conflict"
    exit_code = 10


class RequestError(EdgeError):
    """The request is well framed but wrong: unknown tensor, shape, datatype."""

    code = "invalid_request"
    exit_code = 11


class TooLargeError(RequestError):
    """A frame, tensor or file exceeds its limit; nothing of it was processed."""

    code = "too_large"


class MalformedError(RequestError):
    """The bytes are not a frame of this protocol; the connection is closed after this error."""

    code = "malformed"


BY_CODE: dict[str, type[EdgeError]] = {
    kind.code: kind
    for kind in (
        InternalError,
        UsageError,
        NotFoundError,
        BundleError,
        ModelError,
        BackendError,
        GoldenError,
        PlacementError,
        UnavailableError,
        NoMemoryError,
        ConnectionClosedError,
        OverloadedError,
        ThrottledError,
        DeadlineError,
        PermissionDeniedError,
        StorageError,
        ConflictError,
        RequestError,
        TooLargeError,
        MalformedError,
    )
}


def from_document(document: dict[str, Any]) -> EdgeError:
    """The error that `document()` described; an unknown code becomes an InternalError."""
    kind = BY_CODE.get(str(document.get("code", "")), InternalError)
    retry = document.get("retry_after_s")
    return kind(
        str(document.get("message", "")),
        where=str(document.get("where", "")),
        expected=str(document.get("expected", "")),
        remedy=str(document.get("remedy", "")),
        retry_after_s=float(retry) if isinstance(retry, int | float) else None,
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for a mistyped name: "did you mean 'threads'?"; "" when no known one is near."""
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The known name that was probably meant; "" when none is near.

    Args:
        likeness: how near, 0 to 1 (difflib's ratio). More where a name may well be one of its own.
    """
    import difflib  # only when there is something to explain

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return near[0] if near else ""
