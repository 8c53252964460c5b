"""What contributors use: `record` stores the notebooks' outputs, `bench` measures the course."""
