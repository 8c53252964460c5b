"""What each kernel of the course's environment loads: installing the course puts this file into `.venv/etc/ipython`."""

c = get_config()  # type: ignore[name-defined] # noqa: F821 (IPython defines it)
c.InteractiveShellApp.extensions.append("course_tasks.jupyter.first_cell")
