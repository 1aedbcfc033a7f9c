"""A Python for submitit's jobs that has imported the libraries, as each job would for seconds.

    python warm_python.py serve SOCKET       # imports, then forks a process for each job
    python warm_python.py SOCKET -u -m submitit.core._submit FOLDER

The second is what submitit starts; the job ends with it.
"""

import json
import os
import runpy
import signal
import socket
import sys
import threading
from contextlib import suppress


def serve(address):
    import minilm_exp.launching
    import minilm_exp.pipeline
    import minilm_exp.summary
    import minilm_exp.sweeping  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            client, _ = server.accept()
            data, files, _, _ = socket.recv_fds(client, 1 << 20, 2)
            pid = os.fork()
            if pid == 0:
                server.close()
                run_job(json.loads(data), files)
            for file in files:
                os.close(file)
            threading.Thread(target=attend, args=(client, pid), daemon=True).start()


def run_job(given, files):
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    sys.argv = given["arguments"]
    status = 1
    try:
        runpy.run_module("submitit.core._submit", run_name="__main__")
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attend(client, pid):
    """Tells the client when its job has ended, and ends the job of a client that is gone."""

    def tell():
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):
            client.send(bytes([os.waitstatus_to_exitcode(status) & 255]))
            client.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=tell, daemon=True).start()
    client.recv(1)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def ask(address, arguments):
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        given = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments}
        socket.send_fds(server, [json.dumps(given).encode()], [1, 2])
        sys.exit(server.recv(1)[0])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    # -u -m MODULE FOLDER
    ask(sys.argv[1], ["_submit", sys.argv[-1]])
