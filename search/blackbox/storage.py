"""Databases that hold Optuna studies: connect, and say clearly why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

HEARTBEAT = 10  # seconds between two signs of life of a worker
GRACE = 30  # seconds without one until its trial is given to another worker
MAX_RETRIES = 3  # of one trial: one that kills every worker is given up


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from reporting every trial; trials that fail are raised here anyway."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def queue_again(study: Study, trial: FrozenTrial) -> None:
    """Let another worker, or this one later, repeat a failed trial; MAX_RETRIES times at most."""
    RetryHeartbeatStaleTrialCallback(MAX_RETRIES)(study, trial)


@quiet()
def open_storage(url: str, create: bool = True) -> RDBStorage:
    """Connect to a database and create Optuna's tables if they are missing.

    Raises:
        ValueError: If the URL, the driver or the connection is at fault.
    """
    address = _parse(url)
    options: dict[str, Any] = {"pool_pre_ping": True}  # servers drop idle connections
    sqlite = address.get_backend_name() == "sqlite"
    if sqlite:
        options = {"connect_args": {"timeout": 60}}  # seconds to wait for another writer
        if address.database:
            path = Path(address.database)
            if not create and not path.is_file():
                raise ValueError(f"There is no file {path} to find a study in.")
            path.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = RDBStorage(
            address.render_as_string(hide_password=False),
            engine_kwargs=options,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=queue_again,
        )
        if sqlite:
            event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()  # connections made before that
        return storage
    except ImportError as error:
        raise ValueError(
            f"{shown(url)} needs a database driver that is not installed ({error.__cause__}). "
            "For PostgreSQL: pip install 'bitplan[postgresql]'."
        ) from error
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ValueError(
            f"{shown(url)} cannot be opened: {reason} Check that the server runs, the database "
            "exists and the user may write to it."
        ) from error


def _write_ahead(connection: Any, _: Any) -> None:
    """SQLite's write-ahead log: a trial's many small writes take a sixth of the time."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")  # with the log safe against kill -9 and crash


def _parse(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise ValueError(
            f"{url.rpartition('@')[2]!r} is not a storage URL. Write it like "
            "sqlite:///runs/demo/job.sqlite or postgresql://user:password@host/database."
        ) from error
    if address.drivername in ("postgres", "postgresql"):
        return address.set(drivername="postgresql+psycopg")  # the driver of bitplan[postgresql]
    return address


def shown(url: str) -> str:
    """The URL without its password."""
    return _parse(url).render_as_string(hide_password=True)
