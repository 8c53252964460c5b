"""The course: the tasks that a worker runs, and the classroom around them."""

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
