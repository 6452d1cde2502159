"""A backend to try Tideshift with: `python3 backend.py VERSION PORT`.

It answers every request with its version. While a file `VERSION.broken` exists in the current folder, it answers
everything but /health with status 500: an endpoint that is ready, and a release that is bad.
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION, PORT = sys.argv[1], int(sys.argv[2])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        broken = os.path.exists(f"{VERSION}.broken") and self.path != "/health"
        body = f"{VERSION} is broken\n" if broken else f"{VERSION}\n"
        self.send_response(500 if broken else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
