"""A Hub on loopback that speaks the protocol of huggingface.co, for the real client in tests.

    with Hub() as hub:
        token = hub.user("me")
        subprocess.run(…, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": token})

It knows users and their rights, repositories with commits and tags, LFS with basic transfer, and
downloads by way of a second host name, as the real one does. What it accepts it checks: digests of
uploads, the parent of a commit, metadata of a card. `hub.at["commit"] = cut` and the like disturb a
step; `hub.requests` is what came, in order.
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PAGE = 4  # entries of a listing; the real Hub pages, too
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LICENCES = {
    *("apache-2.0", "mit", "llama3.1", "llama3.2", "llama3.3", "gemma", "other", "cc-by-nc-4.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-nd-4.0"),
}


class Cut(Exception):
    """The connection ends here, without an answer."""


class Refused(Exception):
    """An answer with an error status, as the Hub gives it."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


def cut(handler: "Handler") -> None:
    raise Cut


def busy(handler: "Handler") -> None:
    raise Refused(503, "Service Unavailable")


def once(action: Callable[["Handler"], None]) -> Callable[["Handler"], None]:
    """The action for the first request alone."""
    done: list[bool] = []

    def act(handler: "Handler") -> None:
        if not done:
            done.append(True)
            action(handler)

    return act


class Hold:
    """Holds a request until `release` is set; `reached` tells that it has come."""

    def __init__(self) -> None:
        self.reached, self.release = threading.Event(), threading.Event()

    def __call__(self, handler: "Handler") -> None:
        self.reached.set()
        self.release.wait(120)


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def blob(self) -> str:
        """Git's SHA-1 of the file, or of its LFS pointer."""
        content = self.content
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            content = f"{pointer}size {len(self.content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, str, dict[str, File]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit(self, summary: str, files: dict[str, File]) -> str:
        text = f"{len(self.commits)} {summary} {sorted((n, f.oid) for n, f in files.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits.append((oid, summary, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        oid = self.head if revision == "main" else self.tags.get(revision, revision)
        for commit, _, files in self.commits:
            if commit == oid:
                return commit, files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.users: dict[str, dict[str, Any]] = {}  # by token
        self.at: dict[str, Callable[[Handler], None]] = {}
        self.after: dict[str, Callable[[Handler], None]] = {}
        self.change: dict[str, Callable[[bytes], bytes]] = {}  # what a download holds, by file name
        self.shorten: dict[str, int] = {}  # bytes after which the next download of a file is cut
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.leaks: list[str] = []  # tokens that came where they do not belong
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def user(self, name: str, role: str = "write", orgs: tuple[tuple[str, str], ...] = ()) -> str:
        """A user's token. role: read, write, or fineGrained for a namespace (`name:scope`)."""
        name, _, scope = name.partition(":")
        token = "hf_" + hashlib.sha256(f"{name}{role}{orgs}{scope}".encode()).hexdigest()[:34]
        access: dict[str, Any] = {"displayName": "test", "role": role}
        if role == "fineGrained":
            entity = {"type": "user", "name": scope}
            scoped = [{"entity": entity, "permissions": ["repo.content.read", "repo.write"]}]
            access["fineGrained"] = {"global": [], "scoped": scoped}
        self.users[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"type": "org", "name": org, "roleInOrg": rank} for org, rank in orgs],
            "auth": {"type": "access_token", "accessToken": access},
        }
        return token

    def put(self, repo: str, files: dict[str, bytes], tag: str = "", private: bool = False) -> str:
        """A commit that holds exactly these files, without asking anybody; returns it."""
        entry = self.repos.setdefault(repo, Repo(private))
        stored = {name: File(text, name.endswith(".safetensors")) for name, text in files.items()}
        self.lfs |= {file.sha256: file.content for file in stored.values() if file.lfs}
        oid = entry.commit("put", stored)
        if tag:
            entry.tags[tag] = oid
        return oid

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        files = self.repos[repo].at(revision)[1]
        return {name: file.content for name, file in files.items() if name != ".gitattributes"}

    def sent(self, step: str) -> int:
        return sum(request == step for request in self.requests)


REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = rf"/api/models/{REPO}"
ROUTES = [
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("list", "GET", r"/api/models"),
    ("preupload", "POST", rf"{MODEL}/preupload/(?P<rev>[^/]+)"),
    ("commit", "POST", rf"{MODEL}/commit/(?P<rev>[^/]+)"),
    ("tag", "POST", rf"{MODEL}/tag/(?P<rev>[^/]+)"),
    ("refs", "GET", rf"{MODEL}/refs"),
    ("settings", "PUT", rf"{MODEL}/settings"),
    ("tree", "GET", rf"{MODEL}/tree/(?P<rev>[^/]+)"),
    ("info", "GET", rf"{MODEL}(/revision/(?P<rev>[^/]+))?"),
    ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("verify", "POST", rf"/{REPO}\.git/info/lfs/objects/verify"),
    ("upload", "PUT", r"/storage/(?P<oid>[0-9a-f]{64})"),
    ("download", "GET", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<path>.+)"),
    ("resolve", "GET", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    ("head", "HEAD", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]
WRITES = {"preupload", "commit", "tag", "settings", "batch", "verify"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    # --- Plumbing ---

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        self.query = parse_qs(place.query)
        self.step = "none"
        try:
            for step, method, pattern in ROUTES:
                match = re.fullmatch(pattern, place.path)
                if match and method == self.command:
                    self.step = step
                    self.part = {k: unquote(v) for k, v in match.groupdict().items() if v}
                    self.hub.requests.append(step)
                    if step in self.hub.at:
                        self.hub.at[step](self)
                    self.body = self.read()
                    if "repo" in self.part:
                        self.repo = self.visible(self.part["repo"], write=step in WRITES)
                    getattr(self, step)()
                    return
            raise Refused(404, f"no {self.command} {place.path}")
        except Refused as error:
            headers = {"X-Error-Message": error.message}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            self.answer({"error": error.message} | error.more, error.status, headers)
        except (Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_POST = do_PUT = do_HEAD = do_GET

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        size = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(size)
        if len(content) < size:  # whoever sent it is gone: nothing was asked
            raise Cut
        return content

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        if self.step in self.hub.after and status < 300:
            self.hub.after[self.step](self)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        length = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in (length | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def me(self) -> dict[str, Any] | None:
        """The user whose token came; Refused for a token that is nobody's."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def rights(self, namespace: str, write: bool) -> bool:
        me = self.me()
        if me is None:
            return False
        ranks = {org["name"]: org["roleInOrg"] for org in me["orgs"]} | {me["name"]: "admin"}
        token = me["auth"]["accessToken"]
        scopes = [e["entity"]["name"] for e in token.get("fineGrained", {}).get("scoped", ())]
        if not write:
            return namespace in ranks
        may = token["role"] == "write" or namespace in scopes
        return may and ranks.get(namespace, "read") != "read"

    def visible(self, name: str, write: bool) -> Repo:
        namespace = name.split("/")[0]
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.rights(namespace, False)):
            status = 404 if self.me() else 401
            raise Refused(status, "Repository not found", "RepoNotFound")
        if write and not self.rights(namespace, True):
            raise Refused(403, f"You don't have the rights to write to {name}")
        return repo

    def json(self) -> Any:
        return json.loads(self.body)

    def paged(self, entries: list[Any]) -> None:
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            place = urlsplit(self.path)
            query = "&".join(p for p in place.query.split("&") if p and not p.startswith("cursor="))
            following = f"{self.hub.url}{place.path}?{query}&cursor={start + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.answer(entries[start : start + PAGE], headers=headers)

    # --- Users and repositories ---

    def whoami(self) -> None:
        me = self.me()
        if me is None:
            raise Refused(401, "Invalid username or password.")
        self.answer(me)

    def create(self) -> None:
        order, me = self.json(), self.me()
        namespace = order.get("organization") or (me or {}).get("name", "")
        name = f"{namespace}/{order['name']}"
        if not self.rights(namespace, True):
            raise Refused(403, f'You don\'t have the rights to create a model under "{namespace}"')
        with self.hub.lock:
            if name in self.hub.repos:
                url = f"{self.hub.url}/{name}"
                raise Refused(409, f"You already created this model repo: {name}", url=url)
            repo = self.hub.repos[name] = Repo(order.get("visibility") == "private")
            repo.commit("initial commit", {".gitattributes": File(ATTRIBUTES, False)})
        self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def describe(self, name: str, repo: Repo, revision: str = "main") -> dict[str, Any]:
        oid, files = repo.at(revision)
        text = files["README.md"].content.decode() if "README.md" in files else ""
        match = re.match(r"---\n(.*?)\n---\n", text, re.S)
        data = yaml.safe_load(match[1]) if match else {}
        tags = [*data.get("tags", ()), *filter(None, [data.get("library_name")])]
        return {
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": oid,
            "private": repo.private,
            "tags": tags,
            "cardData": data,
            "siblings": [{"rfilename": path} for path in files],
        }

    def info(self) -> None:
        self.answer(self.describe(self.part["repo"], self.repo, self.part.get("rev", "main")))

    def list(self) -> None:
        author, tags = self.query["author"][0], set(self.query.get("filter", ()))
        models = [
            self.describe(name, repo)
            for name, repo in sorted(self.hub.repos.items())
            if name.startswith(f"{author}/") and (not repo.private or self.rights(author, False))
        ]
        self.paged([entry for entry in models if tags <= set(entry["tags"])])

    def settings(self) -> None:
        self.repo.private = self.json()["visibility"] == "private"
        self.answer({"private": self.repo.private})

    def refs(self) -> None:
        def ref(kind: str, name: str, oid: str) -> dict[str, str]:
            return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}

        tags = [ref("tags", name, oid) for name, oid in self.repo.tags.items()]
        branches = [ref("heads", "main", self.repo.head)]
        self.answer({"branches": branches, "converts": [], "tags": tags})

    def tree(self) -> None:
        _, files = self.repo.at(self.part["rev"])
        folders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            for path in sorted(folders)
        ]
        for path, file in sorted(files.items()):
            entry = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
            large = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
            entries.append(entry | ({"lfs": large} if file.lfs else {}))
        self.paged(entries)

    def validate(self) -> None:
        content = self.json()["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        data = yaml.safe_load(match[1]) if match else {}
        errors = []
        if data.get("license") not in LICENCES:
            errors.append(f'"license" must be one of {sorted(LICENCES)}')
        if data.get("license") == "other" and not data.get("license_name"):
            errors.append('"license_name" is required')
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.get("base_model"))):
            errors.append('"base_model" with value is not valid. Use a model id')
        if data.get("base_model_relation") not in ("adapter", "finetune", "quantized", "merge"):
            errors.append('"base_model_relation" is not valid')
        for name in data.get("datasets") or ():
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                errors.append(f'"datasets" holds {name}')
        for model in data.get("model-index") or ():
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= result.keys():
                    errors.append('"model-index[0].results" is not valid')
        messages = [{"message": message} for message in errors]
        self.answer({"errors": messages, "warnings": []}, 400 if errors else 200)

    # --- Uploads ---

    def preupload(self) -> None:
        _, files = self.repo.at(self.part["rev"])
        modes = []
        for file in self.json()["files"]:
            path = file["path"]
            sample = base64.b64decode(file["sample"])
            large = fnmatch.fnmatch(path, "*.safetensors") or file["size"] > 10 * 2**20
            mode = "lfs" if large or b"\0" in sample else "regular"
            oid = files[path].oid if path in files else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def batch(self) -> None:
        order = self.json()
        assert order["operation"] == "upload" and "basic" in order["transfers"]
        objects = []
        for entry in order["objects"]:
            reply = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.lfs:
                verify = f"{self.hub.url}/{self.part['repo']}.git/info/lfs/objects/verify"
                reply["actions"] = {
                    "upload": {"href": f"{self.hub.storage}/storage/{entry['oid']}"},
                    "verify": {"href": verify},
                }
            objects.append(reply)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self) -> None:
        self.leak()
        if hashlib.sha256(self.body).hexdigest() != self.part["oid"]:
            raise Refused(400, "the content is not what its name says")
        self.hub.lfs[self.part["oid"]] = self.body
        self.answer({})

    def verify(self) -> None:
        order = self.json()
        if len(self.hub.lfs.get(order["oid"], b"")) != order["size"]:
            raise Refused(404, "Object does not exist")
        self.answer({})

    def commit(self) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        assert lines[0]["key"] == "header"
        with self.hub.lock:
            repo = self.repo
            if header.get("parentCommit", repo.head) != repo.head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.at(self.part["rev"])[1])
            for line in lines[1:]:
                value, path = line["value"], line["value"]["path"]
                if ".." in path.split("/") or path.startswith("/"):
                    raise Refused(400, f"invalid path {path}")
                if line["key"] == "file":
                    files[path] = File(base64.b64decode(value["content"]), False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.lfs:
                        raise Refused(400, f"LFS pointer {value['oid']} points to nothing")
                    files[path] = File(self.hub.lfs[value["oid"]], True)
                else:
                    del files[path]
            oid = repo.commit(header["summary"], files)
        url = f"{self.hub.url}/{self.part['repo']}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def tag(self) -> None:
        name = self.json()["tag"]
        with self.hub.lock:
            if name in self.repo.tags:
                raise Refused(409, f"Tag reference exists already: {name}")
            self.repo.tags[name] = self.repo.at(self.part["rev"])[0]
        self.answer({})

    # --- Downloads ---

    def leak(self) -> None:
        """The storage is another host, with addresses that are signed: no token belongs there."""
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.path)

    def head(self) -> None:
        self.resolve()

    def resolve(self) -> None:
        oid, files = self.repo.at(self.part["rev"])
        path = self.part["path"]
        if path not in files:
            message = "Entry not found"
            self.answer(
                {"error": message},
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": message, "X-Repo-Commit": oid},
            )
            return
        file = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.lfs:
            self.serve(path, file.content, headers)
            return
        headers["X-Linked-ETag"] = f'"{file.sha256}"'
        headers["X-Linked-Size"] = str(len(file.content))
        headers["Location"] = f"{self.hub.storage}/storage/{file.sha256}/{path}?signature=none"
        self.answer(b"", 302, headers)

    def download(self) -> None:
        self.leak()
        content = self.hub.lfs[self.part["oid"]]
        self.serve(self.part["path"], content, {"Accept-Ranges": "bytes"})

    def serve(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        """A file or, where `Range` asks for it, its end; changed or cut as the test wants."""
        if self.command == "GET" and path in self.hub.change:
            content = self.hub.change[path](content)
        total, status = len(content), 200
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(span[1])
            self.hub.ranges.append(path)
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        stop = self.hub.shorten.pop(path, None) if self.command == "GET" else None
        if stop is None:
            self.answer(content, status, headers)
            return
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:stop])
        self.wfile.flush()
        raise Cut
