"""A run that is killed and resumed, at whatever moment and however often, ends with the bits of one that was not.

Dropout makes the result depend on the random generators as well as on weights, moments and data position.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastadapter.checkpoints.files import read_tensors
from tests.training import crash_server
from tests.training.toy import STATE, adapter_bits

ROOT = Path(crash_server.__file__).parents[2]


class Server:
    """Starts children that train; they can be killed while they do."""

    def __init__(self):
        command = [sys.executable, "-m", crash_server.__name__]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder, *, resume=False, exit_at=None):
        command = {"folder": str(folder), "resume": resume, "exit_at": exit_at}
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self):
        """Wait status of the child."""
        return int(self.process.stdout.readline())

    def finish(self, folder, **options):
        self.start(folder, **options)
        assert self.wait() == 0
        record = json.loads((folder / "result.json").read_text())
        return record["history"], adapter_bits(folder), record["operations"]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()
    server.process.stdout.close()


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """History, weights and file operations of a run that is left alone, and how long it takes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    server.finish(tmp_path_factory.mktemp("warm"))
    started = time.monotonic()
    return *server.finish(folder), time.monotonic() - started


def test_killed_at_20_random_moments(server, uninterrupted, tmp_path):
    expected_history, expected_bits, _, duration = uninterrupted
    draw = random.Random(0)
    killed, steps = 0, set()
    for number in range(60):  # some children are done before their moment comes: those do not count
        folder = tmp_path / str(number)
        pid = server.start(folder)
        time.sleep(draw.uniform(0.02, 1.0) * duration)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = server.wait()
        if not os.WIFSIGNALED(status):
            continue
        killed += 1
        steps.add(len(read_tensors(folder / STATE)[0]["losses"]) if (folder / STATE).exists() else None)
        history, bits, _ = server.finish(folder, resume=True)
        assert history == expected_history and bits == expected_bits, f"killed run {number}"
        if killed == 20:
            break
    assert killed == 20 and len(steps) >= 4, "the moments must spread over the run"


def test_ended_before_a_file_operation(server, uninterrupted, tmp_path):
    """A file operation of every kind, in saves of every kind, is what does not happen any more."""
    expected_history, expected_bits, operations, _ = uninterrupted
    assert operations > 50
    # A save has six operations: each is skipped in one save or another.
    for number in range(0, operations, 5):
        folder = tmp_path / str(number)
        server.start(folder, exit_at=number)
        assert os.waitstatus_to_exitcode(server.wait()) == 9
        history, bits, _ = server.finish(folder, resume=True)
        assert history == expected_history and bits == expected_bits, f"ended before operation {number}"


def test_killed_again_and_again(server, uninterrupted, tmp_path):
    """Each life gets to write the files that the end of a run writes, and a little, and the run still arrives."""
    expected_history, expected_bits, _, _ = uninterrupted
    lives = 0
    while True:
        server.start(tmp_path, resume=True, exit_at=23)
        lives += 1
        if os.waitstatus_to_exitcode(server.wait()) == 0:
            break
        assert lives < 40
    assert lives > 3
    assert json.loads((tmp_path / "result.json").read_text())["history"] == expected_history
    assert adapter_bits(tmp_path) == expected_bits


def test_the_reference_is_not_trivial(uninterrupted):
    history, (final, best), _, _ = uninterrupted
    assert len(history["losses"]) == 12 and len(set(history["losses"])) == 12
    gates = [
        torch.frombuffer(bytearray(data), dtype=torch.float32)
        for name, data in final.items()
        if "gate" in name
    ]
    assert all(gate.abs().min() > 0 for gate in gates) and best
