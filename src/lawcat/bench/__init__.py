"""Time and memory of lawcat against what it replaces, measured in one run on the same inputs."""
