# Read first, by every zsh that the course starts: the user's own settings, which may name another folder for the rest.
course_settings=$ZDOTDIR
ZDOTDIR=$USER_ZDOTDIR
if [ -f "$ZDOTDIR/.zshenv" ]; then . "$ZDOTDIR/.zshenv"; fi
USER_ZDOTDIR=$ZDOTDIR
ZDOTDIR=$course_settings
unset course_settings
