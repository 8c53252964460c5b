"""How `python3 -m course_tasks lab` sets up JupyterLab, in front of the user's own settings, which stay as they are.

What can be changed in Lab's menus is in labconfig/default_setting_overrides.json: a default, so the user's choice wins.
"""

import os
import threading
from pathlib import Path

from course_tasks import copies, progress

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

c = get_config()  # type: ignore[name-defined] # noqa: F821 (Jupyter defines it)
c.ServerApp.root_dir = str(ROOT)  # not notebooks/: links to ../README.md must work
c.ServerApp.allow_root = os.geteuid() == 0  # in a container people are root
c.LabApp.default_url = f"/lab/tree/{copies.start_page(progress.read()['last'])}"
c.LabApp.workspaces_dir = str(ROOT / ".venv" / "workspaces")  # its own: no tabs from the user's other projects
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"

# A shell's own start-up file may put another Python first on PATH (pyenv and conda do), so .venv goes on top of it.
shell = os.environ.get("SHELL", "")
if shell.endswith("/bash"):
    c.ServerApp.terminado_settings = {"shell_command": [shell, "--rcfile", str(HERE / "bashrc")]}
elif shell.endswith("/zsh"):
    variables = [f"ZDOTDIR={HERE / 'zsh'}", f"USER_ZDOTDIR={os.environ.get('ZDOTDIR', Path.home())}"]
    c.ServerApp.terminado_settings = {"shell_command": ["env", *variables, shell]}


def release_threads() -> None:
    """When the main thread has ended, end the threads that AnyIO has made for it.

    JupyterLab stops without waiting for the requests that are under way. A thread that works for one of them is never
    told, and the process would wait for it for ever (jupyterlab's issue 10442).
    """
    threading.main_thread().join()
    for thread in threading.enumerate():
        if thread.name == "AnyIO worker thread":
            thread.stop()  # type: ignore[attr-defined] # AnyIO's own class of threads


threading.Thread(target=release_threads, name="release_threads", daemon=True).start()
