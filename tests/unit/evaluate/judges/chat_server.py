"""A local chat completions server whose replies and failures the tests choose."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG_UP, STALL = -1, -2
KEY = "sk-secret-of-the-test"
Content = str | bytes | dict[str, Any]
Reply = Callable[[dict[str, Any]], tuple[int, Content]]


class Endpoint:
    """Answers requests with `reply(body)`, which returns (status, content), and records them.

    Content is the text of a completion or error (str), the JSON body (dict), or the raw body (bytes).
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.reply: Reply = by_length
        self.headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.keys.add(self.headers["Authorization"])
                status, content = outer.reply(body)
                if status == HANG_UP:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [{"mess')
                    return
                if status == STALL:
                    time.sleep(0.6)
                    status = 200
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **outer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw(status, content))

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def raw(status: int, content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        content = completion(content) if status == 200 else {"error": {"message": content}}
    return json.dumps(content).encode()


def completion(text: str | list[Any] | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text, **message},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def by_length(body: dict[str, Any]) -> tuple[int, Content]:
    """Score every answer by its number of letters."""
    text = "\n".join(message["content"] for message in body["messages"])
    found = re.findall(r"\[Start of (Assistant \w)'s answer\]\n(.*)\n\[End", text)
    return 200, "Compared.\n" + "\n".join(f"{name}: {len(answer)}" for name, answer in found)
