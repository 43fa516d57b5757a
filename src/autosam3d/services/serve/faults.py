"""Errors as the service answers them: an HTTP status, a code, a sentence, and no path or name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autosam3d.errors import AutoSam3dError, ResourceError

_STATUS_OF_CODE = {"NO_SPACE": 507, "IO": 507, "NOT_WRITABLE": 507, "WORKER_DIED": 503, "TIMEOUT": 503,
                   "MEMORY": 422}
_STATUS_OF_EXIT = {2: 422, 3: 422, 4: 500, 5: 503}
_CODE_OF_STATUS = {400: "BAD_REQUEST", 404: "NOT_FOUND", 405: "METHOD", 406: "NOT_ACCEPTABLE", 413: "TOO_LARGE",
                   415: "CONTENT_TYPE"}


class ServiceFault(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        code: stable upper-case word for programs.
        message: one sentence for people; it goes to the client, so it repeats nothing of the scan.
        retry_after: seconds after which the same request may succeed; None where it will not.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self, request_id: str) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "request_id": request_id}

    def as_dict(self) -> dict[str, Any]:
        return {"status": self.status, "code": self.code, "message": self.message}

    @classmethod
    def from_dict(cls, fault: Mapping[str, Any]) -> ServiceFault:
        return cls(fault["status"], fault["code"], fault["message"], 30 if fault["status"] == 503 else None)

    @classmethod
    def of(cls, error: AutoSam3dError, retry_after: int = 30) -> ServiceFault:
        """The answer to an error of the library, without its `where`; Retry-After where the machine is at fault."""
        status = _STATUS_OF_CODE.get(error.code, _STATUS_OF_EXIT.get(error.exit_code, 500))
        return cls(status, error.code, f"{error.fault}; {error.remedy}", retry_after if status in (503, 507) else None)

    @classmethod
    def of_status(cls, status: int) -> ServiceFault:
        """The answer to a request that the framework refused."""
        words = {404: "there is nothing at this address", 405: "this address does not take this method"}
        return cls(status, _CODE_OF_STATUS.get(status, "REFUSED"), words.get(status, "the request was refused"))


def disk_failed() -> ServiceFault:
    """The disk that uploads and results lie on cannot be read or written."""
    return ServiceFault.of(ResourceError("IO", "service", "the service's disk failed", "try again later"))


def disk_full() -> ServiceFault:
    """There is no room for an upload."""
    return ServiceFault.of(ResourceError("NO_SPACE", "service", "the service's disk is full", "try again later"),
                           retry_after=60)


NO_SUCH_JOB = ServiceFault(404, "NO_SUCH_JOB", "there is no such job, or it was deleted")
