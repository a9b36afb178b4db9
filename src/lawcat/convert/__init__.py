"""Teachers, students and adapters: reading, converting, writing."""
