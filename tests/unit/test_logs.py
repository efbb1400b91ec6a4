"""A log that cannot be written stops nobody, and changes no exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOG = """
import structlog
from tink.logs import configure_logs
configure_logs("info")
structlog.get_logger("tink.trainer").info("first", job="s:train:0:1")
structlog.get_logger().error("second")
"""
NO_SUCH_SETTING = "import sys; from tink.cli.main import main; sys.exit(main(['serve', '--port', '70000']))"


@pytest.mark.parametrize(("program", "status"), [(LOG, 0), (NO_SUCH_SETTING, 2)])
def test_a_full_disk_under_the_log_changes_nothing(program: str, status: int) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-c", program], stderr=full, check=False)
    assert ended.returncode == status


def test_a_reader_that_is_gone_changes_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", LOG], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait() == 0


def test_a_line_is_an_event_with_its_fields() -> None:
    ended = subprocess.run([sys.executable, "-c", LOG], stderr=subprocess.PIPE, check=True)
    lines = ended.stderr.splitlines()
    assert lines[0].endswith(b"level=info event=first job=s:train:0:1")
    assert lines[1].endswith(b"level=error event=second")
