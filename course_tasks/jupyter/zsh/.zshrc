# Terminals of the course's JupyterLab: the user's own settings, then the course's environment on top.
course_settings=$ZDOTDIR
ZDOTDIR=$USER_ZDOTDIR
if [ -f "$ZDOTDIR/.zshrc" ]; then . "$ZDOTDIR/.zshrc"; fi
. "$course_settings/../../../.venv/bin/activate"
unset course_settings USER_ZDOTDIR
