"""Fixtures: stores of each kind, and who talks through them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from photon.link import store as store_module
from tests.link.stored import Sides


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 server that speaks HTTP, with a bucket; the environment names it, as an operator would."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="photon")
        yield client
    server.stop()


@pytest.fixture
def bucket(s3: Any) -> Iterator[Any]:
    yield s3
    for entry in s3.list_objects_v2(Bucket="photon").get("Contents", []):
        s3.delete_object(Bucket="photon", Key=entry["Key"])
    for upload in s3.list_multipart_uploads(Bucket="photon").get("Uploads", []):
        s3.abort_multipart_upload(Bucket="photon", Key=upload["Key"], UploadId=upload["UploadId"])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FIRST_WAIT", 0.01)


@pytest.fixture(params=["folder", "s3", "presigned"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, bool]:
    """URL of a store, and whether the server signs the silos' requests."""
    if request.param == "folder":
        return str(tmp_path / "store"), False
    request.getfixturevalue("bucket")
    return "s3://photon/runs", request.param == "presigned"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def sides(tmp_path: Path, folder: Path) -> Sides:
    return Sides(tmp_path, str(folder))
