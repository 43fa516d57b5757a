import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for package in ("fastapi", "uvicorn", "python_multipart", "httpx", "onnxruntime", "onnx", "openvino"):
    pytest.importorskip(package, reason="needs the extras serve and export")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "badinput")]

from running import Running, running  # noqa: E402

from serving import dicom_zip, phantom_ct  # noqa: E402


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for the tests of a file."""
    with running(tmp_path_factory.mktemp("service"), "--set", "queue=4", "--set", "max_upload_mib=16") as service:
        yield service


@pytest.fixture(scope="session")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom_ct(tmp_path_factory.mktemp("scan") / "doe_jane.nii.gz")


@pytest.fixture(scope="session")
def long_ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan that takes minutes with ``overlap=0.9``."""
    return phantom_ct(tmp_path_factory.mktemp("scan") / "long.nii.gz", (100, 100, 100))


@pytest.fixture(scope="session")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dicom_zip(tmp_path_factory.mktemp("scan") / "series")
