"""
A small Hub: the part of the upload and download protocol that huggingface_hub, transformers and datasets use.

Repositories are kept in memory as commits. `Hub.fail` makes the server misbehave.
huggingface_hub reads the address once, at its first import; nothing listens there before `Hub.start`.
"""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from .repository import DATE, Blob, HubError, Repo, metadata_of, problems


LISTENER = socket.socket()
LISTENER.bind(("127.0.0.1", 0))
URL = "http://{}:{}".format(*LISTENER.getsockname())
TOKEN = "hf_testtokenthatmaynotbeprinted"
USER = "tester"
SIGNATURE = "X-Amz-Signature=secretsignaturethatmaynotbeprinted"
_LARGE = (".safetensors", ".bin", ".pt", ".npz", ".parquet", ".arrow", ".gguf", ".zip")
_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


@dataclass
class Failure:
    """What happens instead of an answer, the next `times` times that a request fits."""

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] | None = None
    message: str = "Internal error"
    times: int = 1
    cut_after: int | None = None  # bytes of the body, after which the connection is cut

    async def happen(self, scope, receive, send) -> None:
        self.times -= 1
        if self.cut_after is None:
            await Request(scope, receive).body()
            headers = {"X-Error-Message": self.message, **(self.headers or {})}
            await JSONResponse({"error": self.message}, self.status, headers)(scope, receive, send)
            return
        received, message = 0, {"more_body": True}
        while received < self.cut_after and message.get("more_body"):
            message = await receive()
            received += len(message.get("body", b""))
        receive.__self__.transport.abort()
        await asyncio.sleep(0)


class Hub:
    """The server, in a thread."""

    url = URL

    def __init__(self):
        self.reset()
        repo, storage = "/api/{kinds}/{owner}/{name}", "/storage/{kind}/{owner}/{name}/{sha}"
        table = [
            ("GET", repo, self._info), ("GET", f"{repo}/revision/{{revision}}", self._info),
            ("GET", f"{repo}/tree/{{revision}}", self._tree), ("GET", f"{repo}/refs", self._refs),
            ("GET", f"{repo}/commits/{{revision}}", self._commits),
            ("POST", f"{repo}/branch/{{revision}}", self._branch),
            ("POST", f"{repo}/preupload/{{revision}}", self._preupload),
            ("POST", f"{repo}/commit/{{revision}}", self._commit),
            ("GET", "/api/models", self._models), ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create), ("POST", "/api/validate-yaml", self._validate),
            ("POST", "/api/collections", self._create_collection),
            ("GET", "/api/collections/{owner}/{slug}", self._collection),
            ("POST", "/api/collections/{owner}/{slug}/items", self._add_item),
            ("PUT", storage, self._put), ("GET", storage, self._download),
        ]  # fmt: skip
        for prefix in _PREFIXES.values():
            place = f"/{prefix}{{owner}}/{{name}}"
            table.append(("POST", f"{place}.git/info/lfs/objects/batch", self._batch))
            table.append(("GET", f"{place}/resolve/{{revision}}/{{path:path}}", self._resolve))
        # Longer paths first: `{name}` would swallow the suffix ".git" and what follows it.
        routes = [Route(path, self._endpoint(function), methods=[method]) for method, path, function in table]
        self._app = Starlette(routes=sorted(routes, key=lambda route: (route.path[:5] != "/api/", -len(route.path))))
        config = uvicorn.Config(self, log_level="critical", lifespan="off", http="h11", ws="none", loop="asyncio")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [LISTENER]}, daemon=True)

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self.failures: list[Failure] = []
        self.log: list[tuple[str, str]] = []  # method and path of each request
        self.uploads: Counter[str] = Counter()  # how often each large file was sent whole, by sha256

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"

    def fail(self, *arguments, **options) -> None:
        """Answer the next requests with a [`Failure`]."""
        self.failures.append(Failure(*arguments, **options))

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Content of all files of a revision."""
        return {path: blob.content for path, blob in self.repo(repo_id, kind).resolve(revision).files.items()}

    async def __call__(self, scope, receive, send) -> None:
        method, path = scope["method"], scope["path"]
        self.log.append((method, path))
        fitting = (f for f in self.failures if f.times and f.method == method and re.search(f.path, path))
        if failure := next(fitting, None):
            await failure.happen(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _endpoint(self, function):
        async def endpoint(request: Request) -> Response:
            try:
                found = await function(request)
                return found if isinstance(found, Response) else JSONResponse(found)
            except HubError as error:
                headers = {"X-Error-Message": error.message, "X-Error-Code": error.code or ""}
                return JSONResponse({"error": error.message, **error.content}, error.status, headers)
            except ClientDisconnect:
                return Response()

        return endpoint

    def _user(self, request: Request) -> str:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid credentials in Authorization header")
        return USER

    def _repo(self, request: Request, write: bool = False) -> Repo:
        parts = request.path_params
        kind = parts.get("kinds", request.url.path.split("/")[1]).removesuffix("s")
        repo = self.repos.get((kind if kind in _PREFIXES else "model", f"{parts['owner']}/{parts['name']}"))
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write or repo.private:
            self._user(request)
        return repo

    async def _whoami(self, request: Request):
        return {"type": "user", "name": self._user(request), "orgs": [], "auth": {"type": "access_token"}}

    async def _create(self, request: Request):
        user, body = self._user(request), await request.json()
        owner, kind = body.get("organization") or user, body.get("type") or "model"
        repo_id = f"{owner}/{body['name']}"
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a {kind} under {owner!r}")
        url = f"{self.url}/{_PREFIXES[kind]}{repo_id}"
        if (kind, repo_id) in self.repos:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        private = body.get("visibility") == "private" or body.get("private", False)
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private, body.get("sdk"))
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        return {"url": url, "name": repo_id, "id": repo_id}

    async def _info(self, request: Request):
        repo = self._repo(request)
        return repo.about(repo.resolve(request.path_params.get("revision", "main")))

    async def _models(self, request: Request):
        """Models by tag and by a part of the name."""
        tags, words = request.query_params.getlist("filter"), request.query_params.get("search", "").lower()
        entries = [repo.about(repo.resolve("main")) for (kind, _), repo in self.repos.items() if kind == "model"]
        return [entry for entry in entries if {*tags} <= {*entry["tags"]} and words in entry["id"].lower()]

    async def _tree(self, request: Request):
        commit = self._repo(request).resolve(request.path_params["revision"])
        return [blob.entry(path) for path, blob in sorted(commit.files.items())]

    async def _refs(self, request: Request):
        branches = self._repo(request).branches.items()
        found = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.id} for name, commit in branches]
        return {"branches": found, "tags": [], "converts": [], "pullRequests": []}

    async def _commits(self, request: Request):
        commits = self._repo(request).history(request.path_params["revision"])
        rest = {"message": "", "date": DATE, "authors": [{"user": USER}]}
        return [{"id": commit.id, "title": commit.title, **rest} for commit in commits]

    async def _branch(self, request: Request):
        repo, name = self._repo(request, write=True), request.path_params["revision"]
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.resolve((await request.json()).get("startingPoint", "main"))
        return {}

    async def _preupload(self, request: Request):
        commit, answers = self._repo(request, write=True).resolve(request.path_params["revision"]), []
        for file in (await request.json())["files"]:
            path, blob = file["path"], commit.files.get(file["path"])
            large = path.endswith(_LARGE) or b"\0" in base64.b64decode(file["sample"])
            mode = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({**mode, **({"oid": blob.sha256 if blob.large else blob.oid} if blob else {})})
        return {"files": answers}

    async def _batch(self, request: Request):
        repo, body = self._repo(request, write=True), await request.json()
        objects = []
        for entry in body["objects"]:
            objects.append({"oid": entry["oid"], "size": entry["size"]})
            if entry["oid"] not in repo.storage:
                place = f"{self.url}/storage/{repo.kind}/{repo.id}/{entry['oid']}?{SIGNATURE}"
                objects[-1]["actions"] = {"upload": {"href": place, "header": {}}}
        return {"transfer": "basic", "objects": objects}

    def _stored(self, request: Request) -> tuple[Repo, str]:
        found = request.path_params
        return self.repos[found["kind"], f"{found['owner']}/{found['name']}"], found["sha"]

    async def _put(self, request: Request):
        (repo, sha), content = self._stored(request), await request.body()
        assert hashlib.sha256(content).hexdigest() == sha
        repo.storage[sha] = content
        self.uploads[sha] += 1
        return Response()

    async def _download(self, request: Request):
        repo, sha = self._stored(request)
        return Response(repo.storage[sha], media_type="application/octet-stream")

    async def _commit(self, request: Request):
        repo, branch = self._repo(request, write=True), request.path_params["revision"]
        files, title = dict(repo.branches[branch].files), ""
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value, path = entry["value"], entry["value"].get("path")
            match entry["key"]:
                case "header":
                    title = value["summary"]
                    assert value.get("parentCommit") in (None, repo.branches[branch].id)
                case "file":
                    files[path] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    files[path] = Blob(repo.storage[value["oid"]], large=True)
                case "deletedFile":
                    del files[path]
        commit = repo.commit(branch, files, title)
        url = f"{self.url}/{_PREFIXES[repo.kind]}{repo.id}/commit/{commit.id}"
        return {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""}

    async def _resolve(self, request: Request):
        repo, path = self._repo(request), request.path_params["path"]
        commit = repo.resolve(request.path_params["revision"])
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob.oid}"'}
        if not blob.large:
            return Response(blob.content, headers=headers, media_type="text/plain")
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        # Large files come from another host, as they do from the Hub: within one host the client follows by itself.
        place = self.url.replace("127.0.0.1", "localhost")
        return RedirectResponse(f"{place}/storage/{repo.kind}/{repo.id}/{blob.sha256}?{SIGNATURE}", 302, headers)

    async def _validate(self, request: Request):
        errors = [{"message": error} for error in problems(metadata_of((await request.json())["content"]))]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def _create_collection(self, request: Request):
        user, body = self._user(request), await request.json()
        slug = f"{user}/{re.sub('[^a-z0-9]+', '-', body['title'].lower())}-{hashlib.sha1(b'x').hexdigest()[:24]}"
        if slug in self.collections:
            raise HubError(409, "This collection already exists", slug=slug)
        self.collections[slug] = {
            "slug": slug, "title": body["title"], "owner": {"name": user}, "items": [], "lastUpdated": DATE,
            "position": 0, "private": body.get("private", False), "theme": "blue", "upvotes": 0,
            "description": body.get("description", ""),
        }  # fmt: skip
        return self.collections[slug]

    async def _collection(self, request: Request):
        return self.collections["{owner}/{slug}".format(**request.path_params)]

    async def _add_item(self, request: Request):
        self._user(request)
        collection, item = await self._collection(request), (await request.json())["item"]
        if any((entry["type"], entry["id"]) == (item["type"], item["id"]) for entry in collection["items"]):
            raise HubError(409, "Item already in collection")
        place = len(collection["items"])
        collection["items"].append({"_id": str(place), "position": place, **item})
        return collection
