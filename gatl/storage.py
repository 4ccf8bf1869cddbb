"""The record of a search in a database: its address, the connection, and what can go wrong."""

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from gatl.errors import UserError

if TYPE_CHECKING:  # it takes a while, which a run without a database need not wait for
    from sqlalchemy.engine import URL, ExceptionContext

BACKENDS = ("postgresql", "mysql", "sqlite")
EXAMPLE = "postgresql://USER@HOST/DATABASE"
# A comma parts the names in trust=, and Optuna formats what stands in braces.
_PLAIN = re.compile(r"[!-~]+")
_SPECIAL = frozenset("{},'\"\\")
# Seconds, seconds and milliseconds in which a server must answer; and one whose database has no
# encoding of its own (the locale C) is to send text, not bytes.
_LIBPQ = {"connect_timeout": "10", "keepalives_idle": "10", "tcp_user_timeout": "30000"}
_LIBPQ |= {"client_encoding": "utf8"}


class StorageError(UserError):
    """What a database says instead of doing what it is told.

    Args:
        what: The database, and what is wrong.
        way_on: What to do when that is mended.
    """

    def __init__(self, what: str, way_on: str = "try again.") -> None:
        super().__init__(f"{what}: when that is mended, {way_on}")
        self.what = what


def require_address(key: str, address: str) -> None:
    """Check the URL of a database.

    Args:
        key: What holds it, for the message.
        address: As SQLAlchemy reads it.

    Raises:
        UserError: If it is none, or one that no run folder should keep.
    """
    from sqlalchemy.exc import ArgumentError

    try:
        url = _parsed(address)
    except (ArgumentError, ValueError) as error:  # ValueError: of a port that is no number
        raise _no_address(key, address) from error
    if url.get_backend_name() not in BACKENDS:
        raise _no_address(key, address)
    if url.password is not None or any("password" in name.lower() for name in url.query):
        raise UserError(
            f"{key} must hold no password, because the run folder keeps it: leave it to PGPASSWORD "
            "or ~/.pgpass (PostgreSQL), or to an option file (MySQL)."
        )
    if not _PLAIN.fullmatch(address) or _SPECIAL & set(address):
        raise UserError(
            f"{key} must hold no blanks, braces, commas, quotes or letters beyond ASCII, but got "
            f"{address!r}: write %2C for a comma, and so on."
        )
    if url.get_backend_name() == "sqlite" and not (url.database or "").startswith("/"):
        raise UserError(
            f"{key} must name SQLite's file from the root on, as in sqlite:////home/me/runs.db, "
            f"but got {address!r}."
        )


def _no_address(key: str, address: str) -> UserError:
    allowed = f"the URL of a database ({', '.join(BACKENDS)}), such as {EXAMPLE}"
    return UserError(f"{key} must be {allowed}, or null, but got {address!r}.")


def _parsed(address: str) -> "URL":
    from sqlalchemy.engine import make_url

    return make_url(address)


class Database(RDBStorage):
    """Optuna's storage in a database that says in one line what it will not do.

    Args:
        address: See `require_address`.
        new: Whether to make the tables where they lack, and to see if they may be written.

    Raises:
        UserError: If its driver is not installed, or its tables are another Optuna's.
        StorageError: If it cannot be reached or used; so does every call from then on.
    """

    def __init__(self, address: str, *, new: bool = True) -> None:
        from sqlalchemy import event
        from sqlalchemy.exc import SQLAlchemyError

        self.address = address
        url = _parsed(address)
        if url.drivername in ("postgresql", "postgresql+psycopg"):  # else SQLAlchemy's own choice
            url = url.set(drivername="postgresql+psycopg", query=_LIBPQ | dict(url.query))
        try:
            # Between two trials lie hours, in which a server may have started anew: ask it first.
            super().__init__(
                url.render_as_string(hide_password=False),
                {"pool_pre_ping": True},
                skip_table_creation=not new,
            )
            if new:
                self._require_writable()
        except ImportError as error:
            name = getattr(error.__cause__, "name", None) or error.__cause__
            install = "pip install 'gatl[postgres]'" if name == "psycopg" else "install it."
            raise UserError(f"{address} needs the package {name}: {install}") from error
        except (SQLAlchemyError, StorageInternalError) as error:
            self._close()
            raise StorageError(_refusal(address, error)) from error
        except RuntimeError as error:
            self._close()
            raise UserError(f"The tables in {address} are not this Optuna's: {error}") from error
        # Optuna would try to begin a trial five times, and one whose success was lost on its way
        # back would be there twice: it does not try again what it does not know.
        event.listen(self.engine, "handle_error", self._told)

    def _require_writable(self) -> None:
        """Write nothing at all, for which one needs the right to write."""
        from optuna.storages._rdb.models import StudyModel
        from sqlalchemy import false, insert, select

        nothing = select(StudyModel.study_name).where(false())
        with self.engine.begin() as connection:
            connection.execute(insert(StudyModel).from_select(["study_name"], nothing))

    def _told(self, context: "ExceptionContext") -> Exception | None:
        """Return what is raised for an error of the database."""
        from sqlalchemy.exc import IntegrityError

        error = context.sqlalchemy_exception
        # What is there already, Optuna sees to; a connection that has ended, SQLAlchemy.
        if error is None or isinstance(error, IntegrityError) or context.is_pre_ping:
            return None
        return StorageError(_refusal(self.address, error))

    def _close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.dispose()


def _refusal(address: str, error: BaseException) -> str:
    """Say what a database has answered, in its own words."""
    told = error.__cause__ if isinstance(error, StorageInternalError) else error
    words = " ".join(str(getattr(told, "orig", None) or told).split())[:300]
    return f"{address} cannot be used ({words})"


@contextlib.contextmanager
def connected(address: str | None, *, new: bool = True) -> Iterator[Database | None]:
    """Connect to a database, see `Database`; to none without an address."""
    if address is None:
        yield None
        return
    database = Database(address, new=new)
    try:
        yield database
    finally:
        database.engine.dispose()
