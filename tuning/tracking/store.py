"""Check and open MLflow stores, and turn their errors into one sentence.

Addresses are probed first, because MLflow retries a dead one for minutes. MLflow is imported on first use, after
its settings are in the environment.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from llgbm.runtime import UserError, keep_secret, redact
from tuning.tracking.location import follow_move

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROBE_SECONDS = 3.0
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306}
# Installed by `llgbm[postgresql]` and `llgbm[mysql]`; SQLAlchemy's own default differs between its versions.
DRIVERS = {"postgresql": "psycopg2", "mysql": "pymysql"}
UNWRITABLE = (
    "unable to open",
    "readonly",
    "read-only",
    "permission denied",
    "no such file",
    "file exists",
)
LOGINS_VARIABLE = (
    "LLGBM_STORE_LOGINS"  # logins of stores by address, for this process and its workers
)
LOGIN_VARIABLES = (
    LOGINS_VARIABLE,
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
)
ALLOWED = "http(s)://host:port, sqlite:///path, postgresql://host/name or mysql://host/name"


LOOPBACK = ("localhost", "127.0.0.1", "::1")
NO_PROXY = ("no_proxy", "NO_PROXY")
KINDS = ("http", "https", "all")
PROXIES = [f"{kind}_proxy" for kind in KINDS] + [f"{kind}_PROXY".upper() for kind in KINDS]
LOGIN_REMEDY = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def quiet_mlflow() -> None:
    """Turn off MLflow's telemetry, progress bars and chatter, unless the environment sets them."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    pass_proxies()
    for name in ("alembic", "alembic.runtime.migration", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


def pass_proxies() -> None:
    """Let requests to this machine itself go past the proxies of the environment."""
    if not any(os.environ.get(name) for name in PROXIES):
        return
    known = [os.environ.get(name, "") for name in NO_PROXY]
    hosts = [host.strip() for text in known for host in text.split(",") if host.strip()]
    for name in NO_PROXY:
        os.environ[name] = ",".join(dict.fromkeys((*hosts, *LOOPBACK)))


def connect(tracking_uri: str) -> MlflowClient:
    """Return a client of the store at `tracking_uri`, for tracking and registry."""
    quiet_mlflow()
    from mlflow import MlflowClient

    uri = with_login(tracking_uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def all_pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield the results of a paged MLflow search; `search` takes a page token."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def local_tracking_uri(root: Path) -> str:
    """Return the address of the SQLite store under `root`, used when no server is given."""
    return sqlite_uri(Path(root).resolve() / "mlruns" / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """Return the address of a SQLite file: SQLAlchemy decodes a percent sign, and ends the path at a question mark."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def without_login(uri: str) -> str:
    """Return the address without its login, which moves to the environment of this process and of its workers.

    So an address can be printed, tagged and pickled. MLflow reads the login of a server from its own variables.
    """
    parts = urlsplit(uri)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return uri
    user, _, password = login.partition(":")
    keep_secret(unquote(password))
    if parts.scheme in ("http", "https"):
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    known = json.loads(os.environ.get(LOGINS_VARIABLE, "{}"))
    known[host + parts.path] = login
    os.environ[LOGINS_VARIABLE] = json.dumps(known)
    return parts._replace(netloc=host).geturl()


def with_login(uri: str) -> str:
    """Return the address of a database with the login that `without_login` took from it."""
    parts = urlsplit(uri)
    login = json.loads(os.environ.get(LOGINS_VARIABLE, "{}")).get(parts.netloc + parts.path)
    if login is None or parts.scheme in ("http", "https"):
        return uri
    return parts._replace(netloc=f"{login}@{parts.netloc}").geturl()


def logins() -> dict[str, str]:
    """Return what the environment holds to log in to stores with, for workers on other machines."""
    return {name: os.environ[name] for name in LOGIN_VARIABLES if name in os.environ}


@contextmanager
def store_errors(tracking_uri: str) -> Iterator[None]:
    """Turn errors of MLflow, the database and the disk into a UserError of one sentence."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise UserError(
            f"the MLflow store {redact(tracking_uri)} cannot be used ({_reason(error)}): {_remedy(str(error))}."
        ) from error
    finally:
        _drop_misread(tracking_uri)


def _drop_misread(uri: str) -> None:
    """Delete the empty folders that MLflow makes for a SQLite address as it is spelled, percent signs and all."""
    if not uri.startswith("sqlite:///") or unquote(uri) == uri:
        return
    for folder in Path(uri.removeprefix("sqlite:///")).parents:
        if unquote(str(folder)) == str(folder):
            return
        with suppress(OSError):
            folder.rmdir()


def _reason(error: Exception) -> str:
    lines = redact(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0][:200].rstrip(". ")


def _remedy(reason: str) -> str:
    text = reason.lower()
    if "disk is full" in text or "no space left" in text:
        return "free some disk space or choose another folder"
    if any(sign in text for sign in UNWRITABLE):
        return "choose a folder that you may write to"
    if "out-of-date database schema" in text:
        return _schema_remedy(text)
    if re.search(r"(error|status) code 40[13]\b|permission_denied|not authenticated", text):
        return f"it asks for a login, so {LOGIN_REMEDY}"
    if "no module named" in text:
        return "install the driver of that database, or use sqlite:///path"
    return f"check the address and its log, or choose another one ({ALLOWED})"


def _schema_remedy(reason: str) -> str:
    """Tell a newer schema from an older one by MLflow's migrations: MLflow calls both out of date."""
    import mlflow

    found = re.search(r"found version (\w+)", reason)
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if found and not any(migrations.glob(f"{found[1]}_*.py")):
        return "a newer MLflow made it, so install that version, or choose another store"
    return "copy the database and run `mlflow db upgrade` on it, or choose another one"


def check_login(uri: str) -> None:
    """Raise UserError if a password in an address holds a character that ends the name of the host."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc and redact(uri).count("@") < uri.count("@"):
        raise UserError(
            f"the login in the {parts.scheme} address of the store cannot be read: write the characters / # ? and @ of "
            "a password as %2F, %23, %3F and %40"
        )


def usable_uri(tracking_uri: str) -> str:
    """Check that an address is supported, answers and is writable; return it without login, SQLite paths absolute.

    Raises UserError within seconds where MLflow would retry for minutes.
    """
    scheme = urlsplit(tracking_uri).scheme.partition("+")[0]
    check_login(tracking_uri)
    tracking_uri = without_login(tracking_uri)
    if scheme in ("http", "https"):
        _probe_http(tracking_uri.rstrip("/"))
        return tracking_uri.rstrip("/")
    if scheme == "sqlite":
        path = sqlite_path(tracking_uri)
        _probe_sqlite(path)
        with suppress(
            sqlite3.Error
        ):  # of a database that is no store of MLflow: told when it is read
            follow_move(path)
        return sqlite_uri(path)
    if scheme in DATABASE_PORTS:
        _probe_socket(tracking_uri, DATABASE_PORTS[scheme])
        return with_driver(tracking_uri)
    raise UserError(
        f"the tracking address {redact(tracking_uri)!r} is of an unsupported kind: use {ALLOWED}."
    )


def existing_uri(tracking_uri: str) -> str:
    """Check an address like `usable_uri`, but refuse a missing SQLite file instead of creating it."""
    if tracking_uri.startswith("sqlite:") and not sqlite_path(tracking_uri).is_file():
        raise UserError(
            f"there is no MLflow store at {sqlite_path(tracking_uri)} yet: run a study in this folder first "
            "(`make ablation`), or give the address of another store."
        )
    return usable_uri(tracking_uri)


def with_driver(uri: str) -> str:
    """Return a database address with the driver that this package installs, unless it names one."""
    scheme, rest = uri.split(":", 1)
    if scheme not in DRIVERS:
        return uri
    return f"{scheme}+{DRIVERS[scheme]}:{rest}"


def _probe_http(uri: str) -> None:
    import requests

    check_port(uri)
    pass_proxies()
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not insecure
    try:
        code = requests.get(
            f"{uri}/health",
            timeout=PROBE_SECONDS,
            verify=verify,
            auth=_server_login(),
            headers=_server_token(),
        ).status_code
    except requests.exceptions.RequestException as error:
        raise UserError(
            f"no MLflow server answers at {redact(uri)} ({type(error).__name__}): start one with `mlflow "
            "server`, correct the address, or leave it out to use the local store."
        ) from error
    if code in (401, 403):
        what = "refuses this login" if _server_login() or _server_token() else "asks for a login"
        raise UserError(f"the server at {redact(uri)} {what} (HTTP {code}): {LOGIN_REMEDY}.")
    if code == 404 or code >= 500:
        raise UserError(
            f"the server at {redact(uri)} answers /health with HTTP {code}, so it is no working MLflow "
            "server: correct the address, or leave it out to use the local store."
        )


def _server_login() -> tuple[str, str] | None:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if not user:
        return None
    return user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")


def _server_token() -> dict[str, str]:
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if not token or _server_login():
        return {}
    return {"Authorization": f"Bearer {token}"}


def check_port(uri: str) -> int | None:
    """Return the port of an address, None if it names none. Raises UserError if that is no port."""
    try:
        port = urlsplit(uri).port
    except ValueError as error:
        raise UserError(f"{redact(uri)!r} has no proper port: give one from 1 to 65535.") from error
    if port == 0:
        raise UserError(f"{redact(uri)!r} has no proper port: give one from 1 to 65535.")
    return port


def _probe_socket(uri: str, default_port: int) -> None:
    parts = urlsplit(uri)
    host, port = parts.hostname or "localhost", check_port(uri) or default_port
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no database answers at {host}:{port} ({error}): start it, correct the address, or leave it "
            "out to use the local store."
        ) from error


def sqlite_path(uri: str) -> Path:
    """Return the file of a SQLite address. Raises UserError if it names none."""
    path = uri.partition(":///")[2].partition("?")[0]
    if not path:
        raise UserError(
            f"the tracking address {uri!r} names no file: write sqlite:///path/to/mlflow.db."
        )
    return Path(unquote(path)).expanduser().resolve()


def _probe_sqlite(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=PROBE_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE llgbm_write_probe (x)")
            database.rollback()
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"the MLflow store {path} cannot be written ({error}): {_remedy(str(error))}."
        ) from error


def make_database(path: Path) -> None:
    """Create a SQLite store under a temporary name, then rename it: MLflow cannot repair a half-made one."""
    if path.exists() and path.stat().st_size:
        return
    aside = path.with_name(f".{path.name}.making")
    aside.unlink(missing_ok=True)
    connect(sqlite_uri(aside)).search_experiments(max_results=1)
    os.replace(aside, path)


@contextmanager
def unless_there() -> Iterator[None]:
    """Let the creation of something pass that another process has created since it was looked for."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def open_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Return the id of an experiment, new or found, with its `artifacts` there if it is new.

    Raises UserError if it was deleted.
    """
    if client.get_experiment_by_name(name) is None:
        with unless_there():
            client.create_experiment(name, artifact_location=artifacts)
    found = client.get_experiment_by_name(name)
    assert found is not None, name
    if found.lifecycle_stage == "active":
        return found.experiment_id
    raise UserError(
        f"the MLflow experiment {name!r} was deleted: restore it with `mlflow experiments restore "
        f"--experiment-id {found.experiment_id}`, or choose another experiment name."
    )
