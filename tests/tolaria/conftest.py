"""Fixtures of the session's tests."""

from session_fixtures import drive as drive
from session_fixtures import world as world
