"""What a kernel of the course says after an error that the notebook's first cell would have prevented.

Every such kernel loads this when it starts, whatever its notebook is. So it imports nothing that takes time.
"""

import os
from pathlib import Path

from IPython import get_ipython

OURS = ("check", "quiz", "servers", "terminal", "tail", "stop", "kill", "progress")  # what the first cell brings
ADVICE = (
    "The first cell of this notebook hasn't been run since the kernel started.\n"
    "Run it, and then the cells above this one: Run > Run All Above Selected Cell."
)


def load_ipython_extension(ipython) -> None:
    """Look at the outcome of every cell from now on (IPython calls this).

    Args:
        ipython: the running IPython.
    """

    def advise(result) -> None:
        error = result.error_in_exec
        if isinstance(error, NameError):
            missing = error.name
        elif type(error).__name__ == "UsageError" and str(error).endswith("not found."):  # a magic
            missing = str(error).split("%")[-1].split("`")[0].split()[0]
        else:
            return
        if not ipython.find_cell_magic("terminal") and (missing in OURS or _in_a_chapter()):
            print(ADVICE)

    ipython.events.register("post_run_cell", advise)


def notebook_name() -> str:
    """The name of this kernel's notebook, without folder and suffix; "" where neither VS Code nor Jupyter tells it."""
    told = getattr(get_ipython(), "user_ns", {}).get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "")
    return Path(str(told)).stem


def _in_a_chapter() -> bool:
    from course_tasks import copies  # not in the module: few notebooks need it

    return copies.number(notebook_name()) in copies.chapters()
