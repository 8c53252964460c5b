# Terminals of the course's JupyterLab: the user's own settings, then the course's environment on top.
course_settings=$ZDOTDIR
ZDOTDIR=$USER_ZDOTDIR
if [ -f "$ZDOTDIR/.zshrc" ]; then . "$ZDOTDIR/.zshrc"; fi
# the servers and the database of the notebook whose first cell ran last
if [ -n "$COURSE_RUNTIME" ] && [ -r "$COURSE_RUNTIME/latest.sh" ]; then . "$COURSE_RUNTIME/latest.sh"; fi
. "$course_settings/../../../.venv/bin/activate"
unset course_settings USER_ZDOTDIR
unset PYTHONPATH  # which would put other packages in front of the course's
