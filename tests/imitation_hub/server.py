"""The HTTP server of the imitation: what huggingface_hub, transformers and datasets ask the Hub."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from .store import Blob, ImitationHub, Refusal, Snapshot

# A user who was granted access to the gated models, and one who was not.
TOKEN, TOKEN_WITHOUT_ACCESS = "hf_imitationGranted", "hf_imitationStranger"
USERS = {TOKEN: "reader", TOKEN_WITHOUT_ACCESS: "stranger"}
REPOSITORY = "/api/{kind}/{owner}/{name}"

Page = Callable[[Request, Snapshot], Response]
Handler = Callable[[Request], Awaitable[Response]]


class Reading:
    """What everyone may ask: descriptions, trees and files of repositories.

    Args:
        hub: What is served.
    """

    def __init__(self, hub: ImitationHub) -> None:
        self.hub = hub
        self.large: dict[str, Blob] = {}  # files of the large storage that were asked for

    def routes(self) -> list[Route]:
        """List the addresses."""
        tree, file = self.handler(self.tree), self.handler(self.resolve)
        return [
            Route(REPOSITORY, self.handler(self.info)),
            Route(REPOSITORY + "/revision/{revision:path}", self.handler(self.info)),
            Route(REPOSITORY + "/tree/{revision}", tree),
            Route(REPOSITORY + "/tree/{revision}/{path:path}", tree),
            Route(REPOSITORY + "/refs", self.handler(self.refs)),
            Route(REPOSITORY + "/paths-info/{revision}", self.paths_info, methods=["POST"]),
            Route("/cdn/{digest}", self.send_large),
            Route("/{kind}/{owner}/{name}/resolve/{revision}/{path:path}", file),
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", file),
        ]

    def handler(self, page: Page) -> Handler:
        """Make a handler that looks up the revision, checks the user's access, and answers."""

        async def respond(request: Request) -> Response:
            user = self._note(request)
            commit = None
            try:
                _check_token(request)
                found = self._find(request)
                commit = found.commit
                if found.is_gated and page == self.resolve:
                    _check_access(found.name, user)
                return page(request, found)
            except Refusal as refusal:
                if refusal.code == "RepoNotFound" and user is None:
                    # The Hub does not tell strangers whether there is a private repository.
                    refusal = Refusal(401, "RepoNotFound", "Invalid username or password.")
                return _response(refusal, commit)

        return respond

    def info(self, request: Request, found: Snapshot) -> Response:
        """Describe a revision."""
        return JSONResponse(found.as_json())

    def tree(self, request: Request, found: Snapshot) -> Response:
        """List a folder."""
        is_recursive = request.query_params.get("recursive", "").lower() == "true"
        under = request.path_params.get("path", "").strip("/")
        return JSONResponse(found.tree(under, is_recursive=is_recursive))

    def refs(self, request: Request, found: Snapshot) -> Response:
        """List the branches."""
        branches = [
            {
                "name": branch,
                "ref": f"refs/heads/{branch}",
                "targetCommit": self.hub.snapshot(found.name, branch).commit,
            }
            for branch in self.hub.repositories[found.name].revisions
        ]
        return JSONResponse({"branches": branches, "tags": [], "converts": []})

    async def paths_info(self, request: Request) -> Response:
        """Describe some files."""
        if "json" in request.headers.get("content-type", ""):
            paths = (await request.json())["paths"]
        else:
            paths = (await request.form()).getlist("paths")

        def describe(_: Request, found: Snapshot) -> Response:
            return JSONResponse([found.blobs[p].as_json() for p in paths if p in found.blobs])

        return await self.handler(describe)(request)

    def resolve(self, request: Request, found: Snapshot) -> Response:
        """Send a file, or say where the large storage has it."""
        if (blob := found.blobs.get(request.path_params["path"])) is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": found.commit, "Accept-Ranges": "bytes"}
        if not blob.is_large:
            headers["ETag"] = f'"{blob.oid}"'
            return FileResponse(blob.file, headers=headers, media_type="text/plain")
        self.large[blob.sha256] = blob
        headers["X-Linked-Size"] = str(blob.size)
        headers["X-Linked-ETag"] = f'"{blob.sha256}"'
        # Another host name, as of the Hub's storage: no token is sent there.
        headers["Location"] = f"http://localhost:{request.url.port}/cdn/{blob.sha256}"
        return Response(status_code=302, headers=headers)

    async def send_large(self, request: Request) -> Response:
        """Send a file of the large storage, or the part of it that is asked for."""
        self._note(request)
        blob = self.large[request.path_params["digest"]]
        return FileResponse(blob.file, headers={"ETag": f'"{blob.sha256}"'})

    def _find(self, request: Request) -> Snapshot:
        where = request.path_params
        name = f"{where['owner']}/{where['name']}"
        found = self.hub.snapshot(name, where.get("revision", "main"))
        if f"{found.kind}s" != where.get("kind", "models"):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return found

    def _note(self, request: Request) -> str | None:
        user = _user_of(request)
        self.hub.requests.append((request.method, request.url.path, user))
        return user


class Writing:
    """What `create_repo`, `upload_folder` and `push_to_hub` ask for.

    Args:
        hub: What is changed.
    """

    def __init__(self, hub: ImitationHub) -> None:
        self.hub = hub

    def routes(self) -> list[Route]:
        """List the addresses."""
        pages = {
            "/api/whoami-v2": self.whoami,
            "/api/repos/create": self.create,
            "/api/validate-yaml": self.validate,
            REPOSITORY + "/preupload/{revision}": self.preupload,
            REPOSITORY + "/commit/{revision}": self.commit,
        }
        return [
            Route(path, self.handler(page), methods=["GET", "POST"]) for path, page in pages.items()
        ]

    def handler(self, page: Handler) -> Handler:
        """Make a handler that answers users who are logged in."""

        async def respond(request: Request) -> Response:
            user = _user_of(request)
            self.hub.requests.append((request.method, request.url.path, user))
            if user is None:
                return _response(Refusal(401, "", "Invalid username or password."))
            try:
                return await page(request)
            except Refusal as refusal:
                return _response(refusal)

        return respond

    async def whoami(self, request: Request) -> Response:
        """Say who asks."""
        return JSONResponse({"type": "user", "name": _user_of(request), "orgs": [], "auth": {}})

    async def create(self, request: Request) -> Response:
        """Make an empty repository."""
        asked = await request.json()
        name = f"{asked.get('organization') or _user_of(request)}/{asked['name']}"
        kind = asked.get("type") or "model"
        url = f"{request.base_url!s}{'datasets/' if kind == 'dataset' else ''}{name}"
        try:
            self.hub.create(name, kind)
        except Refusal as refusal:
            return JSONResponse({"error": refusal.message, "url": url}, refusal.status)
        return JSONResponse({"url": url, "name": name, "id": name})

    async def validate(self, request: Request) -> Response:
        """Accept the head of any card."""
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request: Request) -> Response:
        """Ask for all files in the commit itself."""
        asked = await request.json()
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for file in asked["files"]
        ]
        return JSONResponse({"files": files})

    async def commit(self, request: Request) -> Response:
        """Add and delete files."""
        where = request.path_params
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        name = f"{where['owner']}/{where['name']}"
        commit = self.hub.commit(name, where["revision"], lines).commit
        url = f"{request.base_url!s}{name}/commit/{commit}"
        return JSONResponse({"success": True, "commitOid": commit, "commitUrl": url})


def _response(refusal: Refusal, commit: str | None = None) -> Response:
    headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
    if commit:
        headers["X-Repo-Commit"] = commit
    return JSONResponse({"error": refusal.message}, refusal.status, headers)


def _token_of(request: Request) -> str | None:
    return request.headers.get("authorization", "").removeprefix("Bearer ") or None


def _user_of(request: Request) -> str | None:
    return USERS.get(_token_of(request) or "")


def _check_token(request: Request) -> None:
    if _token_of(request) is not None and _user_of(request) is None:
        raise Refusal(401, "", "Invalid credentials in Authorization header")


def _check_access(name: str, user: str | None) -> None:
    if user is None:
        raise Refusal(401, "GatedRepo", f"Access to model {name} is restricted. Please log in.")
    if user != USERS[TOKEN]:
        raise Refusal(
            403,
            "GatedRepo",
            f"Access to model {name} is restricted and you are not in the authorized list.",
        )


@contextmanager
def serve(hub: ImitationHub) -> Iterator[str]:
    """Serve a Hub on a free port of this machine until the block ends.

    Args:
        hub: What to serve.

    Yields:
        Its address, as `HF_ENDPOINT` takes it.
    """
    config = uvicorn.Config(
        Starlette(routes=[*Writing(hub).routes(), *Reading(hub).routes()]),
        port=0,
        log_level="error",
        lifespan="off",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
