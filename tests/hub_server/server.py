"""
A small Hub: the part of the upload and download protocol that huggingface_hub, transformers and datasets use.

Repositories are kept in memory as commits over content-addressed blobs, as git does. What an upload sends is checked
as the Hub checks it: a commit with an LFS file that was not uploaded is refused, a sha256 that does not fit its bytes
too.
`Hub.fail` makes the server misbehave.
"""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route


TOKEN = "hf_testtokenthatmaynotbeprinted"
USER = "tester"
SIGNATURE = "X-Amz-Signature=secretsignaturethatmaynotbeprinted"
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz", ".parquet", ".arrow", ".gguf", ".zip")
_GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)
_LICENSES = {
    "apache-2.0",
    "mit",
    "cc-by-4.0",
    "cc0-1.0",
    "bsd-3-clause",
    "gpl-3.0",
    "llama3",
    "gemma",
    "other",
    "unknown",
}
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}
_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **content):
        self.status, self.message, self.code, self.content = status, message, code, content


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its text, or its place in the large file storage."""

    content: bytes | None
    sha256: str | None = None
    size: int = 0

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        data = self.pointer if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    id: str
    parent: "Commit | None"
    files: dict[str, Blob]
    title: str
    date: str


@dataclass
class Repo:
    kind: str
    id: str
    private: bool
    sdk: str | None = None
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> Commit:
        parent = self.branches.get(branch)
        content = json.dumps([parent and parent.id, title, {path: blob.oid for path, blob in sorted(files.items())}])
        commit = Commit(
            hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest(), parent, files, title, _now()
        )
        self.commits[commit.id] = self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> Commit:
        for names in (self.branches, self.commits):
            if revision in names:
                return names[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Failure:
    """What happens instead of an answer, the next `times` times that a request fits."""

    method: str
    path: str
    status: int | None
    headers: dict[str, str]
    message: str
    times: int
    cut_after: int | None


def _about(repo: Repo, commit: Commit, sizes: bool) -> dict:
    card = commit.files.get("README.md")
    front = None if card is None else re.match(r"---\n(.*?)\n---", card.content.decode(), re.DOTALL)
    metadata = (front and yaml.safe_load(front[1])) or {}
    content = {
        "_id": "0", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.id,
        "private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
        "tags": metadata.get("tags") or [], "lastModified": commit.date, "createdAt": commit.date,
        "siblings": [
            {"rfilename": path, **({"size": blob.size or len(blob.content or b"")} if sizes else {})}
            for path, blob in sorted(commit.files.items())
        ],
    }  # fmt: skip
    if repo.sdk is not None:
        content["sdk"] = repo.sdk
    return content


class Hub:
    """The server, in a thread."""

    def __init__(self, listener: socket.socket):
        self.url = "http://{}:{}".format(*listener.getsockname())
        self.reset()
        routes = []
        for kind in _PREFIXES:
            api = f"/api/{kind}s/{{owner}}/{{name}}"
            for path, method, function in (
                ("", "GET", self._info),
                ("/revision/{revision}", "GET", self._info),
                ("/tree/{revision}", "GET", self._tree),
                ("/refs", "GET", self._refs),
                ("/commits/{revision}", "GET", self._commits),
                ("/branch/{revision}", "POST", self._branch),
                ("/preupload/{revision}", "POST", self._preupload),
                ("/commit/{revision}", "POST", self._commit),
            ):
                routes.append(Route(api + path, self._endpoint(function, kind), methods=[method]))
            place = f"/{_PREFIXES[kind]}{{owner}}/{{name}}"
            routes.append(
                Route(f"{place}.git/info/lfs/objects/batch", self._endpoint(self._batch, kind), methods=["POST"])
            )
            routes.append(
                Route(
                    f"{place}/resolve/{{revision}}/{{path:path}}", self._endpoint(self._resolve, kind), methods=["GET"]
                )
            )
        routes += [
            Route("/api/models", self._endpoint(self._models)),
            Route("/api/whoami-v2", self._endpoint(self._whoami)),
            Route("/api/repos/create", self._endpoint(self._create), methods=["POST"]),
            Route("/api/validate-yaml", self._endpoint(self._validate), methods=["POST"]),
            Route("/api/collections", self._endpoint(self._create_collection), methods=["POST"]),
            Route("/api/collections/{owner}/{slug}", self._endpoint(self._collection), methods=["GET"]),
            Route("/api/collections/{owner}/{slug}/items", self._endpoint(self._add_item), methods=["POST"]),
            Route("/storage/{kind}/{owner}/{name}/{sha}", self._endpoint(self._put), methods=["PUT"]),
            Route("/storage/{kind}/{owner}/{name}/{sha}", self._endpoint(self._download), methods=["GET"]),
        ]
        # Longer paths first: `{name}` would swallow the suffix ".git" and what follows it.
        self._app = Starlette(routes=sorted(routes, key=lambda route: -len(route.path)))
        config = uvicorn.Config(self, log_level="critical", lifespan="off", http="h11", ws="none", loop="asyncio")
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self.failures: list[Failure] = []
        self.log: list[tuple[str, str]] = []  # method and path of each request
        self.uploads: Counter[str] = Counter()  # how often each large file was sent whole, by sha256
        self.committed: list[list[str]] = []  # paths that each commit sent
        self.tokens = {TOKEN: USER}
        self.quota: int | None = None  # bytes that the large file storage takes

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def fail(
        self,
        method: str,
        path: str,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        message: str = "Internal error",
        times: int = 1,
        cut_after: int | None = None,
    ) -> None:
        """Answer the next `times` requests with an error, or cut the connection after so many bytes of the body."""
        self.failures.append(Failure(method, path, status, headers or {}, message, times, cut_after))

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Content of all files of a revision."""
        repo = self.repo(repo_id, kind)
        return {
            path: repo.lfs[blob.sha256] if blob.content is None else blob.content
            for path, blob in repo.resolve(revision).files.items()
        }

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        self.log.append((scope["method"], scope["path"]))
        for failure in self.failures:
            if failure.times and failure.method == scope["method"] and re.search(failure.path, scope["path"]):
                failure.times -= 1
                if failure.cut_after is not None:
                    received = 0
                    while received < failure.cut_after:
                        message = await receive()
                        received += len(message.get("body", b""))
                        if not message.get("more_body"):
                            break
                    receive.__self__.transport.abort()
                    await asyncio.sleep(0)
                    return
                await Request(scope, receive).body()
                headers = {"X-Error-Message": failure.message, **failure.headers}
                await JSONResponse({"error": failure.message}, failure.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _endpoint(self, function, kind: str | None = None):
        async def endpoint(request: Request) -> Response:
            if kind is not None:
                request.path_params["kind"] = kind
            try:
                return await function(request)
            except HubError as error:
                headers = {"X-Error-Message": error.message, "X-Request-Id": "Root=1-test"}
                if error.code is not None:
                    headers["X-Error-Code"] = error.code
                return JSONResponse({"error": error.message, **error.content}, error.status, headers)
            except ClientDisconnect:
                return Response(status_code=400)

        return endpoint

    def _user(self, request: Request, required: bool = True) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise HubError(401, "Invalid username or password.")
        return self.tokens.get(token)

    def _repo(self, request: Request, write: bool = False) -> Repo:
        user = self._user(request, required=write)
        kind, owner, name = (request.path_params[key] for key in ("kind", "owner", "name"))
        repo = self.repos.get((kind, f"{owner}/{name}"))
        if repo is None or (repo.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403, "You don't have the rights to write to this repo")
        return repo

    async def _whoami(self, request: Request) -> Response:
        return JSONResponse(
            {"type": "user", "name": self._user(request), "orgs": [], "auth": {"type": "access_token"}}
        )

    async def _create(self, request: Request) -> Response:
        user, body = self._user(request), await request.json()
        owner, kind = body.get("organization") or user, body.get("type") or "model"
        repo_id = f"{owner}/{body['name']}"
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        url = f"{self.url}/{_PREFIXES[kind]}{repo_id}"
        if (kind, repo_id) in self.repos:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        private = body.get("visibility") == "private" or body.get("private", False)
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private, body.get("sdk"))
        repo.commit("main", {".gitattributes": _text(_GITATTRIBUTES)}, "initial commit")
        return JSONResponse({"url": url, "name": repo_id, "id": repo_id})

    async def _info(self, request: Request) -> Response:
        repo = self._repo(request)
        commit = repo.resolve(request.path_params.get("revision", "main"))
        sizes = request.query_params.get("blobs", "").lower() in ("true", "1")
        return JSONResponse(_about(repo, commit, sizes))

    async def _models(self, request: Request) -> Response:
        """Models by tag and by a part of the name; private ones of this user only, who is the only one."""
        tags, words = request.query_params.getlist("filter"), request.query_params.get("search", "").lower()
        entries = [
            _about(repo, repo.resolve("main"), False) for (kind, _), repo in self.repos.items() if kind == "model"
        ]
        entries = [entry for entry in entries if {*tags} <= {*entry["tags"]} and words in entry["id"].lower()]
        return JSONResponse(entries[: int(request.query_params.get("limit", 1000))])

    async def _tree(self, request: Request) -> Response:
        commit = self._repo(request).resolve(request.path_params["revision"])
        return JSONResponse([_entry(path, blob) for path, blob in sorted(commit.files.items())])

    async def _refs(self, request: Request) -> Response:
        repo = self._repo(request)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.id}
            for name, commit in repo.branches.items()
        ]
        return JSONResponse({"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    async def _commits(self, request: Request) -> Response:
        commit = self._repo(request).resolve(request.path_params["revision"])
        found = []
        while commit is not None:
            found.append(
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": "",
                    "date": commit.date,
                    "authors": [{"user": USER}],
                }
            )
            commit = commit.parent
        return JSONResponse(found)

    async def _branch(self, request: Request) -> Response:
        repo, name = self._repo(request, write=True), request.path_params["revision"]
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.resolve((await request.json()).get("startingPoint", "main"))
        return Response(status_code=200)

    async def _preupload(self, request: Request) -> Response:
        repo = self._repo(request, write=True)
        commit = repo.resolve(request.path_params["revision"])
        answers = []
        for file in (await request.json())["files"]:
            path, blob = file["path"], commit.files.get(file["path"])
            large = (
                path.endswith(_LFS_SUFFIXES) or file["size"] > 10 << 20 or b"\0" in base64.b64decode(file["sample"])
            )
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if blob is not None:
                answers[-1]["oid"] = blob.sha256 or blob.oid
        return JSONResponse({"files": answers})

    async def _batch(self, request: Request) -> Response:
        repo, body = self._repo(request, write=True), await request.json()
        assert body["operation"] == "upload" and body["hash_algo"] == "sha256"
        objects, taken = [], sum(map(len, repo.lfs.values()))
        for entry in body["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            objects.append(answer)
            if entry["oid"] in repo.lfs:
                continue
            taken += entry["size"]
            if self.quota is not None and taken > self.quota:
                raise HubError(
                    403, "Private repository storage limit reached, please upgrade your plan to increase it."
                )
            place = f"{self.url}/storage/{repo.kind}/{repo.id}/{entry['oid']}"
            action = {"href": f"{place}?{SIGNATURE}", "header": {}}
            answer["actions"] = {"upload": action}
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _storage(self, request: Request) -> tuple[Repo, str]:
        if request.url.query != SIGNATURE:
            raise HubError(403, "SignatureDoesNotMatch")
        kind, owner, name, sha = (request.path_params[key] for key in ("kind", "owner", "name", "sha"))
        return self.repos[kind, f"{owner}/{name}"], sha

    def _store(self, repo: Repo, sha: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha:
            raise HubError(400, "The sha256 does not fit the content")
        repo.lfs[sha] = content
        self.uploads[sha] += 1

    async def _put(self, request: Request) -> Response:
        self._store(*self._storage(request), await request.body())
        return Response()

    async def _download(self, request: Request) -> Response:
        repo, sha = self._storage(request)
        return Response(repo.lfs[sha], media_type="application/octet-stream")

    async def _commit(self, request: Request) -> Response:
        repo, branch = self._repo(request, write=True), request.path_params["revision"]
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files, title, sent = dict(repo.branches[branch].files), "", []
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value, path = entry["value"], entry["value"].get("path")
            match entry["key"]:
                case "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, repo.branches[branch].id):
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[path] = _text(base64.b64decode(value["content"]))
                    sent.append(path)
                case "lfsFile":
                    if value["oid"] not in repo.lfs:
                        raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                    files[path] = Blob(None, value["oid"], len(repo.lfs[value["oid"]]))
                    sent.append(path)
                case "deletedFile":
                    if path not in files:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                    del files[path]
                case "deletedFolder":
                    files = {name: blob for name, blob in files.items() if not name.startswith(path.rstrip("/") + "/")}
                case key:
                    raise HubError(400, f"unknown operation {key!r}")
        self.committed.append(sent)
        commit = repo.commit(branch, files, title)
        url = f"{self.url}/{_PREFIXES[repo.kind]}{repo.id}/commit/{commit.id}"
        return JSONResponse({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})

    async def _resolve(self, request: Request) -> Response:
        repo, revision, path = self._repo(request), request.path_params["revision"], request.path_params["path"]
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        if blob.content is not None:
            return Response(blob.content, headers={**headers, "ETag": f'"{blob.oid}"'}, media_type="text/plain")
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "ETag": f'"{blob.oid}"'}
        # Large files come from another host, as they do from the Hub: within one host the client follows by itself.
        place = self.url.replace("127.0.0.1", "localhost")
        place = f"{place}/storage/{repo.kind}/{repo.id}/{blob.sha256}?{SIGNATURE}"
        return RedirectResponse(place, 302, headers)

    async def _validate(self, request: Request) -> Response:
        body = await request.json()
        errors = _metadata_problems(body["content"], body.get("repoType", "model"))
        content = {"errors": [{"message": error} for error in errors], "warnings": []}
        return JSONResponse(content, 400 if errors else 200)

    async def _create_collection(self, request: Request) -> Response:
        user, body = self._user(request), await request.json()
        if body["namespace"] != user:
            raise HubError(403, f"You don't have the rights to create a collection under {body['namespace']!r}")
        slug = re.sub(r"[^a-z0-9]+", "-", body["title"].lower()).strip("-")
        slug = f"{user}/{slug}-{hashlib.sha1(slug.encode()).hexdigest()[:24]}"
        if slug in self.collections:
            raise HubError(409, "This collection already exists", slug=slug)
        self.collections[slug] = {
            "slug": slug, "title": body["title"], "owner": {"name": user}, "items": [], "lastUpdated": _now(),
            "position": 0, "private": body.get("private", False), "theme": "blue", "upvotes": 0,
            "description": body.get("description", ""),
        }  # fmt: skip
        return JSONResponse(self.collections[slug])

    def _found_collection(self, request: Request) -> dict:
        slug = "{owner}/{slug}".format(**request.path_params)
        if slug not in self.collections:
            raise HubError(404, "Collection not found")
        return self.collections[slug]

    async def _collection(self, request: Request) -> Response:
        return JSONResponse(self._found_collection(request))

    async def _add_item(self, request: Request) -> Response:
        self._user(request)
        collection, body = self._found_collection(request), await request.json()
        item = body["item"]
        if (item["type"], item["id"]) not in self.repos:
            raise HubError(404, f"{item['type']} {item['id']} not found")
        if any((entry["type"], entry["id"]) == (item["type"], item["id"]) for entry in collection["items"]):
            raise HubError(409, "Item already in collection")
        entry = {"_id": str(len(collection["items"])), "position": len(collection["items"]), **item}
        if "note" in body:
            entry["note"] = {"text": body["note"], "html": body["note"]}
        collection["items"].append(entry)
        return JSONResponse(collection)


def _text(content: str | bytes) -> Blob:
    content = content.encode() if isinstance(content, str) else content
    return Blob(content, None, len(content))


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
    if blob.content is None:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _metadata_problems(content: str, kind: str) -> list[str]:
    """Errors of a card, after the rules in the Hub's documentation."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    metadata = yaml.safe_load(match[1]) if match else {}

    errors = []
    if "license" in metadata and metadata["license"] not in _LICENSES:
        errors.append(f'"license" must be one of {sorted(_LICENSES)}')
    for name in ("base_model", "datasets"):
        values = metadata.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                errors.append(f'"{name}" with value {value!r} is not valid. Use a model or dataset id')
    if "base_model_relation" in metadata and metadata["base_model_relation"] not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(_RELATIONS)}')
    if not all(isinstance(tag, str) for tag in metadata.get("tags") or []):
        errors.append('"tags" must be a list of strings')
    if kind == "space" and metadata.get("sdk") not in ("gradio", "docker", "static", "streamlit"):
        errors.append('"sdk" must be one of [gradio, docker, static, streamlit]')
    return errors
