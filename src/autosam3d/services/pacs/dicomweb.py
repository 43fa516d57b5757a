"""A DICOMweb client of an archive: search (QIDO-RS), fetch whole series (WADO-RS), store results (STOW-RS).

Answers are not trusted: sizes and times are limited while they stream, redirects are not followed, and an answer that
is not what was asked for is an error. No message repeats a name, a number or a URL below the root.

*Source*: DICOM PS3.18, sections 10.4 (retrieve), 10.5 (store) and 10.6 (search).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from autosam3d.errors import MissingExtraError
from autosam3d.services.pacs.credentials import Credentials
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.multipart import BrokenMultipartError, TooLargeError, body_of, boundary_of, write_parts
from autosam3d.services.pacs.rule import ImageFacts, SeriesFacts

try:
    import requests
    import urllib3
except ImportError:
    raise MissingExtraError("MISSING_EXTRA", "DICOMweb", "it needs requests, which is not installed",
                            'pip install "autosam3d[pacs]"') from None

_JSON = "application/dicom+json"
_FILES = 'multipart/related; type="application/dicom"; transfer-syntax=*'
# A UID becomes a part of a URL, so it must not be "..".
_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
_PAGE = 100
_MAX_PAGES = 10_000
_CHUNK_BYTES = 1 << 20
# Tags by number, as QIDO-RS names them in its answers.
_STUDY, _SERIES, _INSTANCE = "0020000D", "0020000E", "00080018"
_MODALITY, _BODY_PART, _DESCRIPTION = "00080060", "00180015", "0008103E"
_IMAGE_TYPE, _THICKNESS, _NUM_IN_STUDY, _NUM_IN_SERIES = "00080008", "00180050", "00201208", "00201209"
_FAILED, _STORED, _REFERENCED = "00081198", "00081199", "00081155"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on the time and size of an archive's answers."""

    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    """Longest wait for the next byte."""
    answer_seconds: float = 120.0
    """For a whole answer other than image data."""
    min_rate: float = 256.0
    """Bytes a second of such an answer, over `rate_seconds`: a list that drips would hold up all others."""
    rate_seconds: float = 5.0
    fetch_seconds: float = 3600.0
    max_json_bytes: int = 64 << 20
    max_file_bytes: int = 512 << 20
    max_series_bytes: int = 8 << 30
    max_files: int = 20_000


@dataclass(frozen=True)
class FoundStudy:
    """One study that has a series of the modality asked for."""

    uid: str
    num_instances: int | None
    """None where the archive does not say."""


@dataclass(frozen=True)
class FoundSeries:
    """One series, as the archive's index describes it."""

    study: str
    uid: str
    facts: SeriesFacts


class DicomWeb:
    """A DICOMweb service at one root.

    Args:
        url: of the root, checked by `credentials.demand_safe_transport`.
        credentials: sent with every request to it, and nowhere else.
        verify: False accepts any certificate; a path names a file of trusted authorities.
        limits: see `Limits`.
    """

    def __init__(self, url: str, credentials: Credentials | None = None, verify: bool | str = True,
                 limits: Limits | None = None) -> None:
        self._root = url.rstrip("/")
        self.name = urlsplit(url).netloc
        """Host and port, for messages."""
        self._limits = limits or Limits()
        self._session = requests.Session()
        # No proxies and no .netrc of the environment: the options alone say what is sent where.
        self._session.trust_env = False
        self._session.verify = verify
        if credentials is not None:
            self._session.headers["Authorization"] = credentials.header
        if verify is False:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def close(self) -> None:
        self._session.close()

    def studies(self, modality: str, since: str | None = None) -> Iterator[FoundStudy]:
        """Studies with a series of `modality`, page by page; `since` is the first StudyDate, as YYYYMMDD."""
        wish: dict[str, Any] = {"ModalitiesInStudy": modality, "includefield": (_NUM_IN_STUDY,)}
        if since is not None:
            wish["StudyDate"] = f"{since}-"
        for item in self._search("studies", wish, _STUDY):
            yield FoundStudy(_uid(item, _STUDY), _integer(item, _NUM_IN_STUDY))

    def series(self, study: str) -> Iterator[FoundSeries]:
        """All series of a study."""
        fields = (_MODALITY, _BODY_PART, _DESCRIPTION, _NUM_IN_SERIES)
        for item in self._search(f"studies/{study}/series", {"includefield": fields}, _SERIES):
            facts = SeriesFacts(modality=_text(item, _MODALITY), body_part=_text(item, _BODY_PART),
                                description=_text(item, _DESCRIPTION), num_instances=_integer(item, _NUM_IN_SERIES))
            yield FoundSeries(study, _uid(item, _SERIES), facts)

    def instances(self, study: str, series: str) -> dict[str, ImageFacts]:
        """SOPInstanceUID to what is said of the image, of a series."""
        fields = (_IMAGE_TYPE, _THICKNESS)
        found = {}
        for item in self._search(f"studies/{study}/series/{series}/instances", {"includefield": fields}, _INSTANCE):
            image_type = "\\".join(map(str, _values(item, _IMAGE_TYPE)))
            found[_uid(item, _INSTANCE)] = ImageFacts(image_type, _number(item, _THICKNESS))
        return found

    def demand_present(self) -> None:
        """Ask for one study, whatever it is.

        Raises:
            ArchiveError: the archive does not answer.
        """
        self._page("studies", {"limit": "1"})

    def has(self, study: str, series: str, instance: str) -> bool:
        """Whether the archive has this object."""
        items = self._page(f"studies/{study}/instances", {"SOPInstanceUID": instance, "SeriesInstanceUID": series})
        return any(_uid(item, _INSTANCE) == instance for item in items)

    def fetch(self, study: str, series: str, folder: Path, demand_room: Callable[[], None] = lambda: None) -> int:
        """Write all objects of a series as 000000.dcm and so on into `folder`, which exists; returns their number.

        Args:
            study: its UID.
            series: likewise.
            folder: for the files.
            demand_room: called before more is written; raises where the disk has no room for it.

        Raises:
            ArchiveError: also where the answer is incomplete.
        """
        limits = self._limits
        deadline = time.monotonic() + limits.fetch_seconds

        def open_part(number: int) -> BinaryIO:
            return os.fdopen(os.open(folder / f"{number:06d}.dcm", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

        with self._answer("GET", f"studies/{study}/series/{series}", headers={"Accept": _FILES}) as answer:
            self._demand_status(answer, (200,))
            try:
                boundary = boundary_of(answer.headers.get("Content-Type", ""))
                chunks = _with_room(self._chunks(answer, deadline), demand_room)
                num_files = write_parts(chunks, boundary, open_part,
                                        max_bytes=limits.max_series_bytes, max_part_bytes=limits.max_file_bytes,
                                        max_parts=limits.max_files)
            except BrokenMultipartError as error:
                raise self._fault("BROKEN_ANSWER", f"the series did not come whole: {error}") from None
            except TooLargeError as error:
                raise ArchiveError("ANSWER_TOO_LARGE", self.name, f"the series is larger than allowed: {error}",
                                   "look at the series, or raise the limits", retry=False) from None
        return num_files

    def store(self, study: str, path: Path, instance: str) -> None:
        """Store one DICOM file in a study.

        Raises:
            ArchiveError: NOT_STORED, also where the answer does not list it as stored.
        """
        boundary = f"autosam3d-{os.urandom(16).hex()}"
        body, length = body_of([path], boundary)
        headers = {"Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
                   "Content-Length": str(length), "Accept": _JSON}
        with self._answer("POST", f"studies/{study}", headers=headers, data=_Sized(body, length)) as answer:
            self._demand_status(answer, (200, 202, 409))
            response = self._json(answer)
        response = response[0] if isinstance(response, list) and len(response) == 1 else response
        if not isinstance(response, dict):
            raise self._fault("BROKEN_ANSWER", "expected a store response, got something else")
        stored = [value for item in _values(response, _STORED) for value in _values(item, _REFERENCED)]
        if instance not in stored or _values(response, _FAILED):
            raise self._fault("NOT_STORED", "it does not name the result as stored")

    def _search(self, path: str, wish: Mapping[str, Any], identity: str) -> Iterator[Mapping[str, Any]]:
        """Ask for pages until one has nothing new: some archives ignore the offset, some give short pages.

        Raises:
            ArchiveError: `partial` where entries have no valid UID, after all the others were given.
        """
        seen: set[str] = set()
        num_odd = 0
        for _ in range(_MAX_PAGES):
            num_seen = len(seen)
            for item in self._page(path, {**wish, "limit": str(_PAGE), "offset": str(num_seen)}):
                uid = _uid(item, identity)
                # An entry that names nothing is known by its content, so that the pages go on behind it.
                key = uid or repr(item)
                if key in seen:
                    continue
                seen.add(key)
                num_odd += not uid
                if uid:
                    yield item
            if len(seen) == num_seen:
                break
        else:
            raise self._fault("ANSWER_TOO_LARGE", f"more than {_MAX_PAGES} pages of answers")
        if num_odd:
            raise ArchiveError("BROKEN_ANSWER", self.name, f"expected a valid UID in each entry of a list, {num_odd} "
                               f"of {len(seen)} have none", "look at the archive; it is tried again", partial=True)

    def _page(self, path: str, wish: Mapping[str, Any]) -> list[Any]:
        with self._answer("GET", path, headers={"Accept": _JSON}, params=dict(wish)) as answer:
            self._demand_status(answer, (200, 204))
            items = [] if answer.status_code == 204 else self._json(answer)
        if not isinstance(items, list):
            raise self._fault("BROKEN_ANSWER", "expected a list of datasets in JSON, got something else")
        return items

    @contextmanager
    def _answer(self, method: str, path: str, **how: Any) -> Iterator[Any]:
        limits, has_begun = self._limits, False
        try:
            with self._session.request(method, f"{self._root}/{path}", stream=True, allow_redirects=False,
                                       timeout=(limits.connect_seconds, limits.read_seconds), **how) as answer:
                has_begun = True
                yield answer
        except requests.exceptions.SSLError:
            raise self._fault("TLS", "its certificate cannot be trusted",
                              "name its authority with --set ca_file=FILE") from None
        except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError):
            if has_begun:
                raise self._fault("SERVER_SLOW", "its answer begins and does not go on") from None
            raise self._fault("SERVER_DOWN", f"no answer within {limits.read_seconds:g} s") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError):
            if has_begun:
                raise self._fault("BROKEN_ANSWER", "its answer is cut, or packed as no program unpacks it") from None
            raise self._fault("SERVER_DOWN", "it cannot be reached, or ends the connection") from None

    def _demand_status(self, answer: Any, good: Sequence[int]) -> None:
        status = answer.status_code
        if status in good:
            return
        if status in (401, 403):
            raise self._fault("AUTH", f"it answers {status}: access is denied", "check --auth-file")
        if status == 404:
            raise self._fault("SERVER_NOT_FOUND", "it answers 404: no such thing, or no DICOMweb service at this root",
                              "check the URL, and whether the series is still there")
        raise self._fault("SERVER_STATUS", f"it answers {status}")

    def _json(self, answer: Any) -> Any:
        limits, began = self._limits, time.monotonic()
        content = bytearray()
        sock = getattr(answer.raw.connection, "sock", None)  # None where the connection ends with the answer
        if sock is not None:  # it may take long until a list begins, but not between two parts of it
            sock.settimeout(min(limits.read_seconds, limits.rate_seconds))
        for chunk in self._chunks(answer, began + limits.answer_seconds):
            content += chunk
            if (took := time.monotonic() - began) > limits.rate_seconds and len(content) < limits.min_rate * took:
                raise self._fault("SERVER_SLOW", "the answer comes a few bytes at a time")
            if len(content) > self._limits.max_json_bytes:
                raise self._fault("ANSWER_TOO_LARGE", "an answer is larger than allowed")
        try:
            return json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise self._fault("BROKEN_ANSWER", "expected JSON, got something else or a part of it") from None

    def _chunks(self, answer: Any, deadline: float) -> Iterator[bytes]:
        """Bytes as they come, without waiting for a full chunk, so that a slow answer meets the deadline."""
        while True:
            chunk = answer.raw.read1(_CHUNK_BYTES, decode_content=True)
            if not chunk:
                return
            yield chunk
            if time.monotonic() > deadline:
                raise self._fault("SERVER_SLOW", "the answer takes too long")

    def _fault(self, code: str, fault: str, remedy: str = "look at the archive; it is tried again") -> ArchiveError:
        return ArchiveError(code, self.name, fault, remedy)


def _with_room(chunks: Iterator[bytes], demand_room: Callable[[], None]) -> Iterator[bytes]:
    for chunk in chunks:
        demand_room()
        yield chunk


class _Sized:
    """A request body of known length that is made while it is sent; requests calls `__len__` and iterates."""

    def __init__(self, chunks: Iterator[bytes], length: int) -> None:
        self._chunks, self._length = chunks, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


def _values(item: Mapping[str, Any], tag: str) -> list[Any]:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []


def _text(item: Mapping[str, Any], tag: str) -> str:
    return next((value for value in _values(item, tag) if isinstance(value, str)), "").strip()


def _integer(item: Mapping[str, Any], tag: str) -> int | None:
    number = _number(item, tag)
    return int(number) if number is not None and 0 <= number < 10**9 else None


def _number(item: Mapping[str, Any], tag: str) -> float | None:
    value = next(iter(_values(item, tag)), None)
    try:  # some archives send numbers as text
        return float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None


def _uid(item: Any, tag: str) -> str:
    """A UID of an answer, in which only digits and dots go into a URL or the ledger; empty where there is none."""
    values = _values(item, tag) if isinstance(item, dict) else []
    if len(values) == 1 and isinstance(values[0], str) and _UID.fullmatch(values[0].strip()):
        return values[0].strip()
    return ""
