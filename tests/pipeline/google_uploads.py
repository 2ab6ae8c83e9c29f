"""Uploads by the XML interface of Google Cloud Storage, in front of a server that only has those of the JSON interface.

    python google_uploads.py PORT SERVER_PORT

obstore uploads by the XML interface, which fake-gcs-server has for reading, listing and deleting alone. Here its
uploads become those that the server has: a PUT the multipart upload with its precondition, and an upload in parts the
composition of objects. Everything else is passed on as it is; what is stored, and under which condition, the server
alone decides.
"""

import http.client
import json
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.etree import ElementTree

# The server answers the XML interface under this name only.
HOST = "storage.googleapis.com"
OF_A_CONNECTION = {"connection", "content-length", "date", "host", "transfer-encoding"}
Answer = tuple[int, dict[str, str], bytes]


class Uploads(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer in one piece: the client waits for it as a whole.
    wbufsize = -1
    server_port = 0

    def do_PUT(self) -> None:
        asked, bucket, name = self._where()
        if "partNumber" in asked:
            name = _part(asked["uploadId"][0], int(asked["partNumber"][0]))
        self._answer(*self._upload(bucket, name, self.headers.get("x-goog-if-generation-match")))

    def do_POST(self) -> None:
        asked, bucket, name = self._where()
        if "uploads" in asked:
            self._answer(200, {}, _xml("InitiateMultipartUploadResult", UploadId=uuid.uuid4().hex))
        elif "uploadId" in asked:
            self._compose(bucket, name, asked["uploadId"][0])
        else:
            self._pass_on()

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_DELETE = do_GET

    def _pass_on(self) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in OF_A_CONNECTION}
        self._answer(*self._ask(self.command, self.path, self._content(), headers))

    def _compose(self, bucket: str, name: str, upload: str) -> None:
        content = self._content()
        parts = [_part(upload, int(e.text or "")) for e in ElementTree.fromstring(content).iter() if _is_number(e)]
        body = json.dumps({"sourceObjects": [{"name": part} for part in parts], "destination": {"name": name}}).encode()
        status, _, said = self._ask("POST", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}/compose", body)
        for part in parts:
            self._ask("DELETE", f"/storage/v1/b/{bucket}/o/{quote(part, safe='')}")
        etag = json.loads(said).get("etag", "")
        self._answer(status, {}, _xml("CompleteMultipartUploadResult", ETag=etag) if status == 200 else said)

    def _where(self) -> tuple[dict[str, list[str]], str, str]:
        parts = urlsplit(self.path)
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        return parse_qs(parts.query, keep_blank_values=True), bucket, name

    def _content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _upload(self, bucket: str, name: str, generation: str | None) -> Answer:
        limit = uuid.uuid4().hex
        head = f"--{limit}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n"
        head += f"--{limit}\r\nContent-Type: application/octet-stream\r\n\r\n"
        body = head.encode() + self._content() + f"\r\n--{limit}--\r\n".encode()
        asked = {"uploadType": "multipart", "name": name}
        if generation is not None:
            asked["ifGenerationMatch"] = generation
        headers = {"Content-Type": f"multipart/related; boundary={limit}"}
        status, _, said = self._ask("POST", f"/upload/storage/v1/b/{bucket}/o?{urlencode(asked)}", body, headers)
        if status != 200:
            return status, {}, said
        made = json.loads(said)
        return status, {"ETag": made["etag"], "x-goog-generation": str(made["generation"])}, b""

    def _ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=60)
        try:
            connection.request(method, path, body, {"Host": HOST} | (headers or {}))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        kept = {k: v for k, v in headers.items() if k.lower() not in OF_A_CONNECTION}
        for name, value in (kept | {"Content-Length": length}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _part(upload: str, number: int) -> str:
    return f"uploads/{upload}/{number}"


def _is_number(element: ElementTree.Element) -> bool:
    return element.tag.rpartition("}")[2] == "PartNumber"


def _xml(name: str, **fields: str) -> bytes:
    element = ElementTree.Element(name)
    for field, value in fields.items():
        ElementTree.SubElement(element, field).text = value
    return ElementTree.tostring(element)


if __name__ == "__main__":
    own, Uploads.server_port = (int(argument) for argument in sys.argv[1:])
    ThreadingHTTPServer(("127.0.0.1", own), Uploads).serve_forever()
