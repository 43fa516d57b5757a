"""The part of MONAI Label's REST interface that 3D Slicer's extension needs: info, sessions, infer.

*Source*: MONAI Label's documentation of its REST API, and the requests of its Slicer extension. Scans must be sent;
images on a server, which OHIF's plug-in names by their UIDs, are the task of `autosam3d pacs`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect

from autosam3d.io import ReadOptions
from autosam3d.services.serve.app import result_file
from autosam3d.services.serve.faults import ServiceFault
from autosam3d.services.serve.guard import is_token, shown_token
from autosam3d.services.serve.intake import ScanService
from autosam3d.services.serve.store import DONE, FAILED, QUEUED, RUNNING, SESSION
from autosam3d.services.serve.uploads import MULTIPART, body_cut, too_slow
from autosam3d.version import __version__

_READ_OPTIONS = ReadOptions(asked_by="nobody")
"""The protocol has no place for answers; what a scan leaves open the model's recipe says."""

Output = Literal["image", "json", "all", "dicom_seg"]
_FORMS: dict[str, tuple[str, ...]] = {"image": ("nifti", "json"), "all": ("nifti", "json"), "json": ("json",),
                                      "dicom_seg": ("seg", "json")}
_POLL_SECONDS = 0.1
_CHUNK = 1 << 18
_MAX_LOGIN, _MAX_FIELDS = 4096, 16


def add_monai_label(app: FastAPI, service: ScanService) -> None:
    """Add these routes to an application."""
    _add_info(app, service)
    _add_sessions(app, service)
    _add_login(app, service)

    @app.post("/infer/{model}", tags=["MONAI Label"], summary="Segment a scan and wait for the result",
              response_class=Response)
    async def infer(request: Request, model: str, image: str = "", session_id: str = "",
                    output: Annotated[Output | None, Query()] = None) -> Response:
        if model != service.facts.name:
            raise ServiceFault(404, "NO_SUCH_MODEL", "there is no such model; GET /info/ names it")
        form = output or "all"
        if session_id:
            job_id = await service.again(session_id, request, _FORMS[form])
        elif not _has_form(request):
            raise _no_image(image)
        else:
            try:
                job_id, _ = await service.accept(request, _FORMS[form], _READ_OPTIONS)
            except ServiceFault as fault:
                raise _no_image(image) if fault.code == "NO_FILE" and image else fault from None
        try:
            return await _answer(service, request, job_id, form)
        except BaseException:
            await service.on_disk(lambda: service.runner.delete(job_id))
            raise


def _add_info(app: FastAPI, service: ScanService) -> None:
    facts = service.facts
    labels = {name: index for index, name in enumerate(facts.organs, start=1)}

    @app.get("/info", include_in_schema=False)
    @app.get("/info/", tags=["MONAI Label"], summary="The model, as MONAI Label's clients ask for it")
    async def info() -> dict[str, Any]:
        return {
            "name": "autosam3d",
            "description": f"autosam3d {facts.name}. Not a medical device.",
            "version": __version__,
            "labels": list(facts.organs),
            "models": {facts.name: {
                "type": "segmentation", "labels": labels, "dimension": 3,
                "description": f"{facts.name}: {', '.join(facts.organs)}", "config": {},
            }},
            "trainers": {}, "strategies": {}, "scoring": {}, "train_stats": {}, "datastore": {},
            "config": {"infer": {}, "train": {}, "activelearning": {}, "scoring": {}},
        }


def _add_sessions(app: FastAPI, service: ScanService) -> None:
    @app.put("/session", include_in_schema=False)
    @app.put("/session/", tags=["MONAI Label"], summary="Send a scan that infer may then name")
    async def create(request: Request) -> dict[str, Any]:
        if not _has_form(request):
            raise _no_image("")
        session_id, upload = await service.accept(request, ("nifti",), _READ_OPTIONS, state=SESSION,
                                                  file_fields=("files", "file"))
        return {"session_id": session_id, "session_info": {"name": session_id, "bytes": upload.num_bytes}}

    @app.get("/session/{session_id}", tags=["MONAI Label"], summary="Whether a session is there")
    async def show(session_id: str) -> dict[str, Any]:
        session = await service.session(session_id)
        return {"name": session.id, "create_ts": int(session.created)}

    @app.delete("/session/{session_id}", tags=["MONAI Label"], summary="Delete a session and its scan")
    async def remove(session_id: str) -> dict[str, Any]:
        session = await service.session(session_id)
        await service.on_disk(lambda: service.runner.delete(session.id))
        return {"name": session.id}


def _add_login(app: FastAPI, service: ScanService) -> None:
    @app.get("/auth", include_in_schema=False)
    @app.get("/auth/", tags=["MONAI Label"], summary="Whether a token is needed")
    async def enabled() -> dict[str, Any]:
        return {"enabled": service.settings.token is not None}

    @app.post("/auth/token", tags=["MONAI Label"], summary="The service's token against itself, given as the password")
    async def login(request: Request) -> JSONResponse:
        token = service.settings.token
        request.scope["state"]["body_begun"] = True
        body = await _login_body(request, service.settings.chunk_seconds)
        try:
            fields = parse_qs(body.decode("utf-8", errors="replace"), max_num_fields=_MAX_FIELDS)
        except ValueError:
            raise ServiceFault(413, "PARTS", f"expected a name and a password, got more than {_MAX_FIELDS} fields"
                               ) from None
        password = (fields.get("password") or [""])[0]
        if token is None or not is_token(password, token):
            raise ServiceFault(401, "TOKEN", "expected the service's token as the password")
        return JSONResponse({"access_token": token, "token_type": "bearer"}, headers={"cache-control": "no-store"})

    @app.get("/auth/token/valid", tags=["MONAI Label"], summary="Whether the token that was sent is right")
    async def valid(request: Request) -> dict[str, Any]:
        token = service.settings.token  # the guard has refused wrong tokens already
        return {"valid": token is None or is_token(shown_token(request.headers.get("authorization", "")), token)}


async def _login_body(request: Request, seconds: float) -> bytes:
    """The whole body, which is small and must come in so many seconds.

    Raises:
        ServiceFault: 408 SLOW, 413 TOO_LARGE, 400 BODY_CUT.
    """
    body = b""
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_LOGIN:
                    raise ServiceFault(413, "TOO_LARGE", "expected a name and a password")
    except TimeoutError:
        raise too_slow() from None
    except ClientDisconnect:
        raise body_cut() from None
    return body


async def _answer(service: ScanService, request: Request, job_id: str, form: str) -> Response:
    """Wait for the job and answer with its result; the job is deleted afterwards, also where the client has gone."""
    while (job := await service.job(job_id)).state in (QUEUED, RUNNING):
        if await request.is_disconnected():
            raise ServiceFault(400, "GONE", "the client has gone")
        if service.runner.stopping and job.state == QUEUED:
            raise ServiceFault(503, "STOPPING", "the service is about to stop; try again later", 30)
        await asyncio.sleep(_POLL_SECONDS)
    if job.state == FAILED and job.outcome is not None:
        raise ServiceFault.from_dict(job.outcome)
    assert job.state == DONE and job.outcome is not None
    outcome = job.outcome
    volumes = {organ["organ"]: organ["volume_ml"] for organ in outcome["organs"]}
    params = {"label_names": {organ["organ"]: organ["label"] for organ in outcome["organs"]}, "volumes_ml": volumes,
              "warnings": outcome["warnings"]}
    gone = BackgroundTask(service.on_disk, lambda: service.runner.delete(job_id))
    if form == "json":
        return JSONResponse(params, background=gone)
    file = await result_file(service, job, "seg" if form == "dicom_seg" else "nifti")
    if form != "all":
        file.background = gone
        return file
    return await _multipart(service, params, file, gone)


async def _multipart(
    service: ScanService, params: dict[str, Any], file: FileResponse, gone: BackgroundTask
) -> Response:
    """Two parts: `params`, and the label map as `image`."""
    limit = f"autosam3d-{secrets.token_hex(12)}"
    name = str(file.filename)
    head = (f'--{limit}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
            f'{json.dumps(params)}\r\n--{limit}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            f"Content-Type: application/gzip\r\n\r\n").encode()
    tail = f"\r\n--{limit}--\r\n".encode()
    path = Path(file.path)
    opened = await service.on_disk(lambda: path.open("rb"))
    size = path.stat().st_size

    async def parts() -> AsyncIterator[bytes]:
        try:
            yield head
            while chunk := await service.on_disk(lambda: opened.read(_CHUNK)):
                yield chunk
            yield tail
        finally:
            opened.close()

    return StreamingResponse(parts(), media_type=f"{MULTIPART}; boundary={limit}", background=gone,
                             headers={"content-length": str(len(head) + size + len(tail))})


def _has_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith(MULTIPART)


def _no_image(image: str) -> ServiceFault:
    if image:
        return ServiceFault(404, "IMAGE_ID", "the service keeps no images of others; send the scan as the part `file`, "
                            "or in a session, and let `autosam3d pacs` watch an archive")
    return ServiceFault(400, "NO_FILE", "expected the scan as the part `file` of a multipart form, or a session_id")
