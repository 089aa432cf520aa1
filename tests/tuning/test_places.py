"""Places that a sweep cannot use: one sentence before anything is built; and places that look odd but work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, Quiet, answering, free_port
from made_study import make_study

from llgbm.runtime import UserError
from tuning.report.__main__ import main as report
from tuning.search.points import find_search, open_search, optuna_url
from tuning.studies import STUDIES, StudyOptions, phase_4_5
from tuning.sweep import places
from tuning.sweep.checkpoints import check_storage, trial_lock
from tuning.sweep.cluster import Node, Resources, check_resources, connect_ray
from tuning.sweep.memory import fit_memory, free_bytes
from tuning.tracking.store import pass_proxies, usable_uri
from tuning.tracking.study import StudyTracker
from tuning.ui import check_free


def refusal(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_ray_cannot_use_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(UserError, match="bytes too long for Ray's sockets: set RAY_TMPDIR"):
        places.check_ray_folder()
    assert not (tmp_path / ("long" * 20)).exists()
    short = Path(os.path.realpath("/tmp")) / f"p{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setenv("RAY_TMPDIR", str(short))
        places.check_ray_folder()
        monkeypatch.setattr(places, "FREE_BYTES", 2**60)
        with pytest.raises(UserError, match="MB left"):
            places.check_ray_folder()
        (short / "ray").rmdir()
        (short / "ray").touch()
        with pytest.raises(UserError, match="Ray cannot write to its folder") as error:
            places.check_ray_folder()
        refusal(error)
    finally:
        (short / "ray").unlink(missing_ok=True)
        short.rmdir()


@pytest.mark.parametrize(
    "address", ["head:99999", "head:0", "head:port", "head:", ":6379", "ray://head:-1"]
)
def test_a_bad_port_of_a_cluster_is_one_sentence(address: str) -> None:
    with pytest.raises(UserError, match="the port from 1 to 65535") as error:
        connect_ray(address)
    refusal(error)


@pytest.mark.parametrize(
    "uri", ["http://host:99999", "postgresql://host:x/y", "mysql://host:0/y", "http://host:-5/"]
)
def test_a_bad_port_of_a_store_is_one_sentence(uri: str) -> None:
    with pytest.raises(UserError, match="has no proper port") as error:
        usable_uri(uri)
    refusal(error)


def test_a_port_that_cannot_be_served_at_is_one_sentence() -> None:
    with with_codes(200) as port, pytest.raises(UserError, match=f"port {port} cannot be used"):
        check_free(port)
    with pytest.raises(UserError, match="--port is 70000"):
        check_free(70000)
    check_free(free_port())


def test_auto_with_a_dead_cluster_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", dead)
    with pytest.raises(UserError, match=f"answers at {dead} .RAY_ADDRESS.*unset RAY_ADDRESS"):
        connect_ray("auto")


@contextmanager
def with_codes(health: int, api: int = 500) -> Iterator[int]:
    """A server on this machine that answers `/health` and everything else with these codes; yields its port."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            code = health if self.path == "/health" else api
            body = b'{"error_code": "UNAUTHENTICATED", "message": "You are not authenticated."}'
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with answering(Handler) as port:
        yield port


def test_a_missing_login_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with with_codes(401) as port, pytest.raises(UserError, match="HTTP 401.*USERNAME") as error:
        usable_uri(f"http://127.0.0.1:{port}")
    refusal(error)
    with with_codes(200, 401) as port, pytest.raises(UserError, match="asks for a login") as error:
        StudyTracker.open(f"http://127.0.0.1:{port}", tmp_path, "x")
    refusal(error)


def test_loopback_goes_past_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    with with_codes(200) as port:
        assert usable_uri(f"http://127.0.0.1:{port}/") == f"http://127.0.0.1:{port}"
    pass_proxies()
    assert os.environ["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"


def test_a_gpu_fraction_is_placed_on_whole_gpus() -> None:
    assert [Node(16, 2).fits(1, share) for share in (0.6, 0.5, 0.4, 0.25, 1, 2)] == [
        *(2, 4, 4, 8, 2, 1)
    ]
    assert check_resources(1, 0.6, None, [Node(16, 2)]).concurrent == 2


def test_too_many_trials_for_the_memory_are_refused_or_fewer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = phase_4_5(StudyOptions(seeds=(0,)))
    forty = Resources(0.05, 0.0, 40, (Node(2, 0),))
    with pytest.raises(UserError, match="40 trials at once do not fit.*--max-concurrent") as error:
        fit_memory(forty, study, 40, 4 * 10**9)
    refusal(error)
    fewer = fit_memory(forty, study, None, 4 * 10**9)
    assert 1 <= fewer.concurrent < 9 and "instead of 40" in capsys.readouterr().err
    assert fit_memory(forty, study, 40, 10**12) is forty
    assert fit_memory(replace(forty, concurrent=1), study, None, 0).concurrent == 1
    assert 0 < free_bytes() < 10**14


def test_a_lock_of_somebody_else_is_one_sentence(tmp_path: Path) -> None:
    """A folder in its place cannot be opened by root either."""
    (tmp_path / "locks" / "theirs.lock").mkdir(parents=True)
    check_storage(str(tmp_path), ["mine"])
    for refuse in (
        lambda: check_storage(str(tmp_path), ["mine", "theirs"]),
        lambda: trial_lock(str(tmp_path), "theirs").__enter__(),
    ):
        with pytest.raises(UserError, match="theirs.lock cannot be opened") as error:
            refuse()
        refusal(error)


def test_percent_and_question_mark_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "50% of? it#1 %20"
    folder.mkdir()
    tracker = make_study(folder, {"multitask": 0.1, "weight-only": 0.0}, seeds=1)
    monkeypatch.chdir(folder)
    assert report(["latest"]) == 0
    assert (folder / "reports" / "made0001" / "report.html").is_file()
    again = StudyTracker.open(tracker.tracking_uri, folder, "llgbm")
    assert again.find_study("latest").info.run_id == tracker.parent_run_id
    search = STUDIES["optuna_lambda"](StudyOptions())
    url = optuna_url(None, folder)
    open_search(search, url)
    assert find_search(search, url) is not None
    assert find_search(search, optuna_url(tracker.tracking_uri, tmp_path)) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    made = {path.name for path in (folder / "mlruns").iterdir() if path.suffix == ".db"}
    assert made == {"mlflow.db", "optuna.db"}


LOCALES = (
    {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "latin-1"},
)
SPEAKS = r"""
from llgbm.runtime import speak_utf8
speak_utf8()
open("text", "w").write("\u03bb")
print("a \u03bb")
"""


@pytest.mark.parametrize("locale", LOCALES)
def test_any_locale_will_do(locale: dict[str, str], tmp_path: Path) -> None:
    env = {**os.environ, **locale}
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS], capture_output=True, env=env, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, b"a ?\n"), done.stderr
    assert (tmp_path / "text").read_bytes() == "λ".encode()


def test_every_program_speaks_utf8_before_it_reads_its_options() -> None:
    texts = [
        path.read_text() for part in ("llgbm", "tuning") for path in (ROOT / part).rglob("*.py")
    ]
    programs = [text for text in texts if "\nif __name__ == " in text]
    assert len(programs) >= 5
    begun = [
        re.search(r"^    begin_program\(\)\n    (?:return|sys\.exit\()\s*main\(\)", t, re.M)
        for t in programs
    ]
    assert all(begun)


def test_a_clone_with_crlf_has_none(tmp_path: Path) -> None:
    clone = ["git", "clone", "-q", "--depth", "1", "-c", "core.autocrlf=true"]
    done = subprocess.run([*clone, f"file://{ROOT}", str(tmp_path / "clone")], capture_output=True)
    if done.returncode:
        pytest.skip("this is no clone")
    texts = [*(tmp_path / "clone").rglob("*.py"), *(tmp_path / "clone").rglob("*.json")]
    assert texts and not [path for path in texts if b"\r\n" in path.read_bytes()]


AFTER_A_SWEEP = """
import os, subprocess, sys
from llgbm.runtime import exit_status
from tuning.sweep.cluster import check_resources, leave_ray, start_ray

def run():
    start_ray(check_resources(0.5, 0, None))
    import ray
    stranger = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print('joined')"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    env["RAY_AUTH_MODE"] = "disabled"
    gcs = ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", stranger, gcs], env=env, capture_output=True, text=True)
    print("joined" if "joined" in done.stdout else "refused")
    leave_ray()
    print('connected' if ray.is_initialized() else 'left')
    raise KeyError("unexpected")

sys.exit(exit_status(run, debug=False))
"""


@pytest.mark.whole
def test_a_sweeps_ray_admits_no_stranger_and_swallows_no_error() -> None:
    """The environment turns the token off, and an error comes after Ray was left."""
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_SWEEP], capture_output=True, text=True, env=env, timeout=280
    )
    assert done.stdout.split() == ["refused", "left"], done.stderr
    assert done.returncode == 1 and "KeyError: 'unexpected'" in done.stderr
