"""The course: the tasks that a worker runs, and the classroom around them.

The code uses a few words of its own. Where they stand for something, this is what:

- **clone**: the folder into which somebody has cloned the course. Each has a `.venv` and a pair of its own.
- **pair**: the two servers together, the broker and the backend.
- **role**: what a server of the pair is for, `"broker"` or `"backend"`.
- **lease**: the lock that every process holds while it uses the pair. The system drops it when the process ends.
- **guard**: the process that owns the pair's servers, and stops them when nobody has held the lease for a moment.
- **mark**: how the course recognises a server as its own: the name of its dump file and its folder.
- **stamp**: the file in `.venv` that says what is installed there, and whether the installation was completed.
- **copy**: a learner's own chapter in `my_notebooks/`. It is **as delivered** until the learner changes a cell.
- **pane**: the dark box under a cell, which follows the log of what the cell has started.
- **supervisor**: the process between a cell and the command that it has started. It never lets the command outlive
  the notebook.
- **slot**: what runs one task at a time in a worker: a process, a thread, or a place for one greenlet.
- **span**: one run of a task: who ran it, and from when to when.
- **journey**: the way of one task through the servers and the worker, as `Journey` watches it.
- **trail**: the way of one request through all its tasks, as `Trail` reads it from the logs.
- **judge**: the function that says why an answer to an exercise is wrong.
- **noisy**: a cell is noisy if a busy machine may spoil what it measures. The tests run it up to five times.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (Python 2 must be able to read this as well)
    import os
    import subprocess

    hint = "With one installed: python3.14"
    for newer in ("python3.14", "python3.13", "python3.12", "python3.11"):
        try:
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                works = subprocess.call([newer, "-c", ""], stderr=nowhere) == 0
        except OSError:
            works = False
        if works:
            hint = "This machine has one: " + newer
            break
    words = sys.argv[1:] if sys.argv[0] in ("-c", "-m") else []
    now = ".".join(map(str, sys.version_info[:3]))
    needed = "course_tasks: The course needs Python 3.11 or newer, and this is "
    sys.exit(needed + now + ". " + hint + " -m course_tasks " + " ".join(words or ["lab"]))
