"""Signed download URLs: they work for what was signed, for as long as was said, and for nothing else."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import trio
from api_double import RUN, SESSION, WHEN
from hypothesis import given
from hypothesis import strategies as st

from tink import limits
from tink.api import downloads
from tink.api.downloads import Downloads, _find
from tink.errors import NotFound, Unauthorized
from tink.world import World

ASK = f"/api/v1/training_runs/{RUN}/checkpoints/external_weights/final/external_weights_urls"
FOLDER = f"{SESSION}/0/00000003-external_weights"


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / FOLDER
    (folder / "a b").mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(b"{}!")
    (folder / "a b" / "c.bin").write_bytes(b"12345")
    return folder


async def test_every_file_can_be_downloaded_without_a_key(client, files):
    answer = (await client.get(ASK)).json()
    assert answer["expires"] == "2023-11-14T23:13:20Z"
    got = {name: (await client.get(url)).content for name, url in answer["urls"].items()}
    assert got == {"adapter_config.json": b"{}!", "a b/c.bin": b"12345"}


async def test_a_download_can_be_resumed_and_asked_about(client, files):
    url = (await client.get(ASK)).json()["urls"]["a b/c.bin"]
    part = await client.get(url, headers={"Range": "bytes=2-"})
    assert (part.status_code, part.content) == (206, b"345")
    head = await client.head(url)
    assert (head.headers["Content-Length"], head.content) == ("5", b"")


@pytest.mark.parametrize("base", ["https://tink.example:8443", "http://10.0.0.7"])
async def test_the_urls_begin_as_the_request_did(app, files, base):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as client:
        urls = (await client.get(ASK)).json()["urls"].values()
    assert all(url.startswith(f"{base}{downloads.PATH}/") for url in urls)


async def test_behind_a_path_prefix_the_urls_have_it(app, files):
    transport = httpx.ASGITransport(app, root_path="/prefix")
    async with httpx.AsyncClient(transport=transport, base_url="http://tink/prefix") as client:
        urls = (await client.get(ASK)).json()["urls"]
        url = urls["adapter_config.json"]
        assert url.startswith(f"http://tink/prefix{downloads.PATH}/")
        assert (await client.get(url)).content == b"{}!"


async def test_an_url_ends_when_it_said(client, files, world):
    url = (await client.get(ASK)).json()["urls"]["adapter_config.json"]
    world.time = WHEN + limits.LINK_SECONDS - 1
    assert (await client.get(url)).is_success
    world.time = WHEN + limits.LINK_SECONDS + 1
    assert (await client.get(url)).status_code == 401


async def test_an_url_is_for_one_file_and_one_time(client, files):
    one, other = (await client.get(ASK)).json()["urls"].values()
    query = parse_qs(urlsplit(one).query)
    signature, expires = query["signature"][0], query["expires"][0]
    for forged in (
        one.replace(signature, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        one.replace(signature, ""),
        one.replace(signature, "é"),
        one.replace(f"expires={expires}", f"expires={int(expires) + 1}"),
        one.replace(f"expires={expires}", "expires=never"),
        one.partition("?")[0],
        f"{other.partition('?')[0]}?{urlsplit(one).query}",
    ):
        answer = await client.get(forged)
        assert answer.status_code == 401, forged
        assert list(answer.json()) == ["detail"]


async def test_files_that_are_gone_are_not_found(client, files):
    url = (await client.get(ASK)).json()["urls"]["adapter_config.json"]
    (files / "adapter_config.json").unlink()
    answer = await client.get(url)
    assert answer.status_code == 404
    assert "gone" in answer.json()["detail"]


NASTY = [
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../b",
    "link",
    "link/passwd",
    "loop",
]


@pytest.mark.parametrize("path", NASTY)
def test_nothing_outside_the_folder_is_served_even_if_signed(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("x")
    (root / "link").symlink_to("/etc")
    (root / "loop").symlink_to("loop")
    with pytest.raises(NotFound):
        _find(root, path)


@given(path=st.text(st.sampled_from("./a~%\\\x00é")))
def test_no_path_leaves_the_folder(tmp_path_factory, path):
    root = tmp_path_factory.getbasetemp() / "artifacts"
    root.mkdir(exist_ok=True)
    (root / "a").write_text("x")
    try:
        found = _find(root, path)
    except NotFound:
        return
    assert found == root / "a"


@given(path=st.text(), expires=st.text(), signature=st.text())
def test_a_guessed_signature_is_never_right(path, expires, signature):
    with pytest.raises(Unauthorized):
        trio.run(Downloads(Path("/nowhere"), b"secret", World()).file, path, expires, signature)
