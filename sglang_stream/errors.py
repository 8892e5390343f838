"""Every error of the project, in one tree.

    StreamError                       status  code
    |-- InvalidRequest                400     invalid_request
    |   |-- ContextLengthExceeded     400     context_length_exceeded
    |   `-- Malformed                 422     malformed
    |-- Unauthorized                  401     unauthorized
    |-- Forbidden                     403     forbidden
    |-- StreamNotFound                404     stream_not_found
    |-- ModelNotFound                 404     model_not_found
    |-- Conflict                      409     conflict
    |   |-- WrongMode                 409     wrong_mode
    |   |-- StreamSealed              409     stream_sealed
    |   |-- SequenceGap               409     seq_gap             (expected_seq)
    |   |-- SequenceConflict          409     seq_conflict
    |   |-- StreamMoved               409     stream_moved
    |   `-- GenerationStarted         409     generation_started
    |-- TooLarge                      413     too_large
    |   |-- PromptTooLong             413     prompt_too_long
    |   `-- BodyTooLarge              413     body_too_large
    |-- LimitReached                  429     limit_reached       (retry_after)
    |-- WorkerUnavailable             503     worker_unavailable
    `-- EngineFailure                 500     engine_failure

An error is raised where it is found, carried unchanged between processes by its `code`
(`to_fields` / `from_fields`) and turned into an HTTP answer once, at the router's edge. Its text
says what to do next.
"""

from __future__ import annotations

from typing import Any, ClassVar


class StreamError(Exception):
    """Base of all errors; `message` is what the user reads, `param` the field at fault."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "error"
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        expected_seq: int | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.expected_seq = expected_seq
        self.retry_after = retry_after

    def to_fields(self) -> dict[str, Any]:
        """The error in OpenAI's shape: what stands under "error" in an answer."""
        fields: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "code": self.code,
            "param": self.param,
        }
        if self.expected_seq is not None:
            fields["expected_seq"] = self.expected_seq
        if self.retry_after is not None:
            fields["retry_after"] = self.retry_after
        return fields


class InvalidRequest(StreamError):
    status, code, type = 400, "invalid_request", "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Malformed(InvalidRequest):
    status, code = 422, "malformed"


class Unauthorized(StreamError):
    status, code, type = 401, "unauthorized", "authentication_error"


class Forbidden(StreamError):
    status, code, type = 403, "forbidden", "permission_error"


class StreamNotFound(StreamError):
    status, code, type = 404, "stream_not_found", "invalid_request_error"


class ModelNotFound(StreamError):
    status, code, type = 404, "model_not_found", "invalid_request_error"


class Conflict(StreamError):
    status, code, type = 409, "conflict", "invalid_request_error"


class WrongMode(Conflict):
    code = "wrong_mode"


class StreamSealed(Conflict):
    code = "stream_sealed"


class SequenceGap(Conflict):
    code = "seq_gap"


class SequenceConflict(Conflict):
    code = "seq_conflict"


class StreamMoved(Conflict):
    code = "stream_moved"


class GenerationStarted(Conflict):
    code = "generation_started"


class TooLarge(StreamError):
    status, code, type = 413, "too_large", "invalid_request_error"


class PromptTooLong(TooLarge):
    code = "prompt_too_long"


class BodyTooLarge(TooLarge):
    code = "body_too_large"


class LimitReached(StreamError):
    status, code, type = 429, "limit_reached", "rate_limit_error"


class WorkerUnavailable(StreamError):
    status, code, type = 503, "worker_unavailable", "service_unavailable_error"


class EngineFailure(StreamError):
    status, code, type = 500, "engine_failure", "server_error"


def _walk(cls: type[StreamError]) -> list[type[StreamError]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _walk(sub))]


_BY_CODE: dict[str, type[StreamError]] = {cls.code: cls for cls in _walk(StreamError)}


def from_fields(fields: dict[str, Any], *, status: int = 500) -> StreamError:
    """The error that `to_fields` described; one of an unknown code keeps its text and `status`.

    `fields`: what stands under "error" in an answer. `status`: the HTTP status, used to choose a
    class where the code is not ours (an error of SGLang's own, for example).
    """
    cls = _BY_CODE.get(str(fields.get("code"))) or _class_of_status(status)
    expected, retry = fields.get("expected_seq"), fields.get("retry_after")
    return cls(
        str(fields.get("message", "the server gave no reason")),
        param=fields.get("param"),
        expected_seq=expected if isinstance(expected, int) else None,
        retry_after=retry if isinstance(retry, int) else None,
    )


def _class_of_status(status: int) -> type[StreamError]:
    """The most general class of an HTTP status."""
    for cls in _BY_CODE.values():
        if cls.status == status and cls is not StreamError:
            return cls
    return InvalidRequest if 400 <= status < 500 else EngineFailure
