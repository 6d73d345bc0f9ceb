"""The local page of all runs: what it shows, to whom, and which files it never gives away."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bitplan.jobs.job import Job
from bitplan.jobs.settings import SearchSettings
from bitplan.reports.serve import make_server
from bitplan.reports.study import dashboard_command
from bitplan.tests.fakes import fake_run


class Answer(NamedTuple):
    status: int
    text: str
    headers: dict[str, str]


class Site(NamedTuple):
    root: Path
    port: int

    def get(self, path: str, host: str | None = None, method: str = "GET") -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        if host != "":
            connection.putheader("Host", host or f"127.0.0.1:{self.port}")
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        connection.close()
        return Answer(answer.status, text, dict(answer.getheaders()))

    def json(self, path: str) -> Any:
        answer = self.get(path)
        assert answer.status == 200, answer.text
        return json.loads(answer.text)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    root = tmp_path / "runs"
    (tmp_path / "secret.txt").write_text("secret")
    fake_run(root / "a", search=SearchSettings(budget="4.3bpw"))
    fake_run(root / "deep" / "b", search=SearchSettings(budget="3.4bpw"))
    (root / "a" / "report.html").write_text("<title>a report</title>")
    server: ThreadingHTTPServer = make_server(root, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Site(root, int(server.server_address[1]))
    server.shutdown()
    server.server_close()


def test_the_page_lists_the_runs(site: Site) -> None:
    page = site.get("/")
    assert page.status == 200
    assert "<h1>Runs</h1>" in page.text
    runs = {run["name"]: run for run in site.json("/api/runs")["runs"]}
    assert set(runs) == {"a", "deep/b"}
    assert runs["a"]["status"] == "done"
    assert runs["a"]["bpw"] == pytest.approx(4.3, abs=0.01)
    assert runs["a"]["report"] == "/files/a/report.html"
    assert runs["deep/b"]["report"] is None
    assert site.get(runs["a"]["report"]).text == "<title>a report</title>"


def test_only_this_machine_is_listened_to(site: Site) -> None:
    server = make_server(site.root, 0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()


def test_progress_of_a_running_job_is_seen(site: Site) -> None:
    with Job(site.root / "c", ["bitplan", "search", "x"], {}) as job, job.stage("profile"):
        job.on_progress("Profiling (fisher)", 0, 96)
        job._written = 0.0  # as if a second had passed
        job.on_progress("Profiling (fisher)", 24, 96)
        run = next(r for r in site.json("/api/runs")["runs"] if r["name"] == "c")
        assert (run["status"], run["done"], run["total"]) == ("running", 24, 96)
        details = site.json("/api/run?name=c")
        assert details["stages"][0]["name"] == "profile"
        assert details["log"][0]["event"] == "run started"
    run = next(r for r in site.json("/api/runs")["runs"] if r["name"] == "c")
    assert run["status"] == "done"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/files/../secret.txt",
        "/files/..%2Fsecret.txt",
        "/files/..%2F/secret.txt",
        "/files/%2e%2e/secret.txt",
        "/files/a/..%2F..%2Fsecret.txt",
        "/files/a%2F..%2F..%2F/secret.txt",
        "/files/a/profile.safetensors",
        "/files/a/job.lock",
        "/files/a/linked.png",
        "/files/a/frontier.png",
        "/files/%00/report.html",
        "/api/run?name=..",
        "/api/run?name=/etc",
        "/compare?a=a&b=..",
        "/files/a",
        "/nothing",
    ],
)
def test_nothing_else_is_given_away(site: Site, path: str) -> None:
    (site.root / "a" / "linked.png").write_text("no figure of a report")
    (site.root / "a" / "frontier.png").symlink_to(site.root.parent / "secret.txt")
    answer = site.get(path)
    assert answer.status in (400, 404)
    assert "secret" not in answer.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1"])
def test_other_names_for_this_machine_are_refused(site: Site, host: str) -> None:
    assert site.get("/api/runs", host=host).status == 421
    assert site.get("/api/runs", host=f"localhost:{site.port}").status == 200


def test_pages_may_load_nothing_from_elsewhere(site: Site) -> None:
    headers = site.get("/").headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


def test_only_reading_is_possible(site: Site) -> None:
    assert site.get("/", method="HEAD").text == ""
    assert site.get("/", method="POST").status == 501
    assert site.get("/", method="DELETE").status == 501


def test_two_runs_can_be_compared(site: Site) -> None:
    page = site.get("/compare?a=a&b=deep%2Fb")
    assert page.status == 200
    assert "of 21 modules change their format" in page.text


def test_a_plan_that_cannot_be_compared_is_explained(site: Site) -> None:
    (site.root / "a" / "plan.json").unlink()
    answer = site.get("/compare?a=a&b=deep%2Fb")
    assert answer.status == 400
    assert "holds no plan.json" in answer.text


def test_a_port_that_is_taken_is_explained(site: Site) -> None:
    with pytest.raises(ValueError, match=rf"Port {site.port} of 127.0.0.1 is taken"):
        make_server(site.root, site.port)


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        make_server(tmp_path / "nowhere", 0)


def test_the_trials_are_shown_by_optuna_dashboard(tmp_path: Path) -> None:
    fake_run(tmp_path, search=SearchSettings(budget="4.3bpw", solver="tpe"))
    with pytest.raises(ValueError, match="has no Optuna study"):
        dashboard_command(tmp_path, 8080)
    (tmp_path / "job.sqlite").touch()
    command = dashboard_command(tmp_path, 8080)
    assert command[:2] == ["optuna-dashboard", f"sqlite:///{tmp_path}/job.sqlite"]
    assert "127.0.0.1" in command


def test_a_shared_storage_is_handed_over(tmp_path: Path) -> None:
    url = "postgresql://user@host/studies"
    fake_run(tmp_path, search=SearchSettings(budget="4.3bpw", solver="tpe", storage=url))
    assert dashboard_command(tmp_path, 8080)[1] == url
