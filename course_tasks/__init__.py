"""The course: the tasks that a worker runs, and the classroom around them."""
