"""The HTTP routes of the service."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from autosam3d.io import ReadOptions
from autosam3d.services.serve.connection import REFUSED
from autosam3d.services.serve.faults import ServiceFault
from autosam3d.services.serve.guard import request_id_of
from autosam3d.services.serve.intake import ScanService
from autosam3d.services.serve.page import api_page, in_small_pieces, media_type
from autosam3d.services.serve.runner import RESULT
from autosam3d.services.serve.store import DONE, FAILED, QUEUED, RUNNING, StoredJob
from autosam3d.services.serve.uploads import MULTIPART, RAW, discard
from autosam3d.services.workers.scan import FILE_OF, FORMS
from autosam3d.version import __version__

_log = logging.getLogger(__name__)

_DISCARDING = 8
_ASK_AGAIN_SECONDS, _MAX_ASK_AGAIN_SECONDS = 2, 60

Format = Literal["nifti", "seg", "seg-labelmap", "rtstruct", "json", "csv"]
JobId = Annotated[str, Path(description="As POST /jobs gave it. Who knows it may see the job.", max_length=64)]
_BODY = {"requestBody": {"required": True, "content": {
    MULTIPART: {"schema": {"type": "object", "required": ["file"], "properties": {
        "file": {"type": "string", "format": "binary", "description": "A .nii, .nii.gz or .zip of DICOM slices; or the "
                 "slices themselves, a part each."}}}},
    **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in RAW}}}}
_FAULT = {"content": {"application/json": {"schema": {"type": "object", "properties": {
    name: {"type": "string"} for name in ("code", "message", "request_id")}}}}}


def _faults(**said: str) -> dict[int | str, dict[str, Any]]:
    return {int(status[1:]): {"description": text, **_FAULT} for status, text in said.items()}


def make_app(service: ScanService) -> FastAPI:
    """The application without the guard. Its documentation page needs no script."""
    app = FastAPI(title="autosam3d", version=__version__, docs_url=None, redoc_url=None,
                  description="Organs of a CT. Not a medical device.")
    app.state.service = service
    _answer_faults(app)
    _add_jobs(app, service)

    @app.get("/health", summary="Whether the service works, and how much there is to do")
    async def health() -> JSONResponse:
        runner = service.runner
        status = "stopping" if runner.stopping else "ok" if runner.works else "failing"
        workers = {"alive": runner.num_workers, "expected": service.settings.workers}
        told = {"status": status, "queued": service.store.num_queued, "running": runner.num_running,
                "receiving": service.receiving, "workers": workers, "unwritten": service.store.num_unwritten,
                "version": __version__}
        return JSONResponse(told, 503 if status == "failing" else 200)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()))

    return app


def _add_jobs(app: FastAPI, service: ScanService) -> None:
    @app.post("/jobs", status_code=202, summary="Send a scan", openapi_extra=_BODY, responses=_faults(
        _400="the body is broken", _408="the body came too slowly", _409="sent before, by its Idempotency-Key",
        _413="too large", _415="neither a form nor a scan", _429="the queue is full", _503="busy or stopping",
        _507="the disk is full"))
    async def send(
        request: Request,
        read_options: Annotated[ReadOptions, Depends(_read_options)],
        formats: Annotated[str | None, Query(alias="format", description="What to make, with commas between; default "
                                             f"all: {', '.join(FORMS)}.")] = None,
        overlap: Annotated[float | None, Query(ge=0, le=0.9)] = None,
    ) -> JSONResponse:
        job_id, _ = await service.accept(request, _forms(formats), read_options, overlap=overlap)
        return JSONResponse({"id": job_id, "state": QUEUED}, 202, {"Location": f"/jobs/{job_id}"})

    @app.get("/jobs/{job_id}", summary="State, progress, and what was found", responses=_faults(_404="no such job"))
    async def state(job_id: JobId) -> dict[str, Any]:
        return await describe_job(service, await service.job(job_id))

    @app.get("/jobs/{job_id}/result", summary="A file of a job that is done", response_class=FileResponse,
             responses=_faults(_404="no such job or file", _409="not done yet", _422="the scan was refused, or cannot "
                               "have this form"))
    async def result(job_id: JobId, form: Annotated[Format, Query(alias="format")] = "nifti") -> Response:
        return await result_file(service, await service.job(job_id), form)

    @app.delete("/jobs/{job_id}", status_code=204, summary="Cancel or forget a job, and delete its files",
                responses=_faults(_404="no such job"))
    async def delete(job_id: JobId) -> Response:
        job = await service.job(job_id)
        await service.on_disk(lambda: service.runner.delete(job.id))
        return Response(status_code=204)


async def describe_job(service: ScanService, job: StoredJob) -> dict[str, Any]:
    """The answer to GET /jobs/{id}."""
    answer: dict[str, Any] = {"id": job.id, "state": job.state, "percent": 100.0 if job.state == DONE else 0.0}
    status = service.runner.status(job.id)
    if job.state == QUEUED:
        answer["before"] = await service.on_disk(lambda: service.store.num_before(job))
    elif job.state == RUNNING and status is not None:
        answer |= {"stage": status.stage, "percent": status.percent, "seconds_left": status.seconds_left}
    elif job.state == FAILED and job.outcome is not None:
        answer["error"] = {name: job.outcome[name] for name in ("status", "code", "message")}
    elif job.state == DONE and job.outcome is not None:
        outcome = job.outcome
        answer |= {"formats": sorted(outcome["files"]), "organs": outcome["organs"], "warnings": outcome["warnings"],
                 "refused": {form: {"code": error["code"], "message": f"{error['fault']}; {error['remedy']}"}
                             for form, error in outcome["refused"].items()}}
    return answer


async def result_file(service: ScanService, job: StoredJob, form: str) -> FileResponse:
    """The answer with one file of a finished job.

    Raises:
        ServiceFault: the error of a failed job; 409 NOT_READY; 422 for a form that the scan cannot have; 404 NOT_MADE.
    """
    if job.state == FAILED and job.outcome is not None:
        raise ServiceFault.from_dict(job.outcome)
    if job.state != DONE or job.outcome is None:
        raise _not_ready(service, job)
    if form in job.outcome["refused"]:
        error = job.outcome["refused"][form]
        raise ServiceFault(422, error["code"], f"{error['fault']}; {error['remedy']}")
    if form not in job.outcome["files"]:
        raise ServiceFault(404, "NOT_MADE", f"expected one of {', '.join(sorted(job.outcome['files']))}")
    path = service.runner.folder(job.id) / RESULT / FILE_OF[form]
    if not await service.on_disk(path.is_file):  # deleted meanwhile
        raise ServiceFault(404, "NO_SUCH_JOB", "there is no such job, or it was deleted")
    return in_small_pieces(FileResponse(path, media_type=media_type(form), filename=FILE_OF[form]))


def _not_ready(service: ScanService, job: StoredJob) -> ServiceFault:
    """What to do about a result that is asked for too early."""
    status = service.runner.status(job.id)
    left = None if status is None else status.seconds_left
    seconds = _ASK_AGAIN_SECONDS if left is None else max(_ASK_AGAIN_SECONDS, min(_MAX_ASK_AGAIN_SECONDS, round(left)))
    waits = "waits in the queue" if job.state == QUEUED else "is being worked on"
    return ServiceFault(409, "NOT_READY", f"the scan {waits}, so there is no result yet; ask GET /jobs/ID (the address "
                        f"without /result) every few seconds until its state is done, then ask for the result again",
                        seconds)


async def _read_options(  # async, so that it needs no thread
    prefer: Annotated[Literal["sform", "qform"] | None, Query()] = None,
    assume_ras: bool = False, force: bool = False,
    intensity_offset: Annotated[float | None, Query(ge=-1e5, le=1e5)] = None,
    volume: Annotated[int | None, Query(ge=0, le=100_000)] = None,
    series: Annotated[str | None, Query(max_length=64, pattern=r"^[0-9A-Za-z.]+$")] = None,
    acquisition: Annotated[int | None, Query(ge=-(10**9), le=10**9)] = None,
) -> ReadOptions:
    """The options of reading, as query parameters."""
    return ReadOptions(prefer=prefer, assume_ras=assume_ras, force=force, intensity_offset=intensity_offset,
                       volume_index=volume, series=series, acquisition=acquisition, asked_by="request")


def _forms(wished: str | None) -> tuple[str, ...]:
    if wished is None:
        return FORMS
    forms = tuple(dict.fromkeys(part.strip() for part in wished.split(",")))
    if not set(forms) <= set(FORMS):
        raise ServiceFault(400, "PARAMETER", f"expected some of {', '.join(FORMS)}")
    return forms


def _answer_faults(app: FastAPI) -> None:
    """Answer errors with JSON that repeats nothing of the request."""
    places = asyncio.Semaphore(_DISCARDING)

    async def answer(request: Request, fault: ServiceFault) -> JSONResponse:
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if has_body and not request.scope["state"].get("body_begun"):
            request.scope["state"][REFUSED] = True
            await discard(request, places)
        return JSONResponse(fault.body(request_id_of(request)), fault.status, fault.headers)

    @app.exception_handler(ServiceFault)
    async def known(request: Request, fault: ServiceFault) -> JSONResponse:
        return await answer(request, fault)

    @app.exception_handler(HTTPException)
    async def frameworks(request: Request, error: HTTPException) -> JSONResponse:
        return await answer(request, ServiceFault.of_status(error.status_code))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # The name of a parameter is ours; its value may be anything and is not repeated.
        names = ", ".join(sorted({str(fault["loc"][-1])[:40] for fault in error.errors() if fault["loc"]}))
        return await answer(request, ServiceFault(400, "PARAMETER", f"expected another value of {names}; see /docs"))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "-" if trace is None else f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
        _log.error("request %s: %s in %s", request_id_of(request), type(error).__name__, place)
        return JSONResponse(ServiceFault(500, "BUG", "the service failed; report this with the request's id").body(
            request_id_of(request)), 500)
