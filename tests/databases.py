"""Real database servers for tests: a private one on a free port of 127.0.0.1, with an empty database `mlflow`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path

from helpers import free_port

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
MYSQL = shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin")
SECONDS = 60


def _as_user(user: str, command: Sequence[str]) -> list[str]:
    """Neither server runs as root; Debian's packages bring users for them."""
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return [*drop, *command] if not os.getuid() else list(command)


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def missing(kind: str) -> str:
    """Why there can be no such server here; empty if there can."""
    installed = {"postgresql": bool(POSTGRES), "mysql": bool(MYSQL)}
    package, driver, user = {
        "postgresql": ("postgresql", "psycopg2", "postgres"),
        "mysql": ("mariadb-server", "pymysql", "mysql"),
    }[kind]
    if not installed[kind]:
        return f"no {kind} server is installed (Debian: apt-get install {package})"
    if find_spec(driver) is None:
        return f"{driver} is not installed (pip install 'llgbm[{kind}]')"
    if not os.getuid() and not _has_user(user):
        return f"root may not run {kind} and there is no user {user}"
    return ""


@contextmanager
def _folder_of(user: str) -> Iterator[Path]:
    made = subprocess.check_output(
        _as_user(user, ["mktemp", "-d", "-p", tempfile.gettempdir()]), text=True
    )
    folder = Path(made.strip())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _postgresql() -> Iterator[str]:
    port = free_port()
    with _folder_of("postgres") as folder:
        control = [
            str(POSTGRES[-1] / "pg_ctl"),
            "-D",
            str(folder / "data"),
            "-l",
            str(folder / "log"),
            "-w",
        ]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"

        def call(*command: str, check: bool = True) -> None:
            subprocess.run(
                _as_user("postgres", command), check=check, cwd=folder, stdout=subprocess.DEVNULL
            )

        call(
            str(POSTGRES[-1] / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            "llgbm",
            "--auth=trust",
            "--no-sync",
        )
        try:
            call(*control, "-o", options, "start")
            call(
                str(POSTGRES[-1] / "createdb"),
                "-h",
                "127.0.0.1",
                "-p",
                str(port),
                "-U",
                "llgbm",
                "mlflow",
            )
            yield f"postgresql://llgbm@127.0.0.1:{port}/mlflow"
        finally:
            call(*control, "-m", "immediate", "stop", check=False)


@contextmanager
def _mysql() -> Iterator[str]:
    port = free_port()
    with _folder_of("mysql") as folder:
        data = ["--no-defaults", f"--datadir={folder / 'data'}"]
        install = [
            "mariadb-install-db",
            *data,
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ]
        subprocess.run(
            _as_user("mysql", install), check=True, cwd=folder, stdout=subprocess.DEVNULL
        )
        setup = folder / "setup.sql"
        setup.write_text(
            "CREATE DATABASE mlflow CHARACTER SET utf8mb4;\n"
            "CREATE USER llgbm@'127.0.0.1';\n"
            "GRANT ALL ON mlflow.* TO llgbm@'127.0.0.1';\n"
        )
        where = [
            "--skip-name-resolve",
            "--bind-address=127.0.0.1",
            f"--port={port}",
            f"--socket={folder / 'socket'}",
        ]
        command = [
            str(MYSQL),
            *data,
            *where,
            f"--init-file={setup}",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                _as_user("mysql", command), cwd=folder, stdout=log, stderr=log
            )
        try:
            _wait_for_mysql(process, port, folder / "log")
            yield f"mysql://llgbm@127.0.0.1:{port}/mlflow"
        finally:
            process.terminate()
            process.wait(SECONDS)


def _wait_for_mysql(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import pymysql

    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            pymysql.connect(host="127.0.0.1", port=port, user="llgbm", database="mlflow").close()
            return
        except pymysql.Error:
            time.sleep(0.2)
    raise RuntimeError(f"the database did not come up: {log.read_text()[-2000:]}")


DATABASES: Mapping[str, Callable[[], AbstractContextManager[str]]] = {
    "postgresql": _postgresql,
    "mysql": _mysql,
}
