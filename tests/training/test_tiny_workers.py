"""Processes that draw scenes for the training of the embedded model."""

import signal
import subprocess
import sys

TRAINING = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from videosparse.training.tiny.pools import worker_init

pool = ProcessPoolExecutor(3, multiprocessing.get_context("fork"), initializer=worker_init)
waits = [pool.submit(time.sleep, 0.5) for _ in range(3)]
[wait.result() for wait in waits]
print("at work", flush=True)
time.sleep(600)
"""


def test_workers_end_with_a_training_that_is_killed():
    """They hold its standard output, which is at its end once all have gone."""
    with subprocess.Popen([sys.executable, "-c", TRAINING], stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout.readline() == "at work\n"
        training.send_signal(signal.SIGKILL)
        assert training.communicate(timeout=60)[0] == ""
