"""One real stack for the whole layer, started only when a test asks for it; and a real Urza behind a session."""

from checked_runs import every_run_is_judged as every_run_is_judged
from session_fixtures import drive as drive
from session_fixtures import world as world
from small_disk import small_disk as small_disk
from stack_fixture import stack as stack
